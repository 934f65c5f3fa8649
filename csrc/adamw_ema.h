// The arithmetic of one AdamW + EMA step on one element, written once: the CPU and the CUDA file round alike.
// Every fused multiply-add is explicit, and the build forbids the compilers to form others (-ffp-contract=off,
// --fmad=false). The order of operations is that of torch's fused AdamW on the CPU, so that the two agree bit for bit
// (but for exp_avg_sq behind torch's last full vector, which torch rounds otherwise).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define ELEMENTWISE __host__ __device__ __forceinline__
#else
#define ELEMENTWISE inline __attribute__((always_inline))
#endif

namespace meanflow {

// x + weight (y - x), evaluated from the nearer end
struct Lerp {
  float coefficient;
  bool from_y;

  Lerp() = default;
  ELEMENTWISE explicit Lerp(double weight)
      : coefficient(static_cast<float>(weight)), from_y(fabsf(coefficient) >= 0.5f) {
    if (from_y) coefficient -= 1.0f;
  }

  ELEMENTWISE float operator()(float x, float y) const { return fmaf(coefficient, y - x, from_y ? y : x); }
};

struct Settings {
  double beta1, beta2, eps, weight_decay;
};

// what the settings, the learning rate and the step count come to: formed in double precision, rounded once
struct AdamW {
  float decay, beta2, one_minus_beta2, bias2_sqrt, eps, minus_step_size;
  Lerp first_moment;

  AdamW() = default;
  ELEMENTWISE AdamW(const Settings& s, double lr, double step)
      : decay(static_cast<float>(1 - lr * s.weight_decay)),
        beta2(static_cast<float>(s.beta2)),
        one_minus_beta2(static_cast<float>(1 - s.beta2)),
        bias2_sqrt(static_cast<float>(sqrt(1 - pow(s.beta2, step)))),
        eps(static_cast<float>(s.eps)),
        minus_step_size(static_cast<float>(-lr / (1 - pow(s.beta1, step)))),
        first_moment(1 - s.beta1) {}

  ELEMENTWISE void operator()(float& p, float g, float& exp_avg, float& exp_avg_sq) const {
    exp_avg = first_moment(exp_avg, g);
    exp_avg_sq = fmaf(one_minus_beta2 * g, g, exp_avg_sq * beta2);
    const float denominator = sqrtf(exp_avg_sq) / bias2_sqrt + eps;
    p = p * decay + minus_step_size * exp_avg / denominator;
  }
};

// the bits of x in bfloat16: to nearest, ties to even; a NaN stays one
ELEMENTWISE uint16_t to_bfloat16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(x == x ? rounded : 0x7fc0u);
}

// a gradient's element as a float: exact
ELEMENTWISE float widen(float x) { return x; }
ELEMENTWISE float widen(uint16_t bfloat16) {
  const uint32_t bits = static_cast<uint32_t>(bfloat16) << 16;
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

constexpr int kMaxEmas = 4;

// one parameter and all that a step on it touches
struct Parameter {
  int64_t numel;
  float* p;
  const float* grad;               // one of the two, the other is null
  const uint16_t* grad_bfloat16;
  float* exp_avg;
  float* exp_avg_sq;
  const float* step;
  uint16_t* copy;  // bfloat16, or null
  float* emas[kMaxEmas];
};

}  // namespace meanflow
