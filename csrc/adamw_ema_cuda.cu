// adamw_ema on a GPU: all parameters in one launch. The table of pointers travels in the kernel's arguments, and the
// step counts (and, if wished, the learning rate and the word to skip) are read on the device: nothing is copied,
// allocated or waited for, so that the launch can be captured in a CUDA graph.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <cuda_runtime.h>

#include <algorithm>

#include "adamw_ema_args.h"
#include "adamw_ema_kernel.cuh"

// lives in libtorch_cuda, which a CPU torch lacks: weak, so that the library loads there too
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace meanflow {
namespace {

using Kernel = void (*)(const Table, const Settings, const double*, double, const float*);
constexpr Kernel kKernels[kMaxEmas + 1] = {adamw_ema_kernel<0>, adamw_ema_kernel<1>, adamw_ema_kernel<2>,
                                           adamw_ema_kernel<3>, adamw_ema_kernel<4>};

cudaStream_t current_stream(int32_t device) {
  ADAMW_EMA_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this build of torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

void adamw_ema_cuda(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
                    std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> steps, std::vector<Tensor> emas,
                    std::vector<Tensor> copies, Tensor lr, Tensor skip, double beta1, double beta2, double eps,
                    double weight_decay, std::vector<double> ema_decays) {
  const size_t n_emas = ema_decays.size();
  const Checked checked =
      check(true, params, grads, exp_avgs, exp_avg_sqs, steps, emas, copies, lr, skip, n_emas);
  const auto& records = checked.records;
  if (records.empty() || (skip.is_cpu() && *checked.skip != 0)) return;
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
        table, settings, lr.is_cpu() ? nullptr : checked.lr, lr.is_cpu() ? *checked.lr : 0.0,
        skip.is_cpu() ? nullptr : checked.skip);
    const cudaError_t error = cudaGetLastError();
    ADAMW_EMA_CHECK(error == cudaSuccess, std::string("the launch failed: ") + cudaGetErrorString(error));
  }
}

}  // namespace
}  // namespace meanflow

STABLE_TORCH_LIBRARY_IMPL(meanflow_kernels, CUDA, m) { m.impl("adamw_ema", TORCH_BOX(&meanflow::adamw_ema_cuda)); }
