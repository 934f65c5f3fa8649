"""The primal's backward: the Triton kernels and every library back-end against fp64, and the references' derivatives
by gradcheck.
"""

import pytest
import torch
from attention_inputs import HARD, make_inputs, plain_attention, scores_in_order
from tolerances import assert_error, relative_error

from meanflow_kernels import attention, attention_jvp
from meanflow_kernels.attention.backends import force_backend, serves
from meanflow_kernels.attention.config import Backend
from meanflow_kernels.attention.reference import attention_ref
from meanflow_kernels.routing import Route, force_route

pytestmark = pytest.mark.usefixtures("poisoned_empty")
FP32, FP16 = torch.float32, torch.float16
REGIMES = {
    "two keys": (2, 17, 2, 1, 64, FP32),
    "one query": (1, 1, 65, 2, 32, FP16),
    "ragged, ieee": (1, 33, 17, 2, 24, FP32),
    "imagenet, B/2": (1, 256, 256, 1, 64, FP16),
    "imagenet, XL/2": (1, 255, 256, 1, 72, FP16),
    "split head dim": (1, 17, 65, 1, 96, FP16),
    "widest head dim": (2, 65, 17, 1, 128, FP16),
    "long keys": (1, 17, 1024, 1, 64, FP16),
}


def _gradients(function, primals, do):
    leaves = tuple(x.detach().requires_grad_() for x in primals)
    return torch.autograd.grad(function(*leaves), leaves, do)


def _check(primals, function=attention, plains=(plain_attention,)):
    do = torch.randn(primals[0].shape, device=primals[0].device).to(primals[0].dtype)
    exact = _gradients(plain_attention, tuple(x.double() for x in primals), do.double())
    found = _gradients(function, primals, do)
    for name, x, x_exact, *each in zip(
        ("dq", "dk", "dv"), found, exact, *(_gradients(plain, primals, do) for plain in plains), strict=True
    ):
        assert_error(x, x_exact, tuple(each), name)


@pytest.mark.parametrize("shape", REGIMES.values(), ids=REGIMES.keys())
def test_error_is_at_most_twice_plain_torch(kernel_route, shape, device):
    with force_backend(backward=Backend.TRITON):
        _check(make_inputs("iid", *shape, device)[0])


@pytest.mark.parametrize("kind", HARD[:2])
def test_error_on_hard_inputs(kernel_route, kind, device):
    with force_backend(backward=Backend.TRITON):
        _check(make_inputs(kind, 1, 65, 65, 1, 72, FP16, device)[0])


def test_scores_far_below_zero(kernel_route, device):
    # exp(0 - lse) overflows where a padded key is not masked: e^98. One column brings all scores there alike. Shifting
    # all columns spreads them too, the softmax is one-hot, and ds = p (do v^T - delta) mostly what rounding left: with
    # +10 and -10 everywhere dk of any fp32 attention is off by 2e-4 (mean of 40 seeds; 5e-3 at worst), by more or less
    # as q k^T happens to be summed. The column is q's more than k's: dq sums ds k, where ds k of one column is zero
    (q, k, v), _ = make_inputs("iid", 8, 17, 17, 1, 32, FP32, device)
    q[..., 0], k[..., 0] = 256.0, -2.25
    with force_backend(backward=Backend.TRITON):
        _check((q, k, v), plains=(plain_attention, scores_in_order))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.bfloat16, FP16), ids=("bf16", "fp16"))
@pytest.mark.parametrize("head_dim", (64, 72, 128))
@pytest.mark.parametrize("backward", Backend)
def test_every_backend(backward, head_dim, dtype):
    primals, _ = make_inputs("iid", 2, 256, 256, 4, head_dim, dtype, "cuda")
    if not serves(backward, *primals[:2]):
        pytest.skip(f"{backward.value} is not installed or does not serve this GPU")
    with force_backend(backward=backward):
        _check(primals)


def test_the_dual_op_has_the_plain_ops_gradient(each_route, device):
    primals, tangents = make_inputs("iid", 2, 17, 33, 2, 24, FP32, device)
    do = torch.randn_like(primals[0])
    expected = _gradients(attention, primals, do)
    found = _gradients(lambda *x: attention_jvp(x, tangents)[0], primals, do)
    some = _gradients(lambda *x: attention_jvp(x, (None, tangents[1][1:], None), tangent_start=1)[0], primals, do)
    for a, b, c in zip(expected, found, some, strict=True):
        assert relative_error(b, a) < 2e-6 and relative_error(c, a) < 2e-6


def test_a_cotangent_of_any_strides(kernel_route, device):
    primals, _ = make_inputs("iid", 1, 17, 17, 2, 24, FP32, device)
    leaves = tuple(x.detach().requires_grad_() for x in primals)
    expanded = torch.autograd.grad(attention(*leaves).sum(), leaves)
    dense = torch.autograd.grad(attention(*leaves), leaves, torch.ones_like(primals[0]))
    for a, b in zip(expanded, dense, strict=True):
        assert torch.equal(a, b)


def test_only_primal_things_are_saved(kernel_route, device):
    primals, tangents = make_inputs("iid", 2, 17, 17, 2, 24, FP32, device)
    leaves = tuple(x.detach().requires_grad_() for x in primals)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        o, _ = attention_jvp(leaves, tangents)
    lse = (2, 2, 17)
    assert sorted(tuple(x.shape) for x in saved) == sorted([*(tuple(x.shape) for x in (*leaves, o)), lse])
    assert not {x.data_ptr() for x in saved} & {x.data_ptr() for x in tangents}


def test_a_gradient_through_lse_raises(kernel_route, device):
    (q, k, v), _ = make_inputs("iid", 1, 17, 17, 1, 32, FP32, device)
    _, lse = torch.ops.meanflow_kernels.attention(q.requires_grad_(), k, v, 1.0)
    with pytest.raises(RuntimeError, match="lse"):
        lse.sum().backward()


def test_a_backend_that_does_not_serve_raises(kernel_route, device):
    # flash takes no fp32
    q = torch.randn(1, 5, 1, 16, device=device, requires_grad=True)
    with force_backend(backward=Backend.FLASH), pytest.raises(ValueError, match="^force_backend: got .*, wanted"):
        attention(q, q, q).sum().backward()
    with pytest.raises(ValueError, match="^backward: got 'flash'"), force_backend(backward="flash"):
        pass


def test_the_reference_by_gradcheck():
    with force_route(Route.REFERENCE):
        primals, tangents = make_inputs("iid", 2, 3, 5, 2, 4, torch.float64, "cpu")
        leaves = tuple(x.clone().requires_grad_() for x in primals)
        assert torch.autograd.gradcheck(attention, leaves, check_forward_ad=True)
        # the explicit tangent against autograd's of the same mathematics
        o, o_dot = attention_jvp(primals, tangents)
        o_auto, o_dot_auto = torch.func.jvp(lambda *x: attention_ref(*x, scale=4**-0.5)[0], primals, tangents)
        assert relative_error(o, o_auto) == 0 and relative_error(o_dot, o_dot_auto) < 1e-14
