// From the operator's tensor lists to raw pointers, one record a parameter. Every argument is looked at before the
// first pointer is followed: what would read or write memory that is not the tensor's, or pair the wrong elements, is
// an error of Python's. The Python wrapper explains wrong arguments to a user; here it is a programmer's error.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <string>
#include <vector>

#include "adamw_ema.h"

// libtorch throws, not this library: what a library throws is only caught elsewhere where both were built alike
#define ADAMW_EMA_CHECK(condition, words) \
  if (!(condition))                       \
  aoti_torch_check(false, __func__, __FILE__, __LINE__, (std::string("adamw_ema: ") + (words)).c_str())

namespace meanflow {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

template <typename T> struct Element;
template <> struct Element<float> {
  static constexpr ScalarType dtype = ScalarType::Float;
  static constexpr const char* name = "float32";
};
template <> struct Element<double> {
  static constexpr ScalarType dtype = ScalarType::Double;
  static constexpr const char* name = "float64";
};
template <> struct Element<uint16_t> {
  static constexpr ScalarType dtype = ScalarType::BFloat16;
  static constexpr const char* name = "bfloat16";
};

// an argument: put into words only where it is wrong
struct Name {
  const char* list;
  int64_t i = -1;
};

inline std::string operator+(const Name& name, const std::string& words) {
  return name.list + (name.i < 0 ? std::string() : "[" + std::to_string(name.i) + "]") + ": " + words;
}

inline std::string shape(const Tensor& t) {
  std::string words = "(";
  for (int64_t i = 0; i < t.dim(); ++i) words += (i ? ", " : "") + std::to_string(t.size(i));
  return words + ")";
}

inline bool same_shape(const Tensor& x, const Tensor& y) {
  if (x.dim() != y.dim()) return false;
  for (int64_t i = 0; i < x.dim(); ++i)
    if (x.size(i) != y.size(i)) return false;
  return true;
}

// bytes from the tensor's first element to the end of its storage
inline int64_t room(const Tensor& t, int64_t element_size) {
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  return bytes - t.storage_offset() * element_size;
}

// all tensors of one call, on one device: each is checked as it is taken, and all together in the end
class Arguments {
 public:
  // cuda: whether the parameters must be on a GPU; where they are, scalars may be on the CPU
  Arguments(bool cuda, const Tensor& first)
      : cuda_(cuda), index_(cuda && first.is_cuda() ? first.get_device_index() : 0) {}

  template <typename T>
  T* parameter(const Name& name, const Tensor& t, const Tensor& like, bool written = true, const char* other = "") {
    check_device(name, t, false);
    ADAMW_EMA_CHECK(same_shape(t, like), name + "got shape " + shape(t) + ", wanted " + shape(like));
    return pointer<T>(name, t, written, other);
  }

  template <typename T>
  const T* scalar(const Name& name, const Tensor& t, bool on_host = true) {
    check_device(name, t, on_host);
    ADAMW_EMA_CHECK(t.numel() == 1, name + "got " + std::to_string(t.numel()) + " elements, wanted 1");
    return pointer<T>(name, t, false);
  }

  // what is written overlaps nothing
  void check_overlap() {
    std::sort(spans_.begin(), spans_.end(), [](const Span& x, const Span& y) { return x.begin < y.begin; });
    uintptr_t read = 0, written = 0;  // ends of what came before
    for (const Span& span : spans_) {
      ADAMW_EMA_CHECK(span.begin >= written && (!span.written || span.begin >= read),
                      span.name + "got memory that another argument has too, wanted memory of its own");
      (span.written ? written : read) = std::max(span.written ? written : read, span.end);
    }
  }

 private:
  struct Span {
    uintptr_t begin, end;
    bool written;
    Name name;
  };

  void check_device(const Name& name, const Tensor& t, bool on_host) const {
    ADAMW_EMA_CHECK(t.defined(), name + "got no tensor");
    const bool here = cuda_ ? t.is_cuda() && t.get_device_index() == index_ : t.is_cpu();
    ADAMW_EMA_CHECK(here || (on_host && t.is_cpu()), name + "got a tensor on another device, wanted one on " +
                                                         (cuda_ ? "cuda:" + std::to_string(index_) : "cpu"));
  }

