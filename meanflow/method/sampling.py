"""Images from noise: z_r = z_t - (t - r) u(z_t, r, t) (Eq. 12), from t = 1 to r = 0 in one step or several."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..draws import Draws, Purpose
from ..errors import require
from .graph import Graph
from .views import View


def even_times(num_steps: int) -> tuple[float, ...]:
    """The times of num_steps equal steps from 1 to 0. (The official default schedule always takes one step.)"""
    require(num_steps >= 1, "steps", num_steps, "a positive whole number", "1 is MeanFlow's one-step generation")
    return tuple(1 - i / num_steps for i in range(num_steps)) + (0.0,)


def check_times(times: Sequence[float]) -> tuple[float, ...]:
    """Return the schedule as floats.

    Raises:
        UserError: unless it falls strictly within [0, 1].
    """
    times = tuple(float(t) for t in times)
    falls = len(times) >= 2 and all(a > b for a, b in zip(times, times[1:], strict=False))
    within = falls and times[0] <= 1 and times[-1] >= 0
    require(within, "times", times, "at least two falling times in [0, 1]", "for instance 1 0.5 0")
    return times


def take_step(net: nn.Module, z: Tensor, t: Tensor, r: Tensor, y: Tensor, *guidance: Tensor) -> Tensor:
    """Compute z_r (B, channels, height, width) from z_t, labels y and times t, r (B,) by one call of net (Eq. 12).

    guidance: (B,) each, what the network is told of it behind the labels.
    """
    return z - (t - r)[:, None, None, None] * net(z, r, t, y, *guidance)


class Sampler:
    """:func:`sample` for many batches, compiled or captured once for each of their shapes.

    Args:
        net: the network; in ``net.to(torch.bfloat16)`` matrix products and the residual stream are bf16, the latents
            stay in the noise's dtype. Once captured, its weights may change but not move.
        compile: torch.compile the step, for up to torch's limit of eight shapes of a network.
        cuda_graph: replay the step as a CUDA graph, for small batches, where a GPU waits for the host. One graph serves
            every number of steps, because the times are inputs.

    A diffusers pipeline is compiled in diffusers' way, ``pipeline.transformer.compile(fullgraph=True, dynamic=False)``,
    and captured by ``mode="reduce-overhead"`` beside these; its decoder by ``pipeline.vae.decoder.compile(...)``.
    """

    def __init__(self, net: nn.Module, *, compile: bool = False, cuda_graph: bool = False):
        self.net, self.cuda_graph = net, cuda_graph
        self._step = torch.compile(take_step, fullgraph=True, dynamic=False) if compile else take_step
        self._graphs: dict[tuple, Graph] = {}
        self._pool = None

    @torch.no_grad()
    def __call__(
        self, noise: Tensor, y: Tensor, times: Sequence[float] = (1.0, 0.0), guidance: Sequence[Tensor | float] = ()
    ) -> Tensor:
        """Draw latents as :func:`sample` does.

        Raises:
            UserError: for times that do not fall within [0, 1], and for a CUDA graph without a GPU.
        """
        z = noise

        def of_all(value: Tensor | float) -> Tensor:
            return value if isinstance(value, Tensor) else torch.full_like(z[:, 0, 0, 0], value)

        told = [of_all(value) for value in guidance]
        for t, r in zip(times, check_times(times)[1:], strict=False):
            z = self._run((z, of_all(t), of_all(r), y, *told))
        # the next call overwrites what a graph returns
        return z.clone() if self.cuda_graph else z

    def _run(self, inputs: tuple[Tensor, ...]) -> Tensor:
        if not self.cuda_graph:
            return self._step(self.net, *inputs)
        z, _, _, y, *guidance = inputs
        require(z.is_cuda, "cuda_graph", True, f"a GPU to capture on, not {z.device}", "leave it out, or move to a GPU")
        key = (z.shape, z.dtype, y.dtype, len(guidance))
        if key not in self._graphs:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            # eagerly first, to compile and load the kernels, which a capture must not do
            self._step(self.net, *inputs)
            self._graphs[key] = Graph(lambda held: self._step(self.net, *held), inputs, self._pool)
        return self._graphs[key](inputs)


def sample(
    net: nn.Module,
    noise: Tensor,
    y: Tensor,
    times: Sequence[float] = (1.0, 0.0),
    guidance: Sequence[Tensor | float] = (),
) -> Tensor:
    """Draw latents (B, channels, height, width) from noise of the same shape and labels y (B,).

    Args:
        times: the schedule, falling from 1 to 0; one evaluation of the network between each two.
        guidance: what a network that is told of its guidance gets, numbers or (B,) each: omega, and where it begins and
            ends (`meanflow.method.guidance.sampling_guidance`).
    """
    return Sampler(net)(noise, y, times, guidance)


def sample_anew(
    sampler: Sampler, noise: Tensor, y: Tensor, times: Sequence[float] = (1.0, 0.0), renoise: Sequence[Tensor] = ()
) -> Tensor:
    """Draw latents as consistency models do: each evaluation goes to the data, which then get new noise.

        x = z - t u(z, 0, t),  z = (1 - t') x + t' e'

    Args:
        sampler: of a network; its steps go from a time to 0.
        times: the schedule, falling from 1 to 0.
        renoise: e' of each evaluation after the first, like noise.
    """
    first, *others, last = check_times(times)
    require(last == 0, "times", tuple(times), "falling to 0", "data are there")
    wanted = f"{len(others)}, of the evaluations after the first"
    require(len(renoise) == len(others), "renoise", len(renoise), wanted, "draw one for each")
    x = sampler(noise, y, (first, 0.0))
    for t, e in zip(others, renoise, strict=True):
        x = sampler((1 - t) * x + t * e, y, (t, 0.0))
    return x


def generate(
    net: nn.Module,
    draws: Draws,
    shape: tuple[int, ...],
    y: Tensor,
    times: Sequence[float] = (1.0, 0.0),
    guidance: Sequence[Tensor | float] = (),
) -> Tensor:
    """Draw latents (B, *shape) for labels y (B,) as the network's objective samples, all noise by the draws.

    Args:
        net: see `meanflow.method.views.view_of`. times, guidance: as :func:`sample`.

    Raises:
        UserError: for steps of lengths that the network does not know.
    """
    noise = draws.normal(Purpose.NOISE, shape)
    if not isinstance(net, View):
        return sample(net, noise, y, times, guidance)
    check_levels(times, net.finest_level)
    if not net.renoises:
        return sample(net, noise, y, times, guidance)
    renoise = [draws.normal(Purpose.RENOISE, shape, i) for i in range(len(times) - 2)]
    return sample_anew(Sampler(net), noise, y, times, renoise)


def check_levels(times: Sequence[float], finest: int | None) -> None:
    """Raise UserError unless all steps have lengths 2^-k, k from 0 to finest; None: any will do."""
    if finest is None:
        return
    known = {2.0**-level for level in range(finest + 1)}
    steps = [t - r for t, r in zip(times, times[1:], strict=False)]
    wanted = f"steps of the lengths 1, 1/2 ... 1/{2**finest} that this network has learned"
    require(known.issuperset(steps), "times", tuple(times), wanted, f"take 1, 2, 4 ... {2**finest} even steps")
