"""Attention of a packed projection: bit for bit that of its q, k and v, forward and backward; and one gradient."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from attention_inputs import HARD, make_inputs, plain_attention
from dual_properties import Case, DualProperties, assert_as_exact
from tolerances import relative_error
from torch._dynamo.testing import AotEagerAndRecordGraphs

from meanflow_kernels import attention, attention_jvp, attention_qkv, attention_qkv_jvp, linear
from meanflow_kernels.attention import backends
from meanflow_kernels.attention.backends import force_backend, serves
from meanflow_kernels.attention.config import Backend
from meanflow_kernels.routing import Route, force_route

FP32, FP16 = torch.float32, torch.float16
ops = torch.ops.meanflow_kernels
#             why             B  L    H  D   dtype
REGIMES = {
    "a single token": (2, 1, 2, 32, FP32),
    "whole tiles": (1, 128, 1, 64, FP16),
    "whole tiles, split head dim": (1, 64, 2, 72, FP16),
    "ragged, split head dim": (2, 33, 2, 72, FP16),
    "ragged, ieee": (3, 17, 2, 24, FP32),
    "widest head dim": (1, 33, 1, 128, FP16),
}
SHAPE = REGIMES["ragged, ieee"]


def _inputs(shape, device, kind="iid"):
    """qkv and qkv_dot."""
    batch, length, heads, head_dim, dtype = shape
    inputs = make_inputs(kind, batch, length, length, heads, head_dim, dtype, device)
    return tuple(torch.stack(x, 2) for x in inputs)


def _packed(qkv, qkv_dot, do, start=None):
    """o, o_dot and the gradient."""
    leaf = qkv.detach().requires_grad_()
    o, o_dot = attention_qkv_jvp((leaf,), (qkv_dot,), tangent_start=start)
    return o, o_dot.detach(), *torch.autograd.grad(o, leaf, do)


def _apart(qkv, qkv_dot, do, start=None):
    """The same from q, k and v, whose gradients are stacked."""
    leaves = tuple(x.detach().requires_grad_() for x in qkv.unbind(2))
    o, o_dot = attention_jvp(leaves, qkv_dot.unbind(2), tangent_start=start)
    return o, o_dot.detach(), torch.stack(torch.autograd.grad(o, leaves, do), 2)


def _contained(qkv, bias):
    """A projection that contains a bias, in plain torch."""
    return qkv + (bias - bias.detach()).to(qkv.dtype).unflatten(-1, qkv.shape[2:])


def _bias(qkv):
    return torch.randn(qkv[0, 0].numel(), device=qkv.device).to(qkv.dtype)


WITH_BIAS = Case(
    op=lambda qkv, bias: attention_qkv(qkv, bias=bias),
    op_jvp=lambda primals, tangents, bias, **options: attention_qkv_jvp(primals, tangents, bias=bias, **options),
    plain=lambda qkv, bias=None: plain_attention(*(qkv if bias is None else _contained(qkv, bias)).unbind(2)),
    make=lambda device: tuple((x,) for x in _inputs(SHAPE, device)),
)
"""The bias follows the projection."""


class TestProperties(DualProperties):
    case = Case(
        op=attention_qkv,
        op_jvp=attention_qkv_jvp,
        plain=lambda qkv: plain_attention(*qkv.unbind(2)),
        make=lambda device: tuple((x,) for x in _inputs(SHAPE, device)),
    )
    tolerance = 1e-6  # as attention's


@pytest.mark.parametrize("start", (0, 1))
def test_a_slice_has_the_bits_of_that_of_q_k_and_v(each_route, device, start):
    qkv, qkv_dot = _inputs(SHAPE, device)
    do, some = torch.randn_like(qkv[:, :, 0]), qkv_dot[start : start + 1]
    for x, y in zip(_packed(qkv, some, do, start), _apart(qkv, some, do, start), strict=True):
        assert torch.equal(x, y)
    assert torch.equal(attention_qkv(qkv), attention(*qkv.unbind(2)))


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("shape", REGIMES.values(), ids=REGIMES.keys())
def test_as_exact_as_plain_torch(kernel_route, shape, device):
    qkv, qkv_dot = _inputs(shape, device)
    with force_backend(backward=Backend.TRITON):
        assert_as_exact(WITH_BIAS, (qkv,), (qkv_dot[-1:],), extra=(_bias(qkv),), start=shape[0] - 1)


@pytest.mark.usefixtures("poisoned_empty")
def test_keys_are_indifferent_to_their_bias(kernel_route, device):
    qkv, bias = torch.randn(2, 33, 3, 2, 72, device=device).half(), torch.randn(432, device=device, requires_grad=True)
    do = torch.randn_like(qkv[:, :, 0])
    with force_backend(backward=Backend.TRITON):
        (dbias,) = torch.autograd.grad(attention_qkv(qkv, bias=bias), bias, do)
    # summed in fp32, in the bias's dtype
    _, dk_sum, dv_sum = dbias.view(3, 2, 72)
    assert dbias.dtype == FP32 and not dk_sum.any()
    assert torch.allclose(dv_sum, do.float().sum((0, 1)), rtol=1e-6, atol=1e-5)


def test_the_bias_is_summed_where_a_gradient_is_asked_of_it(kernel_route, device, monkeypatch):
    (qkv, qkv_dot), bias = _inputs(SHAPE, device), torch.randn(144, device=device)
    asked, run = [], backends.run

    def spy(launches, *args):
        if launches is backends._backward_launches:
            asked.append(args[-1] is not None)
        return run(launches, *args)

    monkeypatch.setattr(backends, "run", spy)
    for some in (None, bias, bias.half().requires_grad_()):
        attention_qkv_jvp((qkv.requires_grad_(),), (qkv_dot,), bias=some)[0].sum().backward()
    assert asked == [False, False, True] and some.grad.dtype == FP16


def test_the_bias_carries_its_tangent_in_forward_mode(each_route, device):
    (qkv, qkv_dot), (bias, bias_dot) = _inputs(SHAPE, device), torch.randn(2, 144, device=device)
    for some in (qkv_dot, None):
        with forward_ad.dual_level():
            qkv_dual = qkv if some is None else forward_ad.make_dual(qkv, some)
            bias_dual = forward_ad.make_dual(bias, bias_dot)
            o_dot = forward_ad.unpack_dual(attention_qkv(qkv_dual, bias=bias_dual)).tangent
            with pytest.raises(ValueError, match="^bias: got a tensor with a forward-mode tangent"):
                attention_qkv_jvp((qkv,), (qkv_dot,), bias=bias_dual)
        wanted = bias_dot.view(3, 2, 24).expand_as(qkv) + (0 if some is None else some)
        assert relative_error(o_dot, attention_qkv_jvp((qkv,), (wanted,))[1]) < 1e-6


def test_a_projection_hands_its_bias_over(each_route, device):
    x, weight, bias = (
        torch.randn(2, 17, 48, device=device),
        torch.randn(144, 48, device=device) * 48**-0.5,  # scores near 1: a one-hot softmax amplifies rounding
        torch.randn(144, device=device),
    )
    leaves = tuple(a.requires_grad_() for a in (x, weight, bias))

    def loss(x, weight, bias, handed):
        qkv = linear(x, weight, bias.detach() if handed else bias).unflatten(-1, (3, 2, 24))
        return attention_qkv(qkv, bias=bias if handed else None).square().sum()

    wanted = torch.autograd.grad(loss(*leaves, False), leaves)
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        for found, exact in zip(torch.autograd.grad(call(*leaves, True), leaves), wanted, strict=True):
            assert relative_error(found, exact) < 2e-6


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("compiled", (False, True), ids=("eager", "compiled"))
@pytest.mark.parametrize("regime", ("whole tiles, split head dim", "ragged, split head dim", "ragged, ieee"))
def test_the_gradient_is_that_of_q_k_and_v_to_the_last_bit(kernel_route, regime, compiled, device):
    shape = REGIMES[regime]
    qkv, qkv_dot = _inputs(shape, device)
    do = torch.randn_like(qkv[:, :, 0])

    def run(qkv):
        o, o_dot = attention_qkv_jvp((qkv,), (qkv_dot,))
        return o, o_dot.detach()

    leaf = qkv.clone().requires_grad_()
    with force_backend(backward=Backend.TRITON):
        o, o_dot = (torch.compile(run, fullgraph=True) if compiled else run)(leaf)
        (dqkv,) = torch.autograd.grad(o, leaf, do)
        expected = _apart(qkv, qkv_dot, do)
    assert dqkv.is_contiguous()
    assert all(torch.equal(x, y) for x, y in zip((o, o_dot, dqkv), expected, strict=True))


@pytest.mark.usefixtures("poisoned_empty")
def test_a_projection_of_any_strides(kernel_route, device):
    qkv, qkv_dot = _inputs(SHAPE, device)
    do = torch.randn_like(qkv[:, :, 0])
    expected = _packed(qkv, qkv_dot, do)
    # heads first, and off the 16-byte grid
    for spread in (
        lambda x: x.permute(2, 0, 3, 1, 4).contiguous().permute(1, 3, 0, 2, 4),
        lambda x: torch.nn.functional.pad(x, (1, 0))[..., 1:],
    ):
        for x, y in zip(_packed(spread(qkv), spread(qkv_dot), do), expected, strict=True):
            assert torch.equal(x, y) and x.is_contiguous()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ("iid", *HARD))
@pytest.mark.parametrize("head_dim", (64, 72))
@pytest.mark.parametrize("backward", Backend)
def test_every_backward_in_bf16(backward, head_dim, kind):
    qkv, qkv_dot = _inputs((4, 256, 4, head_dim, torch.bfloat16), "cuda", kind)
    if not serves(backward, *qkv.unbind(2)[:2]):
        pytest.skip(f"{backward.value} is not installed or does not serve this GPU")
    with force_backend(backward=backward):
        assert_as_exact(WITH_BIAS, (qkv,), (qkv_dot[2:],), extra=(_bias(qkv),), start=2)
        if backward is Backend.TRITON:
            do = torch.randn_like(qkv[:, :, 0])
            for x, y in zip(_packed(qkv, qkv_dot, do), _apart(qkv, qkv_dot, do), strict=True):
                assert torch.equal(x, y)


@pytest.mark.parametrize("attend", ("qkv", "q, k and v"))
def test_nothing_moves_the_gradients_in_a_compiled_backward(kernel_route, attend, device):
    x, weight = torch.randn(2, 17, 48, device=device), torch.randn(144, 48, device=device, requires_grad=True)

    def loss(weight):
        qkv = torch.nn.functional.linear(x, weight).unflatten(-1, (3, 2, 24))
        o = attention_qkv(qkv) if attend == "qkv" else attention(*(qkv[:, :, i] for i in range(3)))
        return o.square().sum()

    graphs = AotEagerAndRecordGraphs()
    torch.compile(loss, fullgraph=True, backend=graphs)(weight).backward()
    (backward,) = graphs.bw_graphs
    called = [node.target.name() for node in backward.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    # from the kernel to the product with x
    after = called[next(i for i, name in enumerate(called) if name.startswith("meanflow_kernels::")) + 1 :]
    views = {"aten::view", "aten::_unsafe_view", "aten::permute", "aten::t", "aten::mm"}
    assert (set(after) <= views) == (attend == "qkv"), after


def test_one_tensor_is_saved_for_three(kernel_route, device):
    (qkv, qkv_dot), saved = _inputs(SHAPE, device), []
    bias = _bias(qkv).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        o, _ = attention_qkv_jvp((qkv.requires_grad_(),), (qkv_dot,), bias=bias)
    assert sorted(tuple(x.shape) for x in saved) == sorted([tuple(qkv.shape), tuple(o.shape), (3, 2, 17)])
    assert any(x.data_ptr() == qkv.data_ptr() for x in saved)


def test_scale(each_route, device):
    qkv, qkv_dot = _inputs(SHAPE, device)
    o, o_dot = attention_qkv_jvp((qkv,), (qkv_dot,), scale=0.5)
    o_same, o_dot_same = attention_jvp(qkv.unbind(2), qkv_dot.unbind(2), scale=0.5)
    assert torch.equal(o, o_same) and torch.equal(o_dot, o_dot_same)
    assert torch.equal(attention_qkv(qkv, scale=0.5), attention(*qkv.unbind(2), scale=0.5))
    with pytest.raises(ValueError, match="^scale: got .*, wanted .*; "):
        attention_qkv(qkv, scale=0.0)


QKV = torch.zeros(2, 5, 3, 2, 16)
BAD = ("text", QKV[0], QKV[:, :, :2], QKV[:, :0], QKV.double(), QKV[..., :12])
BAD_BIASES = ("text", torch.zeros(32), torch.zeros(3, 2, 16), torch.zeros(96).double(), torch.zeros(96).int())


@pytest.mark.parametrize("qkv", BAD)
def test_a_wrong_projection_raises(kernel_route, qkv):
    for call in (lambda: attention_qkv(qkv), lambda: attention_qkv_jvp((qkv,), (QKV,))):
        with pytest.raises(ValueError, match="^qkv: got .*, wanted .*; "):
            call()


@pytest.mark.parametrize("bias", BAD_BIASES, ids=str)
def test_a_wrong_bias_raises(kernel_route, bias):
    for call in (attention_qkv, lambda qkv, bias: attention_qkv_jvp((qkv,), (QKV,), bias=bias)):
        with pytest.raises(ValueError, match=r"^bias: got .*, wanted .*; "):
            call(QKV, bias=bias)


def test_an_empty_batch(each_route, device):
    qkv, bias = QKV[:0].to(device).requires_grad_(), torch.ones(96, device=device, requires_grad=True)
    o, o_dot = attention_qkv_jvp((qkv,), (qkv.detach(),), bias=bias)
    assert o.shape == o_dot.shape == (0, 5, 2, 16)
    o.sum().backward()
    assert not bias.grad.any()


def test_the_reference_by_gradcheck():
    with force_route(Route.REFERENCE):
        qkv, _ = _inputs((2, 3, 2, 4, torch.float64), "cpu")
        assert torch.autograd.gradcheck(attention_qkv, qkv.requires_grad_(), check_forward_ad=True)
