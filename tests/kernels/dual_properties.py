"""What every dual operator keeps, whatever the numbers: a test class derives from DualProperties and says of which."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from tolerances import assert_error, relative_error

from meanflow_kernels.dual import TangentGradientError
from meanflow_kernels.routing import Route, force_route

WITHOUT_GRADIENT = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
# with gradients opcheck differentiates every output, the tangent too, which raises by design
WITH_GRADIENT = ("test_schema", "test_autograd_registration", "test_faketensor")


@dataclass(frozen=True)
class Case:
    """An operator as a function of its primals alone."""

    op: Callable
    """op(*primals) -> a tensor or a tuple of them"""
    op_jvp: Callable
    """op_jvp(primals, tangents, tangent_start=None) -> the same, twice"""
    plain: Callable
    """plain(*primals): the same function as an ordinary torch user writes it"""
    make: Callable
    """make(device) -> primals and tangents of three samples, fp32"""


def tensors(out) -> tuple:
    """The results of an operator as a tuple."""
    return out if isinstance(out, tuple) else (out,)


def by_routes(call: Callable) -> tuple:
    """What a call gives on the reference route, and on the kernel route."""
    results = []
    for route in (Route.REFERENCE, Route.TRITON):
        with force_route(route):
            results.append(call())
    return tuple(results)


def assert_routes_agree(call: Callable, sizes: tuple) -> None:
    """Both routes to 2e-6 of ``sizes``, those of the terms that a result is a sum of.

    Both compute in fp32, each in its own order, and are off by a few 2^-24 of those terms. The result may be far
    smaller: of one element it is any number near 0, and relative to it any error.
    """
    for expected, found, size in zip(*by_routes(call), sizes, strict=True):
        assert found.is_contiguous()
        difference, most = (found - expected).norm().item(), 2e-6 * size.norm().item()
        assert difference <= most, f"{difference:.2e} > {most:.2e}"


def strided(layout: str, *xs: torch.Tensor) -> tuple:
    """Tensors (B, L, C) of the same shapes in another layout (the batch expanded: its first sample for all)."""
    if layout == "rows first":
        return tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in xs)
    if layout == "within wider rows":
        return tuple(torch.nn.functional.pad(x, (3, 1))[..., 3:-1] for x in xs)
    if layout == "columns first":
        return tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in xs)
    assert layout == "batch expanded"
    return tuple(x[:1].expand_as(x) for x in xs)


LAYOUTS = ("rows first", "within wider rows", "columns first", "batch expanded")


def assert_as_exact(case: Case, primals, tangents, *, extra=(), start: int | None = None) -> None:
    """Results, tangents and gradients against fp64 on the same rounded inputs, within the error bar of plain torch.

    extra: further differentiable inputs, which follow the primals. start: the tangents belong to samples from start on.
    """
    leaves = tuple(x.detach().clone().requires_grad_() for x in (*primals, *extra))
    primals, extra = leaves[: len(primals)], leaves[len(primals) :]
    out, out_dot = case.op_jvp(primals, tangents, *extra, tangent_start=start)
    cotangents = [torch.randn_like(y) for y in tensors(out)]
    grads = torch.autograd.grad(tensors(out), leaves, cotangents)
    found = (*tensors(out), *tensors(out_dot), *grads)

    def by_plain(dtype):
        def cast(xs):
            return tuple(x.detach().to(dtype or x.dtype) for x in xs)

        inputs = tuple(x.requires_grad_() for x in cast(leaves))
        y = tensors(case.plain(*inputs))
        gradients = torch.autograd.grad(y, inputs, cast(cotangents))
        n = tangents[0].shape[0]
        rows = slice(start or 0, (start or 0) + n)
        some, rest = tuple(x[rows] for x in cast(primals)), cast(extra)
        y_dot = torch.func.jvp(lambda *xs: case.plain(*xs, *rest), some, cast(tangents))[1]
        # on a GPU the tangent of layer_norm is fp32 where its result is not: round it as the next op of a user would
        y_dot = (x_dot.to(x.dtype) for x, x_dot in zip(y, tensors(y_dot), strict=True))
        return [x.detach() for x in (*y, *y_dot, *gradients)]

    counts = {"out": len(cotangents), "out_dot": len(cotangents), "gradient": len(leaves)}
    names = [f"{kind} {i}" for kind, count in counts.items() for i in range(count)]
    for name, ours, exact, plain in zip(names, found, by_plain(torch.float64), by_plain(None), strict=True):
        assert_error(ours.detach(), exact, plain, name)


def assert_one_column(case: Case, make: Callable) -> None:
    """A LayerNorm of one column x: x_hat = 0 whatever x is, so that exactly nothing flows back through it.

    What is left of dx = rstd (g - mean(g)), with rstd = eps^-1/2 = 1000 and g = dy (1 + scale), is rounding: of g,
    where a fused multiply-add takes the unrounded product less its rounded mean; of the larger term, where autograd
    adds the residual's gradient to rstd g before it subtracts. So dx is right to 2^-24 (1000 |g| + |dx|), times two for
    rstd's own rounding and the sum's. The error bar of other widths, 1e-6 of dx, would ask that nothing be rounded at
    all.
    """
    for _ in range(8):
        primals, tangents = make()
        leaves = tuple(x.clone().requires_grad_() for x in primals)
        out, out_dot = (tensors(y) for y in case.op_jvp(leaves, tangents))
        *_, shift, scale = primals
        *_, shift_dot, _ = tangents
        # y = shift, y_dot = shift_dot, but for what rstd leaves of the rounding of x - mean(x): nothing
        assert torch.equal(out[-1], shift[:, None].expand_as(out[-1]))
        assert torch.equal(out_dot[-1], shift_dot[:, None].expand_as(out_dot[-1]))
        cotangents = [torch.randn_like(y) for y in out]
        dx, *others, dshift, dscale = torch.autograd.grad(out, leaves, cotangents)
        # the residual's gradient, where there is one
        residual = sum(cotangents[:-1], torch.zeros_like(dx))
        bar = 2**-23 * (1000 * (cotangents[-1] * (1 + scale[:, None])).abs() + residual.abs())
        assert ((dx - residual).abs() <= bar).all()
        assert relative_error(dshift, cotangents[-1].sum(1)) < 1e-6 and dscale.abs().max() == 0
        if others:
            # of x + gate y
            y, gate = primals[1:3]
            dy, dgate = others
            assert relative_error(dy, gate[:, None] * dx) < 1e-6
            most = (y.abs() * bar).sum(1) + 2**-22 * (y * dx).abs().sum(1)
            assert ((dgate - (y * residual).sum(1)).abs() <= most).all()


@pytest.mark.usefixtures("poisoned_empty")
class DualProperties:
    """The property tests; a subclass sets `case`."""

    case: Case
    tolerance: float = 0.0
    """Relative error at which results are the same: 0 where a sample's have the same bits whatever is beside it."""

    def _pair(self, primals, tangents, **options):
        out, out_dot = self.case.op_jvp(primals, tangents, **options)
        return tensors(out), tensors(out_dot)

    def test_linear_in_the_tangent(self, each_route, device):
        primals, first = self.case.make(device)
        _, second = self.case.make(device)
        mixed = tuple(2 * a - 3 * b for a, b in zip(first, second, strict=True))
        parts = [self._pair(primals, tangents)[1] for tangents in (mixed, first, second)]
        for m, a, b in zip(*parts, strict=True):
            assert relative_error(m, 2 * a - 3 * b) < 2e-6

    def test_zero_in_zero_out(self, each_route, device):
        primals, tangents = self.case.make(device)
        for y_dot in self._pair(primals, tuple(0 * x for x in tangents))[1]:
            assert y_dot.abs().max() == 0
        out, out_dot = self._pair(primals, (None,) * len(primals))
        assert all(y_dot is None for y_dot in out_dot)
        for y, same in zip(out, tensors(self.case.op(*primals)), strict=True):
            assert torch.equal(y, same)

    def test_an_absent_tangent_is_zero(self, each_route, device):
        primals, tangents = self.case.make(device)
        whole = self._pair(primals, tangents)[1]
        for i in range(len(primals)):
            only = tuple(x if i == j else None for j, x in enumerate(tangents))
            others = tuple(None if i == j else x for j, x in enumerate(tangents))
            parts = [self._pair(primals, some)[1] for some in (only, others) if any(x is not None for x in some)]
            for full, *pieces in zip(whole, *parts, strict=True):
                assert relative_error(sum(pieces), full) < 2e-6

    @pytest.mark.parametrize(("start", "n"), [(0, 1), (1, 2), (1, 1)])
    def test_a_slice_of_the_batch_carries_the_tangent(self, each_route, device, start, n):
        primals, tangents = self.case.make(device)
        rows = slice(start, start + n)
        out, out_dot = self._pair(primals, tuple(x[rows] for x in tangents), tangent_start=start)
        full, full_dot = self._pair(primals, tangents)
        for y, y_full, y_dot, y_dot_full in zip(out, full, out_dot, full_dot, strict=True):
            assert relative_error(y, y_full) <= self.tolerance
            assert relative_error(y_dot, y_dot_full[rows]) <= self.tolerance

    def test_primal_of_the_pair_is_that_of_the_plain_op(self, each_route, device):
        primals, tangents = self.case.make(device)
        for y, same in zip(self._pair(primals, tangents)[0], tensors(self.case.op(*primals)), strict=True):
            assert relative_error(y, same) <= self.tolerance

    def test_adjoint(self, each_route, device):
        primals, tangents = self.case.make(device)
        leaves = tuple(x.clone().requires_grad_() for x in primals)
        out, out_dot = self._pair(leaves, tangents)
        ws = [torch.randn_like(y) for y in out]
        gradients = torch.autograd.grad(out, leaves, ws)
        forward = sum((w * y_dot.detach()).sum() for w, y_dot in zip(ws, out_dot, strict=True))
        backward = sum((g * x_dot).sum() for g, x_dot in zip(gradients, tangents, strict=True))
        size = sum(w.norm() * y_dot.detach().norm() for w, y_dot in zip(ws, out_dot, strict=True))
        assert abs(forward - backward) < 1e-5 * size

    def test_deterministic(self, kernel_route, device):
        primals, tangents = self.case.make(device)
        leaves = tuple(x.clone().requires_grad_() for x in primals)

        def run():
            out, out_dot = self._pair(leaves, tangents)
            return *out, *out_dot, *torch.autograd.grad(out, leaves, [torch.ones_like(y) for y in out])

        for first, second in zip(run(), run(), strict=True):
            assert torch.equal(first, second)

    def test_forward_mode_ad_carries_the_tangent(self, each_route, device):
        primals, tangents = self.case.make(device)
        out, out_dot = self._pair(primals, tangents)
        by_func = torch.func.jvp(self.case.op, primals, tangents)
        with forward_ad.dual_level():
            duals = tensors(self.case.op(*(forward_ad.make_dual(x, v) for x, v in zip(primals, tangents, strict=True))))
            by_level = [tuple(forward_ad.unpack_dual(y)) for y in duals]
        for i, (y, y_dot) in enumerate(zip(out, out_dot, strict=True)):
            for x, x_dot in ((tensors(by_func[0])[i], tensors(by_func[1])[i]), by_level[i]):
                assert relative_error(x, y) < 1e-6 and relative_error(x_dot, y_dot) < 1e-6

    # the networks' tests compile the references of all operators
    @pytest.mark.parametrize("each_route", [pytest.param("reference", marks=pytest.mark.slow), "triton"], indirect=True)
    def test_compiled(self, each_route, device):
        primals, tangents = self.case.make(device)

        def step(*primals):
            # in this order: Dynamo (2.13) cannot open a forward-mode level once unpack_dual has looked for one in vain
            again = torch.func.jvp(self.case.op, tuple(x.detach() for x in primals), tangents)
            out, out_dot = self._pair(primals, tuple(x[1:] for x in tangents), tangent_start=1)
            loss = sum(y.square().mean() for y in out)
            return loss, *(y_dot.detach() for y_dot in out_dot), *(y_dot.detach() for y_dot in tensors(again[1]))

        results = []
        for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
            leaves = tuple(x.clone().requires_grad_() for x in primals)
            loss, *rest = run(*leaves)
            results.append((loss.detach(), *rest, *torch.autograd.grad(loss, leaves)))
        for eager, compiled in zip(*results, strict=True):
            assert eager.norm() > 0 and relative_error(compiled, eager) < 1e-6

    @pytest.mark.slow
    def test_compiled_by_inductor(self, each_route, device):
        primals, tangents = self.case.make(device)

        def step(primals):
            out, out_dot = self._pair(primals, tangents)
            return *out, *(y_dot.detach() for y_dot in out_dot)

        compiled = torch.compile(step, fullgraph=True)
        for found, expected in zip(compiled(primals), step(primals), strict=True):
            assert relative_error(found, expected) < 2e-6

    def _squared_tangent(self, primals, tangents):
        _, out_dot = self._pair(primals, tangents)
        return sum(y_dot.square().sum() for y_dot in out_dot)

    @pytest.mark.parametrize("tracked", ("primal", "tangent"))
    def test_a_gradient_through_the_tangent_raises(self, each_route, device, tracked):
        primals, tangents = self.case.make(device)
        (primals if tracked == "primal" else tangents)[0].requires_grad_()
        with pytest.raises(TangentGradientError, match="Detach the tangent"):
            self._squared_tangent(primals, tangents).backward()

    @pytest.mark.parametrize("tracked", ("primal", pytest.param("tangent", marks=pytest.mark.slow)))
    def test_a_compiled_gradient_through_the_tangent_raises(self, each_route, device, tracked):
        primals, tangents = self.case.make(device)
        (primals if tracked == "primal" else tangents)[0].requires_grad_()
        with pytest.raises(Exception, match="a gradient was asked for through a tangent.*Detach the tangent"):
            torch.compile(self._squared_tangent, fullgraph=True, backend="aot_eager")(primals, tangents)

    def test_tangents_are_not_saved(self, each_route, device):
        primals, tangents = self.case.make(device)
        leaves = tuple(x.clone().requires_grad_() for x in primals)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
            _, out_dot = self._pair(leaves, tangents)
        forbidden = {x.untyped_storage().data_ptr() for x in (*tangents, *out_dot)}
        assert saved and not any(x.untyped_storage().data_ptr() in forbidden for x in saved)

    def test_a_tangent_that_does_not_match_raises(self, each_route, device):
        primals, tangents = self.case.make(device)
        wrong = (
            tangents[0].half(),
            torch.stack([tangents[0], tangents[0]]),
            tangents[0][:2],
            tangents[0].to("meta"),
        )
        for x_dot in wrong:
            with pytest.raises(ValueError, match="_dot: got .*, wanted .*; "):
                self.case.op_jvp(primals, (x_dot, *tangents[1:]))
        for start in (-1, 2):
            with pytest.raises(ValueError, match="tangent_start: got .*, wanted .*; "):
                self.case.op_jvp(primals, tuple(x[:2] for x in tangents), tangent_start=start)
