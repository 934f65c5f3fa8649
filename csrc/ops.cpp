// The schemas of the native operators, all in one place. The implementations register themselves in their own files.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(meanflow_kernels, m) {
  // emas holds one tensor per parameter for the first decay, then for the second, and so on; copies may be empty.
  // Each of grads is fp32 or bf16. lr (float64) may live on the CPU or beside the parameters, and so may skip
  // (float32): where it is not 0 nothing changes. steps are already counted up, as fp32.
  m.def(
      "adamw_ema(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor[] steps, Tensor(d!)[] emas, Tensor(e!)[] copies, Tensor lr, Tensor skip, float beta1, float beta2, "
      "float eps, float weight_decay, float[] ema_decays) -> ()");
}
