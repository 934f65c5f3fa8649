"""Numbers computed by the official implementations of other objectives: shortcut models, SoFlow, iCT, sCM.

The arrays lie in tests/data/oracle_family (its README.md says how they were made); FAMILY_ORACLE_DIR names another set.
Their network is a tiny fixed function, the same in all files.
"""

import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import oracle
import torch
from oracle import group, settings, tensor
from torch import Tensor, nn

FOLDER = Path(os.environ.get("FAMILY_ORACLE_DIR") or Path(__file__).parent / "data" / "oracle_family")
MODES = oracle.MODES
# relative to the largest entry; what was computed in fp64 and stored in fp32 is off by its rounding
BARS, STORED_AS_F32 = {"f64": 1e-11, "f32": 1e-4}, 1e-7


@cache
def load(name: str) -> dict[str, np.ndarray]:
    """All arrays of one file."""
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


def assert_close(got: Tensor, wanted: np.ndarray, mode: str, name: str = "", bar: float = 0.0) -> None:
    """Within the mode's bar, or another one, relative to the largest entry of the official array."""
    bar = bar or BARS[mode]
    if mode == "f64" and wanted.dtype == np.float32:
        bar = max(bar, STORED_AS_F32)
    got, official = got.detach().double(), tensor(np.asarray(wanted)).double()
    assert got.shape == official.shape, f"{name}: shape {tuple(got.shape)}, official {tuple(official.shape)}"
    if official.numel():
        error = (got - official).abs().max() / official.abs().max().clamp(min=1e-300)
        assert error <= bar, f"{name}: error {error:.2e} over the bar {bar:.0e}"


def assert_gradients(net: nn.Module, wanted: Mapping[str, np.ndarray], mode: str, bar: float = 0.0) -> None:
    """The gradient of every leaf, by its official name; one that is absent is zero."""
    assert wanted, "no official gradients"
    for name, p in net.named_parameters():
        assert_close(torch.zeros_like(p) if p.grad is None else p.grad, wanted[name], mode, f"gradient of {name}", bar)


class TinyNet(nn.Module):
    """net(z, a, b, y) of the README, called as our networks are: net(z, r, t, y).

        h   = tanh(flat(z) z_w + phi(a) a_w + phi(b) b_w + y_table[y] + c1)
        net = out_mul (tanh(h h_w + c2) o_w + o_b)

    Args:
        data: arrays of a file. dtype: of the weights.
        inputs: (r, t) -> what is embedded: (a, b), or (a,) in a file without b_w.
        weights: the group of arrays that has the weights. out_mul: factor on the output.
    """

    def __init__(
        self,
        data: Mapping[str, np.ndarray],
        dtype: torch.dtype,
        inputs: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
        weights: str = "params/",
        out_mul: float = 1.0,
    ):
        super().__init__()
        config = settings(dict(data), "config")
        self.num_classes, self.inputs, self.out_mul = config["num_classes"], inputs, out_mul
        self.omega = torch.tensor(config["omega"], dtype=torch.float64)
        for name, array in group(dict(data), weights).items():
            self.register_parameter(name, nn.Parameter(torch.from_numpy(np.array(array)).to(dtype)))
        self.dtype = dtype

    def features(self, s: Tensor) -> Tensor:
        """phi(s): (B,) -> (B, 2 len(omega))."""
        angle = s[:, None] * self.omega.to(s)
        return torch.cat([angle.cos(), angle.sin()], 1)

    def forward(self, z: Tensor, r: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """z (B, C, H, W), r, t (B,), y (B,) -> like z."""
        flat = z.permute(0, 2, 3, 1).flatten(1)
        embedded = zip(self.inputs(r, t), (self.a_w, getattr(self, "b_w", None)), strict=False)
        times = [self.features(s.to(self.dtype)) @ weight for s, weight in embedded]
        h = torch.tanh(flat @ self.z_w + sum(times) + self.y_table[y] + self.c1)
        out = self.out_mul * (torch.tanh(h @ self.h_w + self.c2) @ self.o_w + self.o_b)
        batch, channels, height, width = z.shape
        return out.reshape(batch, height, width, channels).permute(0, 3, 1, 2)
