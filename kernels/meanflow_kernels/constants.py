"""Numbers that the kernels' exponentials and logarithms need: the hardware has them to base 2."""

import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