  template <typename T>
  T* pointer(const Name& name, const Tensor& t, bool written, const char* other = "") {
    ADAMW_EMA_CHECK(t.scalar_type() == Element<T>::dtype,
                    name + "got another dtype, wanted " + Element<T>::name + other);
    ADAMW_EMA_CHECK(t.is_contiguous(), name + "got a tensor that is not contiguous");
    const int64_t bytes = t.numel() * static_cast<int64_t>(sizeof(T));
    if (bytes == 0) return nullptr;
    void* const data = t.data_ptr();
    const auto begin = reinterpret_cast<uintptr_t>(data);
    ADAMW_EMA_CHECK(data != nullptr && room(t, sizeof(T)) >= bytes, name + "got a tensor whose memory was taken away");
    ADAMW_EMA_CHECK(begin % sizeof(T) == 0, name + "got an address that is no multiple of an element's size");
    spans_.push_back({begin, begin + static_cast<uintptr_t>(bytes), written, name});
    return static_cast<T*>(data);
  }

  bool cuda_;
  int32_t index_;
  std::vector<Span> spans_;
};

// one step's tensors, checked; none where there is no parameter
struct Checked {
  std::vector<Parameter> records;
  const double* lr;
  const float* skip;
};

inline Checked check(bool cuda, const Tensors& params, const Tensors& grads, const Tensors& exp_avgs,
                     const Tensors& exp_avg_sqs, const Tensors& steps, const Tensors& emas, const Tensors& copies,
                     const Tensor& lr, const Tensor& skip, size_t n_emas) {
  const size_t n = params.size();
  const auto check_count = [](const char* list, const Tensors& tensors, size_t wanted) {
    ADAMW_EMA_CHECK(tensors.size() == wanted, Name{list} + "got " + std::to_string(tensors.size()) +
                                                  " tensors, wanted " + std::to_string(wanted));
  };
  ADAMW_EMA_CHECK(n_emas <= kMaxEmas, Name{"ema_decays"} + "got " + std::to_string(n_emas) + ", wanted at most " +
                                          std::to_string(kMaxEmas));
  check_count("grads", grads, n);
  check_count("exp_avgs", exp_avgs, n);
  check_count("exp_avg_sqs", exp_avg_sqs, n);
  check_count("steps", steps, n);
  check_count("emas", emas, n_emas * n);
  if (!copies.empty()) check_count("copies", copies, n);
  if (n == 0) return {};

  Arguments arguments(cuda, params[0]);
  Checked checked{std::vector<Parameter>(n), arguments.scalar<double>({"lr"}, lr),
                  arguments.scalar<float>({"skip"}, skip)};
  for (size_t at = 0; at < n; ++at) {
    const auto i = static_cast<int64_t>(at);
    const Tensor& p = params[i];
    Parameter& record = checked.records[i];
    record.p = arguments.parameter<float>({"params", i}, p, p);
    record.numel = p.numel();
    const Tensor& grad = grads[i];
    if (grad.defined() && grad.scalar_type() == ScalarType::BFloat16)
      record.grad_bfloat16 = arguments.parameter<uint16_t>({"grads", i}, grad, p, false);
    else
      record.grad = arguments.parameter<float>({"grads", i}, grad, p, false, " or bfloat16");
    record.exp_avg = arguments.parameter<float>({"exp_avgs", i}, exp_avgs[i], p);
    record.exp_avg_sq = arguments.parameter<float>({"exp_avg_sqs", i}, exp_avg_sqs[i], p);
    record.step = arguments.scalar<float>({"steps", i}, steps[i], false);
    record.copy = copies.empty() ? nullptr : arguments.parameter<uint16_t>({"copies", i}, copies[i], p);
    for (size_t k = 0; k < n_emas; ++k) {
      const auto j = static_cast<int64_t>(k * n + at);
      record.emas[k] = arguments.parameter<float>({"emas", j}, emas[j], p);
    }
  }
  arguments.check_overlap();
  return checked;
}

}  // namespace meanflow
