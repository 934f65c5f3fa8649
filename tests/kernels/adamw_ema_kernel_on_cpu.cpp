// Runs the CUDA kernel of adamw_ema on the CPU: one block after the other, one thread after the other. Thread 0 comes
// first, and it alone writes shared memory, so the barrier needs nothing. Compares every value with a plain loop.
// Prints the number of values compared; exits with 1 at the first wrong one.
#include <algorithm>
#include <cstdio>
#include <random>
#include <vector>

struct Index {
  unsigned x;
};
static Index threadIdx, blockIdx;
#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(threads)
#define __shared__ static
#define __syncthreads()
using std::min;

#include "adamw_ema_kernel.cuh"

using namespace meanflow;

constexpr float kGuard = 77.0f;  // before and after each tensor: nothing may write there
static std::mt19937 generator(0);
static const Settings settings{0.9, 0.95, 1e-8, 0.1};
static const double lr = 1e-2, weights[kMaxEmas] = {1e-4, 0.7, 0.0, 1.0};
static const float step = 3;
static long compared = 0;

template <typename T>
struct Buffer {
  std::vector<T> before, now;
  int64_t start, numel;

  // start modulo 16 is the tensor's alignment in elements
  Buffer(int64_t numel, bool misaligned) : numel(numel) {
    now.assign(numel + 48, static_cast<T>(kGuard));
    const auto address = reinterpret_cast<uintptr_t>(now.data()) / sizeof(T);
    start = 32 - address % 16 + misaligned;
    std::uniform_real_distribution<float> uniform(0.0f, 2.0f);
    for (int64_t i = 0; i < numel; ++i) now[start + i] = static_cast<T>(uniform(generator));
    before = now;
  }
  T* data() { return now.data() + start; }
  void check(const char* name, int64_t parameter) {
    for (size_t i = 0; i < now.size(); ++i, ++compared) {
      if (now[i] == before[i]) continue;
      std::printf("%s of parameter %ld is wrong at %ld\n", name, long(parameter), long(i - start));
      std::exit(1);
    }
  }
};

struct Tensors {
  Buffer<float> p, grad, exp_avg, exp_avg_sq;
  std::vector<Buffer<float>> emas;
  Buffer<uint16_t> copy, grad_bfloat16;
};

// every third gradient is in bfloat16
static bool is_bfloat16(size_t i) { return i % 3 == 0; }

template <int kEmas>
void run(const std::vector<int64_t>& sizes, bool misaligned, bool copies, const double* lr_on_device) {
  std::vector<Tensors> all;
  for (size_t i = 0; i < sizes.size(); ++i) {
    const auto buffer = [&](int which) { return Buffer<float>(sizes[i], misaligned && int(i % 7) == which); };
    Buffer<uint16_t> copy(sizes[i], misaligned && i % 7 == 5), grad_bfloat16(sizes[i], misaligned && i % 7 == 6);
    for (uint16_t& x : grad_bfloat16.now) x = to_bfloat16(std::uniform_real_distribution<float>(0.0f, 2.0f)(generator));
    grad_bfloat16.before = grad_bfloat16.now;
    all.push_back({buffer(0), buffer(1), buffer(2), buffer(3), {}, copy, grad_bfloat16});
    for (int k = 0; k < kEmas; ++k) all.back().emas.push_back(buffer(4));
  }
  static Table table;
  int64_t chunks = 0;
  table.size = static_cast<int>(sizes.size());
  for (int k = 0; k < kEmas; ++k) table.ema_weights[k] = weights[k];
  for (int i = 0; i < table.size; ++i) {
    Tensors& t = all[i];
    uint16_t* copy = copies ? t.copy.data() : nullptr;
    table.parameters[i] = {sizes[i],
                           t.p.data(),
                           is_bfloat16(i) ? nullptr : t.grad.data(),
                           is_bfloat16(i) ? t.grad_bfloat16.data() : nullptr,
                           t.exp_avg.data(),
                           t.exp_avg_sq.data(),
                           &step,
                           copy,
                           {}};
    for (int k = 0; k < kEmas; ++k) table.parameters[i].emas[k] = t.emas[k].data();
    table.first_chunk[i] = static_cast<int>(chunks);
    chunks += (sizes[i] + kChunk - 1) / kChunk;
  }
  // what is expected goes into `before`
  const AdamW adamw(settings, lr, step);
  for (size_t n = 0; n < all.size(); ++n) {
    Tensors& t = all[n];
    for (int64_t i = t.p.start, j = 0; j < t.p.numel; ++i, ++j) {
      float& exp_avg = t.exp_avg.before[t.exp_avg.start + j];
      const float grad = is_bfloat16(n) ? widen(t.grad_bfloat16.data()[j]) : t.grad.data()[j];
      adamw(t.p.before[i], grad, exp_avg, t.exp_avg_sq.before[t.exp_avg_sq.start + j]);
      for (int k = 0; k < kEmas; ++k) {
        float& ema = t.emas[k].before[t.emas[k].start + j];
        ema = Lerp(weights[k])(ema, t.p.before[i]);
      }
      if (copies) t.copy.before[t.copy.start + j] = to_bfloat16(t.p.before[i]);
    }
  }
  for (blockIdx.x = 0; blockIdx.x < chunks; ++blockIdx.x)
    for (threadIdx.x = 0; threadIdx.x < kThreads; ++threadIdx.x)
{
      const float made = 0, skipped = 1;
      adamw_ema_kernel<kEmas>(table, settings, lr_on_device, lr_on_device ? -1.0 : lr, copies ? &made : nullptr);
      // a second step that is skipped changes nothing
      adamw_ema_kernel<kEmas>(table, settings, lr_on_device, lr, &skipped);
    }
  for (size_t i = 0; i < all.size(); ++i) {
    all[i].p.check("p", i);
    all[i].grad.check("grad", i);
    all[i].grad_bfloat16.check("grad_bfloat16", i);
    all[i].exp_avg.check("exp_avg", i);
    all[i].exp_avg_sq.check("exp_avg_sq", i);
    for (auto& ema : all[i].emas) ema.check("ema", i);
    all[i].copy.check("copy", i);
  }
}

int main() {
  // small ones, empty ones (the first and the last among them), and those around one chunk and several
  std::vector<int64_t> sizes = {0, 1, 2, 3, 4, 5, 0, 0, kChunk - 1, kChunk, kChunk + 1, 3 * kChunk + 7};
  for (int i = 0; i < 100; ++i) sizes.push_back(generator() % 97);
  sizes.push_back(0);
  run<0>(sizes, false, false, nullptr);
  run<1>(sizes, false, true, nullptr);
  run<2>(sizes, true, true, &lr);
  run<4>(sizes, true, false, &lr);
  std::printf("%ld\n", compared);
}
