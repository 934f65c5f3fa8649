"""How far a result is from an exact one, and how far it may be for reasons that are nobody's mistake."""

import torch
from torch import Tensor

FLOOR = {
    # half the error of rounding a correct result to the dtype once (uniform mantissas: 2^-p / sqrt(12) * 1.2)
    torch.bfloat16: 8e-4,
    torch.float16: 1e-4,
    # summation order over up to 1024 terms, where plain torch happens to be exact
    torch.float32: 1e-6,
    # references in fp64 against torch.func.jvp
    torch.float64: 1e-12,
}
"""What is added to twice plain torch's relative error, by dtype."""
TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 1e-2, "tf32": 1e-2}
"""Largest relative error of a sample: rounding, through all layers and steps, far below any mistake's. The products of
fp32 on a GPU round to TF32, which has fp16's digits."""


def relative_error(x: Tensor, exact: Tensor) -> float:
    """|x - exact| / |exact| in the Frobenius norm; |x| where exact is zero. NaN never passes a comparison."""
    difference = (x.double() - exact.double()).norm()
    norm = exact.double().norm()
    return (difference / norm if norm > 0 else difference).item()
