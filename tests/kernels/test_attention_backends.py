"""The choice of an implementation of attention, and how each library's forward is called."""

import sys
import types

import pytest
import torch
from attention_inputs import make_inputs, plain_attention
from tolerances import assert_error, largest_error, relative_error

from meanflow_kernels import attention, attention_qkv
from meanflow_kernels.attention import backends
from meanflow_kernels.attention.backends import attention_backward, attention_forward, force_backend, serves
from meanflow_kernels.attention.config import BACKWARD, BESIDE, FORWARD, Backend, preferred
from meanflow_kernels.attention.reference import attention_ref

FP32, FP16 = torch.float32, torch.float16
Q = torch.zeros(2, 256, 3, 72)


@pytest.fixture
def strict():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def all_serve(monkeypatch):
    """Every library serves an sm_90 GPU, which the CPU's tensors are taken for."""
    monkeypatch.setattr(backends, "serves", lambda backend, q, k: True)
    monkeypatch.setattr(backends, "arch_of", lambda device: 90)


@pytest.mark.parametrize("arch", (0, 80, 86, 90, 100, 120))
@pytest.mark.parametrize("table", (FORWARD, BESIDE, BACKWARD), ids=("forward", "beside", "backward"))
def test_every_call_has_a_row(table, arch):
    for head_dim in range(16, 129, 8):
        for length in (1, 64, 256, 65536):
            assert Backend.TRITON not in preferred(table, arch, head_dim, length)[:-1]


def test_the_first_that_serves_is_chosen(monkeypatch):
    order = preferred(BACKWARD, 90, 72, 256)
    monkeypatch.setattr(backends, "arch_of", lambda device: 90)
    for n in range(len(order) + 1):
        monkeypatch.setattr(backends, "serves", lambda backend, q, k, n=n: backend in order[n:])
        assert backends._choose(BACKWARD, Q, Q) is (*order, Backend.TRITON)[n]


@pytest.mark.parametrize("head_dim", (64, 72, 128))
def test_a_deterministic_backward_is_chosen_where_torch_asks_for_it(all_serve, strict, head_dim):
    q = Q.new_zeros(2, 256, 3, head_dim)
    assert backends._choose(BACKWARD, q, q) in (Backend.FLASH, Backend.FLASH_ATTN, Backend.TRITON)
    for backend in (Backend.CUDNN, Backend.XFORMERS):
        with (
            force_backend(backward=backend),
            pytest.raises(ValueError, match="^force_backend: got .* under torch.use_deterministic_algorithms"),
        ):
            backends._choose(BACKWARD, q, q)
        with force_backend(forward=backend):
            assert backends._choose(FORWARD, q, q) is backend


def test_scopes_nest():
    with force_backend(forward=Backend.CUDNN, backward=Backend.FLASH):
        with force_backend(backward=Backend.TRITON):
            assert (backends._forced.forward, backends._forced.backward) == (Backend.CUDNN, Backend.TRITON)
        assert backends._forced.backward is Backend.FLASH
    assert backends._forced.forward is backends._forced.backward is None
    with pytest.raises(ValueError, match="^forward: got 'cudnn', wanted a Backend"), force_backend(forward="cudnn"):
        pass


@pytest.mark.parametrize("backend", (Backend.CUDNN, Backend.FLASH))
def test_torch_takes_the_calls(all_serve, backend):
    # shapes and signatures alone: meta tensors
    q, k, v = torch.empty(2, 256, 3, 4, 72, dtype=torch.bfloat16, device="meta").unbind(2)
    with force_backend(forward=backend, backward=backend):
        o, lse = attention_forward(q, k, v, 0.1, FORWARD)
        gradients = attention_backward(o, q, k, v, o, lse, 0.1)
    assert o.shape == q.shape and o.is_contiguous()
    assert lse.shape == (2, 4, 256) and lse.is_contiguous() and lse.dtype == FP32
    assert all(x.shape == q.shape and x.is_contiguous() for x in gradients)


def _flash_attn_in_torch() -> types.ModuleType:
    """flash-attn's two functions as mathematics."""
    module = types.ModuleType("flash_attn.flash_attn_interface")

    def forward(q, k, v, dropout_p, softmax_scale, causal, *, window_size_left, window_size_right, **options):
        assert (dropout_p, causal, window_size_left, window_size_right) == (0.0, False, -1, -1)
        return *attention_ref(q, k, v, scale=softmax_scale), None, None

    def backward(do, q, k, v, o, lse, dq, dk, dv, *, softmax_scale, deterministic, **options):
        assert deterministic == torch.are_deterministic_algorithms_enabled()
        # autograd does not reach into an operator
        p = (softmax_scale * torch.einsum("bmhd,bnhd->bhmn", q, k) - lse[..., None]).exp()
        ds = p * torch.einsum("bmhd,bnhd->bhmn", do, v)
        ds = softmax_scale * (ds - p * ds.sum(-1, keepdim=True))
        dq.copy_(torch.einsum("bhmn,bnhd->bmhd", ds, k))
        dk.copy_(torch.einsum("bhmn,bmhd->bnhd", ds, q))
        dv.copy_(torch.einsum("bhmn,bmhd->bnhd", p, do))

    module._flash_attn_forward, module._flash_attn_backward = forward, backward
    return module


