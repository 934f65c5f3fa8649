"""The error bar of every kernel test: at most twice plain torch's error in the same dtype, plus a floor.

Both errors are relative Frobenius errors against fp64 on the same rounded inputs.
"""

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


def relative_error(x: Tensor, exact: Tensor) -> float:
    """|x - exact| / |exact| in the Frobenius norm; |x| where exact is zero. NaN never passes a comparison."""
    difference = (x.double() - exact.double()).norm()
    norm = exact.double().norm()
    return (difference / norm if norm > 0 else difference).item()


def assert_error(x: Tensor, exact: Tensor, plain: Tensor, name: str) -> None:
    """``x`` is at most twice as far from ``exact`` as ``plain`` (the same quantity by plain torch in x's dtype), plus
    the floor.
    """
    assert x.dtype == plain.dtype and x.shape == exact.shape, f"{name}: {x.dtype} {tuple(x.shape)}"
    error, bar = relative_error(x, exact), 2 * relative_error(plain, exact) + FLOOR[x.dtype]
    assert error <= bar, f"{name}: relative error {error:.2e} > {bar:.2e}"
