"""The passes of a step: each call of a network, declared beforehand with all that it costs and how it runs.

An objective reaches its networks through `Passes` alone. What plans, compiles, captures or counts a step reads the same
declaration, and a call that was not declared is refused.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

# (net, (z, r, t), (z_dot, r_dot, t_dot), others, tangent_start, **options) -> the network's outputs, u first, and du_dt
# others follow the times; tangents are of the samples from tangent_start on
Jvp = Callable[..., tuple[Tensor, ...]]


def pair_jvp(net, primals, tangents, others, tangent_start=0, **options):
    """Compute outputs and du/dt by the network's own tangents; autograd records nothing of the derivative."""
    if tangent_start == len(primals[0]):
        out = net(*primals, *others, **options)
        return (*out, primals[0][tangent_start:]) if isinstance(out, tuple) else (out, primals[0][tangent_start:])
    return net(*primals, *others, **options, tangents=tangents, tangent_start=tangent_start)


def func_jvp(net, primals, tangents, others, tangent_start=0, **options):
    """The same by torch.func.jvp, for any network; autograd records the derivative, and of all samples."""

    def whole(x, x_dot):
        out = torch.zeros_like(x)
        if x_dot is not None:
            out[tangent_start:] = x_dot
        return out

    tangents = tuple(whole(x, x_dot) for x, x_dot in zip(primals, tangents, strict=True))
    out, out_dot = torch.func.jvp(lambda *times: net(*times, *others, **options), primals, tangents)[:2]
    return (*out, out_dot[0][tangent_start:]) if isinstance(out, tuple) else (out, out_dot[tangent_start:])


class Pass(NamedTuple):
    """A call of a network."""

    rows: int
    """Samples, or rows of them, in the call; without any it is not made."""
    tangents: int = 0
    """How many of its last rows get a derivative."""
    trained: bool = False
    """Whether it is differentiated; the others run without autograd."""
    weights: Literal["online", "average"] = "online"
    """The weights in training, or their moving average, which is never trained."""
    precision: Literal["compute", "fp32"] = "compute"
    """The network's compute dtype, or that of its weights throughout."""
    head: Literal["", "v", "uv", "log_variance"] = ""
    """Which heads answer, of a network that has one for v; log_variance: u, and that of its error behind it."""


class Passes:
    """The declared passes of a step, each called once by its name, in order; those without rows are left out.

    Args:
        declared: by name, in order. net: in training. average: of its weights, where a pass asks for it.
        jvp: computes outputs and derivative, `pair_jvp` or `func_jvp`.
    """

    def __init__(
        self, declared: dict[str, Pass], net: nn.Module, average: nn.Module | None = None, *, jvp: Jvp = pair_jvp
    ):
        self._declared, self._jvp = declared, jvp
        self._nets = {"online": net, "average": average}
        self._left = [name for name, each in declared.items() if each.rows > 0]
        self.null_label = net.num_classes
        """The label of the null class."""

    def __call__(
        self,
        name: str,
        z: Tensor,
        r: Tensor,
        t: Tensor,
        y: Tensor,
        *told: Tensor,
        tangents: tuple[Tensor | None, ...] | None = None,
    ) -> Any:
        """Make a pass of the network: what ``net(z, r, t, y, *told)`` returns, and with tangents du/dt behind it.

        Args:
            z, r, t, y, told: as the network takes them, of all rows of the pass.
            tangents: the direction (z_dot, r_dot, t_dot), of the rows that have a derivative; an entry None is zero.

        Raises:
            ValueError: for a pass that was not declared, or not now, or with other rows or tangents.
        """
        if not self._left or self._left[0] != name:
            wanted = f"{self._left[0]!r} of {list(self._declared)}" if self._left else "no further pass"
            raise ValueError(f"pass: got {name!r}, wanted {wanted}; declare passes in the order in which they are made")
        self._left = self._left[1:]
        declared = self._declared[name]
        if len(z) != declared.rows or (tangents is None and declared.tangents != 0):
            raise ValueError(f"pass {name!r}: got {len(z)} rows, wanted {declared}; declare what is called")
        if tangents is not None and any(x is not None and len(x) != declared.tangents for x in tangents):
            raise ValueError(f"pass {name!r}: got tangents of other rows, wanted {declared}; they are its last ones")
        if declared.trained:
            return self._run(name, (z, r, t), (y, *told), tangents)
        with torch.no_grad():
            return self._run(name, (z, r, t), (y, *told), tangents)

    def _run(self, name: str, primals: tuple, others: tuple, tangents: tuple | None):
        declared = self._declared[name]
        net, options = self._nets[declared.weights], {}
        if declared.head:
            options["head"] = declared.head
        if declared.precision == "fp32":
            options["dtype"] = net.dtype
        if tangents is None:
            return net(*primals, *others, **options)
        return self._jvp(net, primals, tangents, others, declared.rows - declared.tangents, **options)

    def finish(self) -> None:
        """Raise ValueError unless all declared passes have been made: what was counted was not computed."""
        if self._left:
            raise ValueError(f"passes: {self._left} were declared and not made; declare those that are made")
