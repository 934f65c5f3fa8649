// adamw_ema on a GPU: all parameters in one launch, each block one chunk of one parameter, 16-byte accesses, fp32
// arithmetic. The table of pointers travels in the kernel's arguments and the step counts (and, if wished, the learning
// rate) are read on the device: nothing is copied, allocated or waited for, so that the launch can be captured in a
// CUDA graph.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "adamw_ema.h"
#include "adamw_ema_args.h"

// lives in libtorch_cuda, which a CPU torch lacks: weak, so that the library loads there too
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace meanflow {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 4;                 // floats a 16-byte access
constexpr int64_t kChunk = 16 * 1024;      // floats a block: long enough to hide the two double-precision powers
constexpr int kTableSize = 340;            // 92 bytes a parameter, of the 32,764 bytes of arguments a kernel may take

struct Table {
  Parameter parameters[kTableSize];
  int first_chunk[kTableSize + 1];
  int size;
  double ema_weights[kMaxEmas];
};
static_assert(sizeof(Table) < 32000, "the table and the few arguments beside it exceed what a kernel may take");

template <int N>
struct alignas(4 * N) Floats {
  float x[N];
};

template <typename Pack, typename T>
__device__ __forceinline__ Pack& at(T* pointer, int64_t i) {
  return *reinterpret_cast<Pack*>(pointer + i);
}

// elements begin to end, N at a time a thread; end - begin is a multiple of N
template <int kEmas, int N>
__device__ __forceinline__ void sweep(const Parameter& record, const AdamW& adamw, const Lerp* lerps, int64_t begin,
                                      int64_t end) {
  using Pack = Floats<N>;
  using Copies = std::conditional_t<N == 1, uint16_t, uint64_t>;  // N bfloat16 in one word
  for (int64_t i = begin + threadIdx.x * N; i < end; i += kThreads * N) {
    // all loads first, so that they are in flight together
    Pack p = at<Pack>(record.p, i);
    Pack exp_avg = at<Pack>(record.exp_avg, i);
    Pack exp_avg_sq = at<Pack>(record.exp_avg_sq, i);
    const Pack grad = at<const Pack>(record.grad, i);
    Pack emas[kEmas > 0 ? kEmas : 1];
#pragma unroll
    for (int k = 0; k < kEmas; ++k) emas[k] = at<Pack>(record.emas[k], i);

    Copies copies = 0;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      adamw(p.x[j], grad.x[j], exp_avg.x[j], exp_avg_sq.x[j]);
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
  bits |= reinterpret_cast<uintptr_t>(record.copy) * 2;
  return bits % (4 * kVector) == 0;
}

// lr_on_device is null where the learning rate came by value
template <int kEmas>
__global__ void __launch_bounds__(kThreads)
    adamw_ema_kernel(const __grid_constant__ Table table, const Settings settings, const double* lr_on_device,
                     double lr) {
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

  const int64_t vector_end = aligned<kEmas>(record) ? begin + (end - begin) / kVector * kVector : begin;
  sweep<kEmas, kVector>(record, adamw, lerps, begin, vector_end);
  sweep<kEmas, 1>(record, adamw, lerps, vector_end, end);
}

using Kernel = void (*)(const Table, const Settings, const double*, double);
constexpr Kernel kKernels[kMaxEmas + 1] = {adamw_ema_kernel<0>, adamw_ema_kernel<1>, adamw_ema_kernel<2>,
                                           adamw_ema_kernel<3>, adamw_ema_kernel<4>};

cudaStream_t current_stream(int32_t device) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "adamw_ema: this build of torch has no CUDA");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

void adamw_ema_cuda(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
                    std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> steps, std::vector<Tensor> emas,
                    std::vector<Tensor> copies, Tensor lr, double beta1, double beta2, double eps, double weight_decay,
                    std::vector<double> ema_decays) {
  if (params.empty()) return;
  const size_t n_emas = ema_decays.size();
  const auto records = parameters(params, grads, exp_avgs, exp_avg_sqs, steps, emas, copies, n_emas);
  const double* rate = static_cast<const double*>(checked(lr, ScalarType::Double, 1, lr));
  const Settings settings{beta1, beta2, eps, weight_decay};

  const torch::stable::accelerator::DeviceGuard guard(params[0].get_device_index());
  const cudaStream_t stream = current_stream(params[0].get_device_index());
  Table table;
  for (size_t k = 0; k < n_emas; ++k) table.ema_weights[k] = 1 - ema_decays[k];
  for (size_t first = 0; first < records.size(); first += kTableSize) {
    table.size = static_cast<int>(std::min<size_t>(kTableSize, records.size() - first));
    int64_t chunks = 0;
    for (int i = 0; i < table.size; ++i) {
      table.parameters[i] = records[first + i];
      table.first_chunk[i] = static_cast<int>(chunks);
      chunks += (records[first + i].numel + kChunk - 1) / kChunk;
    }
    if (chunks == 0) continue;
    kKernels[n_emas]<<<static_cast<unsigned>(chunks), kThreads, 0, stream>>>(
        table, settings, lr.is_cpu() ? nullptr : rate, lr.is_cpu() ? *rate : 0.0);
    const cudaError_t error = cudaGetLastError();
    STD_TORCH_CHECK(error == cudaSuccess, "adamw_ema: the launch failed: ", cudaGetErrorString(error));
  }
}

}  // namespace
}  // namespace meanflow

STABLE_TORCH_LIBRARY_IMPL(meanflow_kernels, CUDA, m) { m.impl("adamw_ema", TORCH_BOX(&meanflow::adamw_ema_cuda)); }
