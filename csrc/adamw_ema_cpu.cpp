// adamw_ema on the CPU: one sweep over memory, vectorised for the CPU it runs on, split over torch's own threads.
// Each element is computed by itself, so the result does not depend on the number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "adamw_ema_args.h"

// one copy of the loop for AVX-512, for AVX2 with FMA and for the compiler's baseline; the loader picks
#if defined(__x86_64__) && defined(__gnu_linux__)
#define CPU_VARIANTS __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CPU_VARIANTS
#endif

namespace meanflow {
namespace {

constexpr int64_t kCacheLine = 16;     // floats
constexpr int64_t kBlock = 64;         // floats that stay in the first cache between the steps
constexpr int64_t kChunk = 16 * 1024;  // floats, the unit given to a thread
// floats to prefetch ahead, for so many streams outrun the hardware's own prefetcher: measured 1.1 times as fast as
// without, on one core of a Sapphire Rapids
constexpr int64_t kAhead = 512;

template <typename T>
ELEMENTWISE void prefetch(const T* block) {
  constexpr int64_t line = kCacheLine * sizeof(float) / sizeof(T);
  for (int64_t i = 0; i < kBlock; i += line) __builtin_prefetch(block + kAhead + i, 1);
}

template <typename Grad>
ELEMENTWISE void step_block(const Parameter& record, const Grad* grads, const AdamW& adamw,
                            const std::vector<Lerp>& lerps, int64_t at, int64_t n) {
  float* __restrict__ p = record.p + at;                      // (n,)
  const Grad* __restrict__ grad = grads + at;                 // (n,)
  float* __restrict__ exp_avg = record.exp_avg + at;          // (n,)
  float* __restrict__ exp_avg_sq = record.exp_avg_sq + at;    // (n,)
  prefetch(p);
  prefetch(grad);
  prefetch(exp_avg);
  prefetch(exp_avg_sq);
  for (int64_t i = 0; i < n; ++i) adamw(p[i], widen(grad[i]), exp_avg[i], exp_avg_sq[i]);

  for (size_t k = 0; k < lerps.size(); ++k) {
    const Lerp lerp = lerps[k];
    float* __restrict__ ema = record.emas[k] + at;            // (n,)
    prefetch(ema);
    for (int64_t i = 0; i < n; ++i) ema[i] = lerp(ema[i], p[i]);
  }
  if (record.copy == nullptr) return;
  uint16_t* __restrict__ copy = record.copy + at;             // (n,)
  for (int64_t i = 0; i < n; ++i) copy[i] = to_bfloat16(p[i]);
}

template <typename Grad>
ELEMENTWISE void step_blocks(const Parameter& record, const Grad* grads, const AdamW& adamw,
                             const std::vector<Lerp>& lerps, int64_t begin, int64_t end) {
  int64_t at = begin;
  for (; at + kBlock <= end; at += kBlock) step_block(record, grads, adamw, lerps, at, kBlock);
  if (at < end) step_block(record, grads, adamw, lerps, at, end - at);
}

CPU_VARIANTS void step_chunk(const Parameter& record, const AdamW& coefficients, const std::vector<Lerp>& lerps,
                             int64_t begin, int64_t end) {
  const AdamW adamw = coefficients;  // by value: the stores below cannot change it
  if (record.grad_bfloat16 != nullptr)
    step_blocks(record, record.grad_bfloat16, adamw, lerps, begin, end);
  else
    step_blocks(record, record.grad, adamw, lerps, begin, end);
}

struct Chunk {
  size_t parameter;
  int64_t begin, end;
};

void adamw_ema_cpu(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
                   std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> steps, std::vector<Tensor> emas,
                   std::vector<Tensor> copies, Tensor lr, Tensor skip, double beta1, double beta2, double eps,
                   double weight_decay, std::vector<double> ema_decays) {
  const Checked checked =
      check(false, params, grads, exp_avgs, exp_avg_sqs, steps, emas, copies, lr, skip, ema_decays.size());
  const auto& records = checked.records;
  if (records.empty() || *checked.skip != 0) return;
  std::vector<Lerp> lerps;
  for (const double decay : ema_decays) lerps.emplace_back(1 - decay);
  std::vector<AdamW> coefficients;
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < records.size(); ++i) {
    coefficients.emplace_back(Settings{beta1, beta2, eps, weight_decay}, *checked.lr, *records[i].step);
    for (int64_t begin = 0; begin < records[i].numel; begin += kChunk)
      chunks.push_back({i, begin, std::min(begin + kChunk, records[i].numel)});
  }
  torch::stable::parallel_for(0, chunks.size(), 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const Chunk& chunk = chunks[c];
      step_chunk(records[chunk.parameter], coefficients[chunk.parameter], lerps, chunk.begin, chunk.end);
    }
  });
}

}  // namespace
}  // namespace meanflow

STABLE_TORCH_LIBRARY_IMPL(meanflow_kernels, CPU, m) { m.impl("adamw_ema", TORCH_BOX(&meanflow::adamw_ema_cpu)); }