@pytest.fixture
def flash_attn(all_serve, monkeypatch):
    """flash-attn is installed."""
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", _flash_attn_in_torch())


@pytest.mark.parametrize(("length", "head_dim"), ((17, 24), (131, 72)))
def test_a_librarys_gradients_are_packed_and_summed_in_one_pass(kernel_route, flash_attn, device, length, head_dim):
    qkv = torch.randn(2, length, 3, 2, head_dim, device=device).requires_grad_()
    bias = torch.randn(6 * head_dim, device=device).half().requires_grad_()
    leaves = tuple(x.detach().requires_grad_() for x in qkv.unbind(2))
    with force_backend(forward=Backend.FLASH_ATTN, backward=Backend.FLASH_ATTN):
        dqkv, dbias = torch.autograd.grad(attention_qkv(qkv, bias=bias).square().sum(), (qkv, bias))
        (alone,) = torch.autograd.grad(attention_qkv(qkv).square().sum(), qkv)
        gradients = torch.autograd.grad(attention(*leaves).square().sum(), leaves)
    assert dqkv.is_contiguous() and torch.equal(dqkv, torch.stack(gradients, 2)) and torch.equal(alone, dqkv)
    exact = dqkv.double().sum((0, 1)).flatten()
    assert dbias.dtype == torch.float16 and largest_error(dbias, exact) <= 2**-11 * exact.abs().max()


def test_a_library_serves_the_op(kernel_route, flash_attn, strict, device):
    primals, tangents = make_inputs("iid", 3, 17, 33, 2, 24, FP32, device)
    some = tuple(x[1:2] for x in tangents)
    leaves = tuple(x.clone().requires_grad_() for x in primals)
    expected = torch.autograd.grad(attention_ref(*leaves, scale=24**-0.5)[0].sum(), leaves)
    with force_backend(forward=Backend.FLASH_ATTN, backward=Backend.FLASH_ATTN):
        o = attention(*leaves)
        gradients = torch.autograd.grad(o.sum(), leaves)
        o_jvp, lse, _ = torch.ops.meanflow_kernels.attention_jvp(*primals, *some, 24**-0.5, 1)
    o_exact, lse_exact = attention_ref(*primals, scale=24**-0.5)
    assert relative_error(o, o_exact) == 0 and relative_error(o_jvp, o_exact) < 1e-6
    assert relative_error(lse, lse_exact) < 1e-6
    # the samples beside the tangent's are the library's
    assert torch.equal(o_jvp[[0, 2]], o_exact[[0, 2]])
    for gradient, x in zip(gradients, expected, strict=True):
        assert relative_error(gradient, x) < 1e-6


def _forced(backend: Backend, q: torch.Tensor):
    if not serves(backend, q, q):
        pytest.skip(f"{backend.value} is not installed or does not serve this GPU")
    return force_backend(forward=backend)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.bfloat16, FP16), ids=("bf16", "fp16"))
@pytest.mark.parametrize(("m", "n"), ((256, 256), (255, 77), (1, 2)))
@pytest.mark.parametrize("head_dim", (64, 72, 128))
@pytest.mark.parametrize("backend", Backend)
def test_every_forward(backend, head_dim, m, n, dtype):
    primals, tangents = make_inputs("iid", 3, m, n, 4, head_dim, dtype, "cuda")
    some = tuple(x[1:2] for x in tangents)
    exact, lse_exact = attention_ref(*(x.double() for x in primals), scale=head_dim**-0.5)
    with _forced(backend, primals[0]):
        o, lse = torch.ops.meanflow_kernels.attention(*primals, head_dim**-0.5)
        o_beside, lse_beside, _ = torch.ops.meanflow_kernels.attention_jvp(*primals, *some, head_dim**-0.5, 1)
    assert o.is_contiguous() and lse.is_contiguous()
    plain = plain_attention(*primals)
    for name, x, y in (("o", o, lse), ("o beside a tangent", o_beside, lse_beside)):
        assert_error(x, exact, plain, name)
        assert (y - lse_exact).abs().max() < 1e-2


@pytest.mark.gpu
def test_a_dimension_that_is_expanded(backend=Backend.CUDNN):
    q = torch.randn(2, 256, 1, 72, device="cuda", dtype=torch.bfloat16).expand(-1, -1, 4, -1)
    with _forced(backend, q), force_backend(backward=backend):
        leaf = q.detach().requires_grad_()
        o = attention(leaf, leaf, leaf)
        (gradient,) = torch.autograd.grad(o, leaf, torch.ones_like(o))
    assert_error(o, plain_attention(*[q.double()] * 3), plain_attention(q, q, q), "o")
    assert gradient.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", (64, 72))
def test_the_backward_repeats_its_bits_where_torch_asks_for_it(strict, head_dim):
    (q, k, v), _ = make_inputs("iid", 4, 1024, 1024, 4, head_dim, torch.bfloat16, "cuda")
    leaves = tuple(x.detach().requires_grad_() for x in (q, k, v))
    o = attention(*leaves)
    first = torch.autograd.grad(o, leaves, torch.ones_like(o), retain_graph=True)
    for _ in range(4):
        again = torch.autograd.grad(o, leaves, torch.ones_like(o), retain_graph=True)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
