"""Routes and the two doors: no tangent is ever dropped, eager or compiled, and none is differentiated."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from attention_inputs import make_inputs, plain_attention
from tolerances import relative_error
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import meanflow_kernels
from benchmarks.workloads import plain as plain_ops
from meanflow_kernels import attention, attention_jvp
from meanflow_kernels.attention.reference import attention_ref
from meanflow_kernels.dual import TangentGradientError, forbid_gradient
from meanflow_kernels.routing import Route, force_route, runs_kernel

SHAPE = (2, 17, 17, 2, 24, torch.float32)


class Block(nn.Module):
    """A user's transformer block in plain torch but for its attention."""

    def __init__(self, width: int, heads: int, attend):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.heads, self.attend = heads, attend

    def forward(self, x):  # (B, L, C)
        # torch.compile of torch.func.jvp fails in nn.LayerNorm
        h = x - x.mean(-1, keepdim=True)
        h = h * (h.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).unbind(2)  # (B, L, H, D)
        return x + self.out(self.attend(q, k, v).flatten(2)).tanh()


def _network(attend, depth, device):
    torch.manual_seed(0)
    return nn.Sequential(*(Block(48, 2, attend) for _ in range(depth))).to(device)


def _step(network, x, x_dot):
    """A MeanFlow step in miniature: the loss of the primal against a target made of the detached tangent."""
    y, y_dot = torch.func.jvp(network, (x,), (x_dot,))
    y_dot = y_dot.detach()
    return (y - (x - y_dot)).square().mean(), y_dot


def _forward_ad(network, x, x_dot):
    with forward_ad.dual_level():
        y = forward_ad.unpack_dual(network(forward_ad.make_dual(x, x_dot)))
    return y.primal.square().mean(), y.tangent.detach()


@pytest.mark.parametrize(
    ("step", "backend", "depth"),
    [
        (_step, None, 2),
        (_step, "aot_eager", 1),
        pytest.param(_step, "inductor", 1, marks=pytest.mark.slow),
        (_forward_ad, None, 2),
        (_forward_ad, "aot_eager", 1),
    ],
)
def test_a_users_transformer_equals_plain_torch(each_route, step, backend, depth, device):
    ours, plain = _network(attention, depth, device), _network(plain_attention, depth, device)
    x, x_dot = torch.randn(2, 2, 17, 48, device=device)
    run = step if backend is None else torch.compile(step, fullgraph=True, backend=backend)
    loss, y_dot = run(ours, x, x_dot)
    loss.backward()
    loss_plain, y_dot_plain = step(plain, x, x_dot)
    loss_plain.backward()
    assert abs(loss - loss_plain) < 1e-5 * loss_plain
    assert relative_error(y_dot, y_dot_plain) < 1e-5
    for p, p_plain in zip(ours.parameters(), plain.parameters(), strict=True):
        assert relative_error(p.grad, p_plain.grad) < 2e-4 or p_plain.grad.norm() < 1e-6


PLAIN_OPS = SimpleNamespace(
    adaln=plain_ops.adaln,
    attention=plain_ops.attention,
    bias_gelu=plain_ops.bias_gelu,
    gate_adaln=plain_ops.gate_adaln,
    gate_rmsnorm=plain_ops.gate_rmsnorm,
    linear=F.linear,
    qk_rope=plain_ops.qk_rope,
    rmsnorm=plain_ops.rmsnorm,
    silu=F.silu,
    swiglu=plain_ops.swiglu,
    timestep_embedding=plain_ops.timestep_embedding,
)


