"""linear: both doors against fp64, and what autograd keeps."""

import pytest
import torch
from dual_properties import Case, DualProperties, assert_as_exact
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from meanflow_kernels import linear, linear_jvp
from meanflow_kernels.dual import TangentGradientError
from meanflow_kernels.linear import chunks

F16, F32, BF16 = torch.float16, torch.float32, torch.bfloat16
K, C = 24, 40


def _parameters(device="cpu", dtype=F32):
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(C, K, generator=generator) / K**0.5, torch.randn(C, generator=generator)
    return weight.to(device, dtype), bias.to(device, dtype)


def _jvp(primals, tangents, weight, bias=None, *, tangent_start=None):
    return linear_jvp(primals, tangents, weight, bias)


FREE = Case(op=linear, op_jvp=_jvp, plain=torch.nn.functional.linear, make=lambda device: None)


class TestProperties(DualProperties):
    weight, bias = _parameters("cuda" if torch.cuda.is_available() else "cpu")
    case = Case(
        op=lambda x, w=weight, b=bias: linear(x, w, b),
        op_jvp=lambda primals, tangents, w=weight, b=bias, **options: _jvp(primals, tangents, w, b, **options),
        plain=lambda x, w=weight, b=bias: torch.nn.functional.linear(x, w, b),
        make=lambda device: ((torch.randn(3, 5, K, device=device),), (torch.randn(3, 5, K, device=device),)),
    )

    # the library may choose another product for fewer rows, which rounds otherwise
    tolerance = 1e-6

    # it does not matter to a linear which rows the tangent belongs to, nor is there a route to choose
    def test_a_tangent_that_does_not_match_raises(self, device):
        x, weight = torch.zeros(2, 3, K), _parameters()[0]
        for x_dot in (x.half(), x[None], torch.zeros(3, 3, K), torch.zeros(2, 4, K), x.to("meta")):
            with pytest.raises(ValueError, match="^(x_dot|tangent_start): got .*, wanted .*; "):
                linear_jvp((x,), (x_dot,), weight)


DTYPES = (F32, F16, pytest.param(BF16, marks=pytest.mark.gpu))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", (3, 1))
def test_as_exact_as_plain_torch(device, dtype, n):
    weight, bias = _parameters(device, dtype)
    x, x_dot = (torch.randn(size, 5, K, device=device).to(dtype) for size in (3, n))
    assert_as_exact(FREE, (x,), (x_dot,), extra=(weight, bias), start=0)


def test_saves_input_and_weight_of_the_primal_alone(device):
    weight, bias = (p.requires_grad_() for p in _parameters(device))
    x, x_dot = torch.randn(2, 3, 5, K, device=device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        y, _ = linear_jvp((x,), (x_dot,), weight, bias)
    assert sum(a.numel() for a in saved) <= x.numel() + weight.numel()
    assert not any(a.data_ptr() == x_dot.data_ptr() for a in saved)
    y.sum().backward()
    assert weight.grad is not None and bias.grad is not None


def test_a_gradient_through_the_tangent_by_the_weight_raises(device):
    weight, _ = _parameters(device)
    x, x_dot = torch.randn(2, 3, 5, K, device=device)
    _, y_dot = linear_jvp((x,), (x_dot,), weight.requires_grad_())
    with pytest.raises(TangentGradientError, match="Detach the tangent"):
        y_dot.sum().backward()


@pytest.mark.parametrize("present", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)], ids=("x", "weight", "bias", "all"))
def test_forward_mode_carries_every_tangent(device, present):
    inputs = (torch.randn(3, 5, K, device=device), *_parameters(device))
    tangents = tuple(p * torch.randn_like(x) for p, x in zip(present, inputs, strict=True))
    found = torch.func.jvp(linear, inputs, tangents)[1]
    assert torch.allclose(found, torch.func.jvp(torch.nn.functional.linear, inputs, tangents)[1], atol=1e-6)


def test_a_dual_weight_of_an_explicit_pair_raises(device):
    weight, bias = _parameters(device)
    x = torch.randn(3, K, device=device)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(weight, weight)
        with pytest.raises(ValueError, match="^weight: got a forward-mode dual"):
            linear_jvp((x,), (x,), dual, bias)


def test_autocast_is_followed(device):
    weight, bias = (p.requires_grad_() for p in _parameters(device))
    x, x_dot = torch.randn(2, 3, 5, K, device=device)
    with torch.autocast(device, torch.bfloat16):
        y, y_dot = linear_jvp((x,), (x_dot,), weight, bias)
    assert y.dtype == y_dot.dtype == BF16
    y.float().sum().backward()
    assert weight.grad.dtype == F32


X, W, B = torch.zeros(2, 3, K), torch.zeros(C, K), torch.zeros(C)
BAD = [
    ("x", (X[..., 1:], W, B)),
    ("x", ("text", W, B)),
    ("weight", (X, W[0], B)),
    ("weight", (X, W.half(), B)),
    ("bias", (X, W, B[1:])),
    ("bias", (X, W, B.to("meta"))),
]


@pytest.mark.parametrize(("name", "arguments"), BAD)
def test_wrong_arguments_raise(name, arguments):
    x, weight, bias = arguments
    for call in (lambda: linear(x, weight, bias), lambda: linear_jvp((x,), (x,), weight, bias)):
        with pytest.raises(ValueError, match=rf"^{name}: got .*, wanted .*; "):
            call()


def test_chunks_are_views_whose_gradients_are_joined(device):
    x, dy = torch.randn(2, 3, 12, device=device)
    x.requires_grad_()

    def gradient(cut):
        # the last is not used: its gradient is zero
        return torch.autograd.grad(sum((k + 1) * (part * dy[:, :3]).sum() for k, part in enumerate(cut(x)[:3])), x)[0]

    assert [part.data_ptr() for part in chunks(x, 4)] == [part.data_ptr() for part in x.chunk(4, -1)]
    expected, graphs = gradient(lambda x: x.chunk(4, -1)), []
    assert torch.equal(gradient(lambda x: chunks(x, 4)), expected)
    backend = aot_autograd(fw_compiler=lambda graph, _: graphs.append(graph) or make_boxed_func(graph.forward))
    torch.compile(lambda x: sum(chunks(x, 4)[:2]), fullgraph=True, backend=backend)(x).sum().backward()
    called = [node.target for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    assert torch.ops.meanflow_kernels.join.default in called and torch.ops.aten.cat.default not in called
    assert torch.equal(x.grad, torch.cat([torch.ones(3, 6), torch.zeros(3, 6)], -1).to(device))
    with pytest.raises(ValueError, match="^parts: got 5, wanted a divisor of x's width 12; "):
        chunks(x, 5)
