// The CUDA kernel of adamw_ema by itself, without torch: each block steps one chunk of one parameter, with 16-byte
// accesses where the pointers allow it and fp32 arithmetic. A test runs this very file on the CPU, thread by thread.
#pragma once

#include <type_traits>

#include "adamw_ema.h"

namespace meanflow {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 4;                 // floats a 16-byte access
constexpr int64_t kChunk = 16 * 1024;      // floats a block: long enough to hide the two double-precision powers
constexpr int kTableSize = 310;            // 100 bytes a parameter, of the 32,764 bytes of arguments a kernel may take

struct Table {
  Parameter parameters[kTableSize];
  int first_chunk[kTableSize + 1];
  int size;
  double ema_weights[kMaxEmas];
};
static_assert(sizeof(Table) < 32000, "the table and the few arguments beside it exceed what a kernel may take");

template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  T x[N];
};

template <typename Pack, typename T>
__device__ __forceinline__ Pack& at(T* pointer, int64_t i) {
  return *reinterpret_cast<Pack*>(pointer + i);
}

// elements begin to end, N at a time a thread; end - begin is a multiple of N
template <int kEmas, int N, typename Grad>
__device__ __forceinline__ void sweep(const Parameter& record, const Grad* grads, const AdamW& adamw,
                                      const Lerp* lerps, int64_t begin, int64_t end) {
  using Pack = Vector<float, N>;
  using Grads = Vector<Grad, N>;
  using Copies = std::conditional_t<N == 1, uint16_t, uint64_t>;  // N bfloat16 in one word
  for (int64_t i = begin + threadIdx.x * N; i < end; i += kThreads * N) {
    // all loads first, so that they are in flight together
    Pack p = at<Pack>(record.p, i);
    Pack exp_avg = at<Pack>(record.exp_avg, i);
    Pack exp_avg_sq = at<Pack>(record.exp_avg_sq, i);
    const Grads grad = at<const Grads>(grads, i);
    Pack emas[kEmas > 0 ? kEmas : 1];
#pragma unroll
    for (int k = 0; k < kEmas; ++k) emas[k] = at<Pack>(record.emas[k], i);

    Copies copies = 0;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      adamw(p.x[j], widen(grad.x[j]), exp_avg.x[j], exp_avg_sq.x[j]);
      copies |= static_cast<Copies>(to_bfloat16(p.x[j])) << (16 * j);
#pragma unroll
      for (int k = 0; k < kEmas; ++k) emas[k].x[j] = lerps[k](emas[k].x[j], p.x[j]);
    }

    at<Pack>(record.p, i) = p;
    at<Pack>(record.exp_avg, i) = exp_avg;
    at<Pack>(record.exp_avg_sq, i) = exp_avg_sq;
#pragma unroll
    for (int k = 0; k < kEmas; ++k) at<Pack>(record.emas[k], i) = emas[k];
    if (record.copy != nullptr) at<Copies>(record.copy, i) = copies;
  }
}

template <int kEmas>
__device__ __forceinline__ bool aligned(const Parameter& record) {
  uintptr_t bits = reinterpret_cast<uintptr_t>(record.p) | reinterpret_cast<uintptr_t>(record.grad) |
                   reinterpret_cast<uintptr_t>(record.exp_avg) | reinterpret_cast<uintptr_t>(record.exp_avg_sq);
#pragma unroll
  for (int k = 0; k < kEmas; ++k) bits |= reinterpret_cast<uintptr_t>(record.emas[k]);
  bits |= (reinterpret_cast<uintptr_t>(record.copy) | reinterpret_cast<uintptr_t>(record.grad_bfloat16)) * 2;
  return bits % (4 * kVector) == 0;
}

template <int kEmas, typename Grad>
__device__ __forceinline__ void sweep_chunk(const Parameter& record, const Grad* grads, const AdamW& adamw,
                                            const Lerp* lerps, int64_t begin, int64_t end) {
  const int64_t vector_end = aligned<kEmas>(record) ? begin + (end - begin) / kVector * kVector : begin;
  sweep<kEmas, kVector>(record, grads, adamw, lerps, begin, vector_end);
  sweep<kEmas, 1>(record, grads, adamw, lerps, vector_end, end);
}

// lr_on_device is null where the learning rate came by value, skip where the host saw that the step is to be made
template <int kEmas>
__global__ void __launch_bounds__(kThreads)
    adamw_ema_kernel(const __grid_constant__ Table table, const Settings settings, const double* lr_on_device,
                     double lr, const float* skip) {
  if (skip != nullptr && *skip != 0) return;
  // the last parameter whose first chunk is not past this block
  const int chunk = blockIdx.x;
  int low = 0, high = table.size;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (table.first_chunk[middle] <= chunk ? low : high) = middle;
  }
  const Parameter& record = table.parameters[low];
  const int64_t begin = (chunk - table.first_chunk[low]) * kChunk;
  const int64_t end = min(begin + kChunk, record.numel);

  __shared__ AdamW shared_adamw;
  if (threadIdx.x == 0) shared_adamw = AdamW(settings, lr_on_device ? *lr_on_device : lr, *record.step);
  __syncthreads();
  const AdamW adamw = shared_adamw;
  Lerp lerps[kEmas > 0 ? kEmas : 1];
#pragma unroll
  for (int k = 0; k < kEmas; ++k) lerps[k] = Lerp(table.ema_weights[k]);

  if (record.grad_bfloat16 != nullptr)
    sweep_chunk<kEmas>(record, record.grad_bfloat16, adamw, lerps, begin, end);
  else
    sweep_chunk<kEmas>(record, record.grad, adamw, lerps, begin, end);
}

}  // namespace
}  // namespace meanflow
