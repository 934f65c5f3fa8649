// From the operator's tensor lists to raw pointers, one record a parameter, with the checks that keep those pointers
// safe. The Python wrapper explains wrong arguments to a user; a failure here is a programmer's error.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <vector>

#include "adamw_ema.h"

namespace meanflow {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void* checked(const Tensor& t, ScalarType dtype, int64_t numel, const Tensor& like) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, "adamw_ema: a tensor has an unexpected dtype");
  STD_TORCH_CHECK(t.is_contiguous(), "adamw_ema: a tensor is not contiguous");
  STD_TORCH_CHECK(t.numel() == numel, "adamw_ema: a tensor holds ", t.numel(), " elements, its parameter ", numel);
  STD_TORCH_CHECK(t.is_cpu() == like.is_cpu() && t.get_device_index() == like.get_device_index(),
                  "adamw_ema: a tensor is not on the device of the first parameter");
  return t.data_ptr();
}

inline std::vector<Parameter> parameters(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                                         const std::vector<Tensor>& exp_avgs, const std::vector<Tensor>& exp_avg_sqs,
                                         const std::vector<Tensor>& steps, const std::vector<Tensor>& emas,
                                         const std::vector<Tensor>& copies, size_t n_emas) {
  const size_t n = params.size();
  STD_TORCH_CHECK(grads.size() == n && exp_avgs.size() == n && exp_avg_sqs.size() == n && steps.size() == n,
                  "adamw_ema: the tensor lists differ in length");
  STD_TORCH_CHECK(emas.size() == n_emas * n, "adamw_ema: emas needs one tensor per parameter and decay");
  STD_TORCH_CHECK(copies.empty() || copies.size() == n, "adamw_ema: copies needs one tensor per parameter, or none");
  STD_TORCH_CHECK(n_emas <= kMaxEmas, "adamw_ema: got ", n_emas, " decays, at most ", kMaxEmas, " are possible");

  std::vector<Parameter> records(n);
  for (size_t i = 0; i < n; ++i) {
    const int64_t numel = params[i].numel();
    const auto pointer = [&](const Tensor& t) {
      return static_cast<float*>(checked(t, ScalarType::Float, numel, params[0]));
    };
    Parameter& record = records[i];
    record.numel = numel;
    record.p = pointer(params[i]);
    record.grad = pointer(grads[i]);
    record.exp_avg = pointer(exp_avgs[i]);
    record.exp_avg_sq = pointer(exp_avg_sqs[i]);
    record.step = static_cast<const float*>(checked(steps[i], ScalarType::Float, 1, params[0]));
    record.copy = nullptr;
    if (!copies.empty())
      record.copy = static_cast<uint16_t*>(checked(copies[i], ScalarType::BFloat16, numel, params[0]));
    for (size_t k = 0; k < n_emas; ++k) record.emas[k] = pointer(emas[k * n + i]);
  }
  return records;
}

}  // namespace meanflow
