"""Both routes tell the same: what runs on a CPU runs on a GPU, and what is refused there is refused here."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from tolerances import relative_error

import meanflow_kernels as ops
from benchmarks.workloads import plain
from meanflow_kernels import routing
from meanflow_kernels.dual import TangentGradientError
from meanflow_kernels.routing import Route, force_route


def embedding(t):
    return ops.timestep_embedding(t, 8)


def halves(x):
    """Parameters that are no inputs: they have no tangents."""
    return (torch.full_like(x[0, 0], 0.5),) * 2


def rotation(qk):
    """Weights of the norms, cos and sin: no inputs either."""
    angles = torch.arange(4.0, device=qk.device) / torch.arange(1.0, 6.0, device=qk.device)[:, None]
    return torch.full_like(angles[0].repeat(2), 0.5), torch.ones_like(angles[0].repeat(2)), angles.cos(), angles.sin()


ROW, VECTOR, QUERIES = (3, 5, 32), (3, 32), (3, 5, 2, 2, 8)
# an operator, the same in plain torch, and the shapes of its inputs
OPS = {
    "adaln": (ops.adaln, plain.adaln, (ROW, VECTOR, VECTOR)),
    "attention": (ops.attention, plain.attention, ((3, 5, 2, 16),) * 3),
    "attention_qkv": (ops.attention_qkv, lambda qkv: plain.attention(*qkv.unbind(2)), ((3, 5, 3, 2, 16),)),
    "bias_gelu": (ops.bias_gelu, plain.bias_gelu, (ROW, (32,))),
    "gate_adaln": (ops.gate_adaln, plain.gate_adaln, (ROW, ROW, VECTOR, VECTOR, VECTOR)),
    "gate_rmsnorm": (
        lambda x, y: ops.gate_rmsnorm(x, y, *halves(x)),
        lambda x, y: plain.gate_rmsnorm(x, y, *halves(x)),
        (ROW, ROW),
    ),
    "linear": (ops.linear, F.linear, (ROW, (8, 32), (8,))),
    "qk_rope": (lambda qk: ops.qk_rope(qk, *rotation(qk)), lambda qk: plain.qk_rope(qk, *rotation(qk)), (QUERIES,)),
    "rmsnorm": (lambda x: ops.rmsnorm(x, halves(x)[0]), lambda x: plain.rmsnorm(x, halves(x)[0]), (ROW,)),
    "silu": (ops.silu, F.silu, (ROW,)),
    "swiglu": (ops.swiglu, plain.swiglu, (ROW,)),
    "timestep_embedding": (embedding, lambda t: plain.timestep_embedding(t, 8), ((3,),)),
}
# linear is torch's own product on both
KERNELS = [name for name in OPS if name != "linear"]
each_op = pytest.mark.parametrize("name", OPS)
each_kernel = pytest.mark.parametrize("name", KERNELS)


def make(name, device, dtype=torch.float32, **options):
    return tuple(torch.randn(shape, device=device).to(dtype).requires_grad_(**options) for shape in OPS[name][2])


def summed(out) -> torch.Tensor:
    return sum(y.square().sum() for y in (out if isinstance(out, tuple) else (out,)))


def pairs(name, device):
    return tuple(tuple(torch.randn(shape, device=device) for shape in OPS[name][2]) for _ in range(2))


@each_op
@pytest.mark.parametrize("dtype", (torch.int64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn), ids=str)
def test_numbers_that_have_no_derivative_are_refused(each_route, device, name, dtype):
    op, _, shapes = OPS[name]
    with pytest.raises(
        ValueError, match=r"^(x|t|q|qk|qkv): got torch\..*, wanted bfloat16, float16, float32 or float64; "
    ):
        op(*(torch.ones(shape, device=device).to(dtype) for shape in shapes))


@each_op
def test_a_dual_of_zero_dims_keeps_its_dtype(each_route, device, name):
    # torch makes the tangent of a number times a zero-dim dual fp64
    op, same, _ = OPS[name]
    primals = [x.detach() for x in make(name, device)]

    def scaled(f, half):
        return lambda s: f(*(x + (half * s).expand(x.shape) for x in primals))

    s, one = torch.tensor(0.7, device=device), torch.tensor(1.0, device=device)
    out, out_dot = torch.func.jvp(scaled(op, 0.5), (s,), (one,))
    wanted = torch.func.jvp(scaled(same, torch.tensor(0.5, device=device)), (s,), (one,))
    for found, exact in zip(_flat(out, out_dot), _flat(*wanted), strict=True):
        assert found.dtype == torch.float32 and relative_error(found, exact) < 1e-4


def _flat(*outs):
    return [y for out in outs for y in (out if isinstance(out, tuple) else (out,))]


@each_op
def test_tangents_of_stride_zero(each_route, device, name):
    op, same, _ = OPS[name]
    primals, _ = pairs(name, device)
    tangents = tuple(torch.randn(x.shape[-1:], device=device).expand(x.shape) for x in primals)
    found, exact = (_flat(*torch.func.jvp(f, primals, tangents)) for f in (op, same))
    for a, b in zip(found, exact, strict=True):
        assert (a - b).abs().max() < 1e-4 * (1 + b.abs().max())


@each_op
def test_primals_and_cotangents_of_stride_zero(each_route, device, name):
    op, same, shapes = OPS[name]
    rows = [torch.randn(shape[-1:], device=device) for shape in shapes]
    grads = []
    for f in (op, same):
        leaves = [x.clone().requires_grad_() for x in rows]
        sum(y.sum() for y in _flat(f(*(x.expand(shape) for x, shape in zip(leaves, shapes, strict=True))))).backward()
        grads.append([x.grad for x in leaves])
    for a, b in zip(*grads, strict=True):
        assert (a - b).abs().max() < 1e-4 * (1 + b.abs().max())


def test_a_scope_inside_a_compiled_region_holds_there_alone(device):
    graphs = []

    def region(x):
        with force_route(Route.REFERENCE):
            inside = ops.silu(x)
        return inside, ops.silu(x)

    def record(graph, _):
        graphs.append(graph)
        return graph

    x = torch.randn(3, 8, device=device)
    with force_route(Route.TRITON):
        compiled = torch.compile(region, fullgraph=True, backend=record)
        for y in compiled(x):
            assert relative_error(y, F.silu(x)) < 1e-6
    (graph,) = graphs
    calls = [str(node.target) for node in graph.graph.nodes if "meanflow_kernels" in str(node.target)]
    assert calls == ["meanflow_kernels.silu.default"]
    # and the region leaves the choice as it was
    assert routing.forced.route is None


@each_kernel
def test_a_gradient_through_the_tangent_of_a_dual_raises(each_route, device, name):
    primals, tangents = pairs(name, device)
    leaves = tuple(x.requires_grad_() for x in primals)
    _, out_dot = torch.func.jvp(OPS[name][0], leaves, tangents)
    with pytest.raises(TangentGradientError, match="Detach the tangent"):
        summed(out_dot).backward()
    # the primal's is there
    out, _ = torch.func.jvp(OPS[name][0], leaves, tangents)
    assert all(g.isfinite().all() for g in torch.autograd.grad(summed(out), leaves))


@each_kernel
def test_a_gradient_of_a_jvp_raises(each_route, device, name):
    primals, tangents = pairs(name, device)

    def loss(x):
        return summed(torch.func.jvp(OPS[name][0], (x, *primals[1:]), tangents)[0])

    with pytest.raises(RuntimeError, match="Grad > Jvp.*it would lose a derivative"):
        torch.func.grad(loss)(primals[0])


@each_kernel
def test_a_second_derivative_raises(each_route, device, name):
    op, same, _ = OPS[name]
    leaves = make(name, device)
    cotangents = [torch.randn_like(y) for y in _flat(op(*leaves))]
    first = torch.autograd.grad(_flat(op(*leaves)), leaves, cotangents, create_graph=True)
    exact = torch.autograd.grad(_flat(same(*leaves)), leaves, cotangents)
    assert all(relative_error(a.detach(), b) < 1e-4 for a, b in zip(first, exact, strict=True))
    with pytest.raises(RuntimeError, match="a second derivative was asked for through an operator's gradient"):
        sum(g.square().sum() for g in first).backward()


@pytest.mark.parametrize("f", (
    lambda q: ops.attention(q, q, q), lambda q: ops.attention_jvp((q, q, q), (q, None, None)),
    lambda q: torch.func.jvp(ops.attention, (q, q, q), (q, q, q)),
), ids=("plain", "pair", "dual"))  # fmt: skip
def test_the_interpreter_refuses_bf16(f):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: nothing is interpreted")
    q = torch.randn(1, 8, 2, 16).bfloat16()
    with force_route(Route.TRITON), pytest.raises(ValueError, match="^q: got torch.bfloat16 on cpu, wanted float16"):
        f(q)
    with force_route(Route.REFERENCE):
        f(q)


def test_heads_before_tokens_are_warned_of_once(each_route, device):
    q = torch.randn(1, 3, 21 + len(each_route.value), 16, device=device)  # (B, heads, tokens, D)
    with pytest.warns(UserWarning, match=r"attention: got 3 tokens of \d+ heads, wanted \(B, tokens, heads, D\)"):
        ops.attention(q, q, q)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ops.attention(q, q, q)
        ops.attention_jvp((q, q, q), (q, None, None))
        one = q.transpose(1, 2)
        ops.attention(one, one, one)
        # one query of many keys is no mistake
        ops.attention(one[:, :1], one, one)