class Transformer(nn.Module):
    """A user's conditioned transformer block that calls every operator of ``ops``."""

    def __init__(self, ops, width: int = 48, heads: int = 2):
        super().__init__()
        self.ops, self.heads, self.width = ops, heads, width
        shapes = {"mod": (6 * width, width), "qkv": (3 * width, width), "out": (width, width), "up": (2 * width, width)}
        shapes |= {"down": (width, 2 * width), "w2": (width, width), "gate": (width,), "norm": (width,)}
        shapes |= {"q_norm": (width // heads,), "k_norm": (width // heads,)}
        self.weights = nn.ParameterDict({name: 0.2 * torch.randn(shape) for name, shape in shapes.items()})
        self.bias = nn.Parameter(torch.randn(2 * width))

    def forward(self, x, t):  # (B, L, C), (B,)
        ops, w = self.ops, self.weights
        c = ops.linear(ops.silu(ops.timestep_embedding(t, self.width)), w["mod"])
        shift, scale, gate, shift2, scale2, gate2 = c.chunk(6, -1)
        q, k, v = ops.linear(ops.adaln(x, shift, scale), w["qkv"]).unflatten(-1, (3, self.heads, -1)).unbind(2)
        y = ops.linear(ops.attention(q, k, v).flatten(2), w["out"])
        x, h = ops.gate_adaln(x, y, gate, shift2, scale2)
        x = x + gate2[:, None] * ops.linear(ops.bias_gelu(ops.linear(h, w["up"]), self.bias), w["down"])
        # and improved MeanFlow's block, with the same weights
        qkv = ops.linear(ops.rmsnorm(x, 1 + w["norm"]), w["qkv"]).unflatten(-1, (3, self.heads, -1))
        qk, v = qkv.split((2, 1), 2)
        angles = torch.arange(x.shape[1] * qkv.shape[-1] // 2, device=x.device).view(x.shape[1], -1) / 9
        q, k = ops.qk_rope(qk, 1 + w["q_norm"], 1 + w["k_norm"], angles.cos(), angles.sin())
        y = ops.linear(ops.attention(q, k, v.squeeze(2)).flatten(2), w["out"])
        x, h = ops.gate_rmsnorm(x, y, w["gate"], 1 + w["norm"])
        return x + ops.linear(ops.swiglu(ops.linear(h, w["up"])), w["w2"])


@pytest.mark.parametrize(
    "backend", (None, *(pytest.param(name, marks=pytest.mark.slow) for name in ("aot_eager", "inductor")))
)
def test_a_users_transformer_of_all_operators_equals_plain_torch(each_route, backend, device):
    ours, plain = Transformer(meanflow_kernels).to(device), Transformer(PLAIN_OPS).to(device)
    ours.load_state_dict(plain.state_dict())
    x, x_dot = torch.randn(2, 3, 5, 48, device=device)
    t, t_dot = torch.rand(3, device=device), torch.ones(3, device=device)

    def step(network, x, x_dot, t, t_dot):
        y, y_dot = torch.func.jvp(network, (x, t), (x_dot, t_dot))
        y_dot = y_dot.detach()
        return (y - y_dot).square().mean(), y_dot

    run = step if backend is None else torch.compile(step, fullgraph=True, backend=backend)
    loss, y_dot = run(ours, x, x_dot, t, t_dot)
    loss.backward()
    loss_plain, y_dot_plain = step(plain, x, x_dot, t, t_dot)
    loss_plain.backward()
    assert abs(loss - loss_plain) < 1e-4 * loss_plain
    assert relative_error(y_dot, y_dot_plain) < 1e-4
    for (name, p), p_plain in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert relative_error(p.grad, p_plain.grad) < 1e-3, name


@pytest.mark.parametrize(
    ("backend", "tracked"),
    [("aot_eager", False), ("aot_eager", True), pytest.param("inductor", True, marks=pytest.mark.slow)],
    ids=("primal alone", "with gradient", "with gradient, inductor"),
)
def test_the_explicit_pair_compiles(each_route, backend, tracked, device):
    primals, tangents = make_inputs("iid", *SHAPE, device)
    if tracked:
        primals = tuple(x.clone().requires_grad_() for x in primals)

    def step(primals, tangents):
        o, o_dot = attention_jvp(primals, tangents, tangent_start=1)
        return o, o_dot.detach()

    some = tuple(x[1:] for x in tangents)
    for found, expected in zip(
        torch.compile(step, fullgraph=True, backend=backend)(primals, some), step(primals, some), strict=True
    ):
        assert relative_error(found, expected) < 1e-6


def test_another_batch_size_does_not_recompile_more_than_once(each_route, device):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda p, t: attention_jvp(p, t), fullgraph=True, backend=counter)
    for batch in (2, 3, 5, 8):
        primals, tangents = make_inputs("iid", batch, *SHAPE[1:], device)
        assert relative_error(compiled(primals, tangents)[1], attention_jvp(primals, tangents)[1]) < 1e-6
    assert counter.frame_count <= 2


def _differentiates_the_tangent(primals, tangents):
    o, o_dot = attention_jvp(primals, tangents)
    return (o + o_dot.square()).sum()


@pytest.mark.parametrize("tracked", ("primal", "tangent"))
def test_a_gradient_through_the_tangent_raises(each_route, tracked, device):
    primals, tangents = make_inputs("iid", *SHAPE, device)
    (primals if tracked == "primal" else tangents)[1].requires_grad_()
    with pytest.raises(TangentGradientError, match="Detach the tangent"):
        _differentiates_the_tangent(primals, tangents).backward()
    torch._dynamo.reset()
    with pytest.raises(Exception, match="a gradient was asked for through a tangent.*Detach the tangent"):
        torch.compile(_differentiates_the_tangent, fullgraph=True, backend="aot_eager")(primals, tangents)


def test_a_returned_tangent_that_requires_grad_raises_at_compile_time(each_route, device):
    primals, tangents = make_inputs("iid", *SHAPE, device)
    primals[0].requires_grad_()
    with pytest.raises(Exception, match="a gradient was asked for through a tangent.*Detach the tangent"):
        torch.compile(attention_jvp, fullgraph=True, backend="aot_eager")(primals, tangents)


@pytest.mark.parametrize("backend", (None, "aot_eager"))
def test_a_consumed_tangent_works(each_route, backend, device):
    primals, tangents = make_inputs("iid", *SHAPE, device)
    leaves = tuple(x.clone().requires_grad_() for x in primals)

    def step(primals, tangents):
        # the tangent of the first op feeds the second and ends in a detached target
        o, o_dot = attention_jvp(primals, tangents)
        o, o_dot = attention_jvp((o, *primals[1:]), (o_dot, *tangents[1:]))
        return (o - o_dot.detach()).square().mean()

    def plain_step(primals, tangents):
        twice = lambda q, k, v: plain_attention(plain_attention(q, k, v), k, v)  # noqa: E731
        o, o_dot = torch.func.jvp(twice, primals, tangents)
        return (o - o_dot.detach()).square().mean()

    run = step if backend is None else torch.compile(step, fullgraph=True, backend=backend)
    for found, expected in zip(
        torch.autograd.grad(run(leaves, tangents), leaves),
        torch.autograd.grad(plain_step(leaves, tangents), leaves),
        strict=True,
    ):
        assert relative_error(found, expected) < 1e-5


def test_the_guard_is_a_view_and_nothing_without_a_gradient():
    x_dot, x = torch.randn(3), torch.randn(3, requires_grad=True)
    guarded = forbid_gradient(x_dot, None, x)
    assert guarded.requires_grad and guarded.data_ptr() == x_dot.data_ptr()
    assert forbid_gradient(x_dot, x.detach()) is x_dot
    with torch.no_grad():
        assert forbid_gradient(x_dot, x) is x_dot


def _nested(f, primals, tangents):
    return torch.func.jvp(lambda *x: torch.func.jvp(f, x, tangents)[1], primals, tangents)[1]


def _gradient_of_tangent(f, primals, tangents):
    return torch.func.grad(lambda q: torch.func.jvp(f, (q, *primals[1:]), tangents)[1].sum())(primals[0])


def _jvp_of_vmap(f, primals, tangents):
    return torch.func.jvp(torch.func.vmap(lambda *x: f(*(y[None] for y in x))[0]), primals, tangents)[1]


@pytest.mark.parametrize("transform", (_nested, _gradient_of_tangent, _jvp_of_vmap))
def test_nested_transforms_raise_on_both_routes_and_are_right_by_the_reference(each_route, transform, device):
    primals, tangents = make_inputs("iid", *SHAPE, device)
    primals, tangents = (tuple(x.contiguous() for x in xs) for xs in (primals, tangents))
    with pytest.raises(RuntimeError, match="it would lose a derivative.*reference.py, plain torch, which carries any"):
        transform(attention, primals, tangents)
    if each_route is Route.REFERENCE:
        expected = transform(plain_attention, primals, tangents)
        reference = lambda *x: attention_ref(*x, scale=primals[0].shape[-1] ** -0.5)[0]  # noqa: E731
        assert relative_error(transform(reference, primals, tangents), expected) < 1e-5


def test_vmap_of_jvp_is_right(each_route, device):
    primals, _ = make_inputs("iid", *SHAPE, device)
    jacobian = torch.func.jacfwd(lambda s: attention(primals[0] * s, *primals[1:]).sum())(torch.ones((), device=device))
    expected = torch.func.jacfwd(lambda s: plain_attention(primals[0] * s, *primals[1:]).sum())(
        torch.ones((), device=device)
    )
    assert abs(jacobian - expected) < 1e-4 * abs(expected) + 1e-4


def test_an_explicit_pair_of_duals_raises(each_route, device):
    primals, tangents = make_inputs("iid", *SHAPE, device)
    primals, tangents = (tuple(x.contiguous() for x in xs) for xs in (primals, tangents))
    with pytest.raises(ValueError, match="^q: got a forward-mode dual tensor"):
        torch.func.jvp(lambda q: attention_jvp((q, *primals[1:]), tangents), primals[:1], tangents[:1])
    with pytest.raises(ValueError, match="^k_dot: got a forward-mode dual tensor"):
        torch.func.jvp(lambda x: attention_jvp(primals, (tangents[0], x, None)), tangents[1:2], tangents[1:2])


def test_routes():
    cpu = torch.zeros(1)
    assert not runs_kernel(cpu)
    with force_route(Route.TRITON):
        assert runs_kernel(cpu)
        with force_route(Route.REFERENCE):
            assert not runs_kernel(cpu)
        assert runs_kernel(cpu)
    assert not runs_kernel(cpu)
    with pytest.raises(ValueError, match="^route: got 'triton', wanted a Route"), force_route("triton"):
        pass
    with pytest.raises(ZeroDivisionError), force_route(Route.TRITON):
        1 / 0  # noqa: B018
    assert not runs_kernel(cpu)


def test_a_forced_route_holds_under_compile_and_recompiles():
    def step(x):
        with force_route(Route.TRITON):
            inside = runs_kernel(x)
        return x + 1 if runs_kernel(x) else x - 1, x + 1 if inside else x - 1

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    x = torch.zeros(2)
    assert [y[0].item() for y in compiled(x)] == [-1, 1]
    with force_route(Route.TRITON):
        assert [y[0].item() for y in compiled(x)] == [1, 1]
    assert [y[0].item() for y in compiled(x)] == [-1, 1]


@pytest.mark.parametrize("kind", ("meta", "fake"))
def test_meta_and_fake_tensors_go_through_the_registered_op(kernel_route, kind):
    with FakeTensorMode() if kind == "fake" else torch.device("meta"):
        q, k, v = torch.empty(2, 17, 3, 4, 72, dtype=torch.bfloat16).unbind(2)
        o, o_dot = attention_jvp((q.requires_grad_(), k, v), (q.detach()[:1], None, v[:1]), tangent_start=1)
        (dq,) = torch.autograd.grad(o.sum(), q)
    assert o.shape == dq.shape == (2, 17, 4, 72) and o_dot.shape == (1, 17, 4, 72)
    assert (
        o.dtype == o_dot.dtype == torch.bfloat16 and o.is_contiguous() and "attention_jvp" in type(o.grad_fn).__name__
    )


def _python(code: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    return result.stdout + result.stderr


def test_without_triton_everything_imports_and_the_reference_runs():
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name.split(".")[0] == "triton" else real(name, *a)
import torch, meanflow_kernels
from meanflow_kernels.routing import Route, force_route
x = torch.randn(1, 5, 2, 16)
print(meanflow_kernels.attention_jvp((x, x, x), (x, None, None))[1].shape)
try:
    with force_route(Route.TRITON):
        pass
except ValueError as error:
    print(error)
print("triton imported:", "triton" in sys.modules)
"""
    output = _python(code)
    assert (
        "torch.Size([1, 5, 2, 16])" in output
        and "Triton is not installed" in output
        and "triton imported: False" in output
    ), output
