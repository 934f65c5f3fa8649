"""Trials of the operators: tensors, the launches of a config on them, and the results that are wanted."""

import enum
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from meanflow.model.imf import padded, rope_table
from meanflow_kernels.adaln import op as adaln_op
from meanflow_kernels.attention.backends import attention_forward, attention_qkv_backward, force_backend, serves
from meanflow_kernels.attention.config import FORWARD, AttentionConfig, Backend
from meanflow_kernels.attention.launches import backward_launches, forward_launch
from meanflow_kernels.attention.reference import attention_ref
from meanflow_kernels.bias_gelu import op as bias_gelu_op
from meanflow_kernels.gate_adaln import op as gate_adaln_op
from meanflow_kernels.gate_rmsnorm import op as gate_rmsnorm_op
from meanflow_kernels.launch import Launch
from meanflow_kernels.partials import sum_partials
from meanflow_kernels.qk_rope import op as qk_rope_op
from meanflow_kernels.rmsnorm import op as rmsnorm_op
from meanflow_kernels.swiglu import op as swiglu_op

from ..workloads import plain
from ..workloads.shapes import Shape

EPS = 1e-6


class Unserved(Exception):
    """A library is not installed, or does not serve such a call."""


@dataclass(frozen=True)
class Trial:
    """A subject with its tensors."""

    launches: Callable[[object], Iterable[Launch]]
    """The launches of a config."""
    outputs: tuple[Tensor, ...]
    """The tensors that the launches write."""
    plain: Callable[[bool], list[Tensor]]
    """The results by plain torch: True for fp64 from the same rounded inputs, False for the inputs' own dtype."""
    library: Callable[[enum.Enum], tuple[Tensor, ...]] | None = None
    """The results by a library, which may stand in the place of a config."""
    before: Launch | None = None
    """A launch made before the clock starts; its output stays in the cache."""


def _results(fn: functools.partial, primals: tuple, tangents: tuple, exact: bool) -> list[Tensor]:
    """Outputs, and their tangents on the last samples; ``fn`` without its options where exact."""
    fn, cast = (fn.func, Tensor.double) if exact else (fn, lambda x: x)
    primals, tangents = tuple(map(cast, primals)), tuple(map(cast, tangents))
    out = pytree.tree_leaves(fn(*primals))
    if tangents:
        some = tuple(x[-len(x_dot) :] for x, x_dot in zip(primals, tangents, strict=True))
        out += pytree.tree_leaves(torch.func.jvp(fn, some, tangents)[1])
    return out


def _gradients(fn: functools.partial, inputs: tuple, cotangents: tuple, exact: bool) -> list[Tensor]:
    fn, cast = (fn.func, Tensor.double) if exact else (fn, lambda x: x)
    leaves = [cast(x).detach().requires_grad_() for x in inputs]
    out = pytree.tree_leaves(fn(*leaves))
    return list(torch.autograd.grad(out, leaves, [cast(x) for x in cotangents]))


def _empty(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in tensors)


def _last(tensors: tuple, n: int) -> tuple:
    """The tensors' last n samples; none where n is 0."""
    return tuple(x[-n:] for x in tensors) if n else ()


# --- rows ---


def _row_inputs(shape: Shape, half: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """x in fp32, a branch y, and gate, shift and scale out of one projection, as the training recipe has them."""
    x, y = torch.randn(2, shape.batch, shape.tokens, shape.width, device=device)
    vectors = torch.randn(shape.batch, 6 * shape.width, device=device).to(half).chunk(6, -1)
    return x, y.to(half), *vectors[:3]


def adaln(shape: Shape, half: torch.dtype, device: str, *, n: int) -> Trial:
    x, like_y, _, *vectors = _row_inputs(shape, half, device)
    tangents = _last(_row_inputs(shape, half, device), n)
    tangents = (tangents[0], *tangents[3:]) if n else ()
    (y,), y_dot = _empty(like_y), _empty(*_last((like_y,), n))

    def launches(config):
        dots = (*tangents, *y_dot) if n else (None,) * 4
        return (adaln_op.forward_launch(x, *vectors, y, *dots, shape.batch - n, EPS, config),)

    fn = functools.partial(plain.adaln, out_dtype=half)
    return Trial(launches, (y, *y_dot), functools.partial(_results, fn, (x, *vectors), tangents))


def adaln_bwd(shape: Shape, half: torch.dtype, device: str) -> Trial:
    x, dy, _, *vectors = _row_inputs(shape, half, device)
    outputs = _empty(x, *vectors)

    def launches(config):
        return adaln_op.backward_launches(x, vectors[1], dy, *outputs, EPS, config)

    fn = functools.partial(plain.adaln, out_dtype=half)
    return Trial(launches, outputs, functools.partial(_gradients, fn, (x, *vectors), (dy,)))


def gate_adaln(shape: Shape, half: torch.dtype, device: str, *, n: int) -> Trial:
    primals = _row_inputs(shape, half, device)
    tangents = _last(_row_inputs(shape, half, device), n)
    bias = torch.randn(shape.width, device=device)
    out, out_dot = _empty(*primals[:2]), _empty(*_last(primals[:2], n))

    def launches(config):
        dots = (tangents, out, out_dot) if n else ((None,) * 5, out, (None, None))
        return (gate_adaln_op.forward_launch(primals, bias, *dots, shape.batch - n, EPS, config),)

    fn = functools.partial(plain.gate_adaln, bias=bias, out_dtype=half)
    return Trial(launches, (*out, *out_dot), functools.partial(_results, fn, primals, tangents))


def gate_adaln_bwd(shape: Shape, half: torch.dtype, device: str) -> Trial:
    inputs = x, y, gate, _, scale, bias = (*_row_inputs(shape, half, device), torch.randn(shape.width, device=device))
    dx_out, dh, *_ = _row_inputs(shape, half, device)
    x_out = x + gate[:, None].float() * (y + bias)
    dx, dy, dgate, dshift, dscale, dbias = outputs = _empty(*inputs)

    def launches(config):
        sums = [dshift, dscale, dgate]
        results = (dx, dy, sums, dbias)
        return gate_adaln_op.backward_launches(x_out, y, gate, scale, bias, dx_out, dh, *results, EPS, config)

    fn = functools.partial(plain.gate_adaln, out_dtype=half)
    return Trial(launches, outputs, functools.partial(_gradients, fn, inputs, (dx_out, dh)))


def bias_gelu(shape: Shape, half: torch.dtype, device: str, *, n: int) -> Trial:
    size = (2, shape.batch, shape.tokens, 4 * shape.width)
    x, x_dot = torch.randn(size, device=device).to(half)
    bias = torch.randn(4 * shape.width, device=device).to(half)
    tangents = _last((x_dot,), n)
    y, *y_dot = outputs = _empty(x, *tangents)

    def launches(config):
        dots = (*tangents, *y_dot) if n else (None, None)
        return (bias_gelu_op.forward_launch(x, bias, y, *dots, shape.batch - n, config),)

    # a parameter: it has no tangent
    fn = functools.partial(lambda x: plain.bias_gelu(x, bias.to(x.dtype)))
    return Trial(launches, outputs, functools.partial(_results, fn, (x,), tangents))


def bias_gelu_bwd(shape: Shape, half: torch.dtype, device: str) -> Trial:
    size = (2, shape.batch, shape.tokens, 4 * shape.width)
    x, dy = torch.randn(size, device=device).to(half)
    bias = torch.randn(4 * shape.width, device=device).to(half)
    outputs = _empty(x, bias)

    def launches(config):
        return bias_gelu_op.backward_launches(x, bias, dy, *outputs, config)

    return Trial(launches, outputs, functools.partial(_gradients, functools.partial(plain.bias_gelu), (x, bias), (dy,)))


def _parameters(width: int, count: int, device: str) -> list[Tensor]:
    """Vectors (width,) in fp32, as weights of norms and gates are kept."""
    return list(torch.randn(count, width, device=device))


def rmsnorm(shape: Shape, half: torch.dtype, device: str, *, n: int) -> Trial:
    x, like_y, *_ = _row_inputs(shape, half, device)
    (weight,) = _parameters(shape.width, 1, device)
    tangents = _last(_row_inputs(shape, half, device)[:1], n)
    y, *y_dot = outputs = _empty(like_y, *_last((like_y,), n))

    def launches(config):
        dots = (*tangents, *y_dot) if n else (None, None)
        return (rmsnorm_op.forward_launch(x, weight, y, *dots, shape.batch - n, EPS, config),)

    # a parameter: it has no tangent
    fn = functools.partial(lambda x, **options: plain.rmsnorm(x, weight, **options), out_dtype=half)
    return Trial(launches, outputs, functools.partial(_results, fn, (x,), tangents))


def rmsnorm_bwd(shape: Shape, half: torch.dtype, device: str) -> Trial:
    x, dy, *_ = _row_inputs(shape, half, device)
    inputs = x, weight = (x, *_parameters(shape.width, 1, device))
    outputs = _empty(*inputs)

    def launches(config):
        return rmsnorm_op.backward_launches(x, weight, dy, *outputs, EPS, config)

    fn = functools.partial(plain.rmsnorm, out_dtype=half)
    return Trial(launches, outputs, functools.partial(_gradients, fn, inputs, (dy,)))


def gate_rmsnorm(shape: Shape, half: torch.dtype, device: str, *, n: int) -> Trial:
    primals, parameters = _row_inputs(shape, half, device)[:2], _parameters(shape.width, 2, device)
    tangents = _last(_row_inputs(shape, half, device)[:2], n)
    out, out_dot = _empty(*primals), _empty(*_last(primals, n))

    def launches(config):
        pairs, dots = (primals, tangents) if n else (primals, (None, None)), out_dot or (None, None)
        return (gate_rmsnorm_op.forward_launch(*pairs, *parameters, out, dots, shape.batch - n, EPS, config),)

    fn = functools.partial(lambda x, y, **options: plain.gate_rmsnorm(x, y, *parameters, **options), out_dtype=half)
    return Trial(launches, (*out, *out_dot), functools.partial(_results, fn, primals, tangents))


def gate_rmsnorm_bwd(shape: Shape, half: torch.dtype, device: str) -> Trial:
    x, y, *_ = _row_inputs(shape, half, device)
    inputs = (x, y, gate, weight) = (x, y, *_parameters(shape.width, 2, device))
    dx_out, dh, *_ = _row_inputs(shape, half, device)
    x_out = x + gate * y
    dx, dy, *sums = outputs = _empty(*inputs)

    def launches(config):
        tensors = (x_out, y, gate, weight, dx_out, dh, dx, dy)
        return gate_rmsnorm_op.backward_launches(*tensors, sums, EPS, config)

    fn = functools.partial(plain.gate_rmsnorm, out_dtype=half)
    return Trial(launches, outputs, functools.partial(_gradients, fn, inputs, (dx_out, dh)))


def _queries(shape: Shape, half: torch.dtype, device: str) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Queries and keys within a packed projection; two weights, and the table of their rotations."""
    size = (shape.batch, shape.tokens, 3, shape.heads, shape.head_dim)
    table = rope_table(shape.tokens, shape.head_dim, dtype=torch.float32, device=torch.device(device))
    return torch.randn(size, device=device).to(half)[:, :, :2], (*_parameters(shape.head_dim, 2, device), *table)


def qk_rope(shape: Shape, half: torch.dtype, device: str, *, n: int) -> Trial:
    qk, parameters = _queries(shape, half, device)
    tangents = _last(_queries(shape, half, device)[:1], n)
    out, out_dot = _empty(*qk.unbind(2)), _empty(*_last(qk.unbind(2), n))

    def launches(config):
        dots = (*tangents, out_dot) if n else (None, (None, None))
        return (qk_rope_op.forward_launch(qk, parameters, out, *dots, shape.batch - n, EPS, config),)

    def fn(qk):
        return plain.qk_rope(qk, *(x.to(torch.promote_types(qk.dtype, x.dtype)) for x in parameters))

    return Trial(launches, (*out, *out_dot), functools.partial(_results, functools.partial(fn), (qk,), tangents))


def qk_rope_bwd(shape: Shape, half: torch.dtype, device: str) -> Trial:
    qk, parameters = _queries(shape, half, device)
    cotangents = _queries(shape, half, device)[0].unbind(2)
    inputs = (qk, *parameters[:2])
    dqk, *sums = outputs = _empty(*inputs)

    def launches(config):
        return qk_rope_op.backward_launches(qk, parameters, cotangents, dqk, tuple(sums), EPS, config)

    fn = functools.partial(lambda *xs: plain.qk_rope(*xs, *(x.to(xs[1].dtype) for x in parameters[2:])))
    return Trial(launches, outputs, functools.partial(_gradients, fn, inputs, cotangents))


def _products(shape: Shape, half: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """A packed product of the MLP, and a tensor like its SwiGLU."""
    x = torch.randn(shape.batch, shape.tokens, 2 * padded(shape.width * 8 // 3), device=device).to(half)
    return x, torch.randn(x[..., ::2].shape, device=device).to(half)


def swiglu(shape: Shape, half: torch.dtype, device: str, *, n: int) -> Trial:
    x, like_y = _products(shape, half, device)
    tangents = _last(_products(shape, half, device), n)[:1]
    y, *y_dot = outputs = _empty(like_y, *_last((like_y,), n))

    def launches(config):
        dots = (*tangents, *y_dot) if n else (None, None)
        return (swiglu_op.forward_launch(x, y, *dots, shape.batch - n, config),)

    return Trial(launches, outputs, functools.partial(_results, functools.partial(plain.swiglu), (x,), tangents))


def swiglu_bwd(shape: Shape, half: torch.dtype, device: str) -> Trial:
    x, dy = _products(shape, half, device)
    outputs = _empty(x)

    def launches(config):
        return (swiglu_op.backward_launch(x, dy, *outputs, config),)

    return Trial(launches, outputs, functools.partial(_gradients, functools.partial(plain.swiglu), (x,), (dy,)))


def sums(shape: Shape, half: torch.dtype, device: str, *, backward: Callable, config: object) -> Trial:
    """The second stage of a backward, on the partial sums that a config of its first leaves."""
    first, second = backward(shape, half, device).launches(config)
    partial = second.args["partial_ptr"]
    if device != "meta":
        first.run()
    of_samples = [x for x in (second.args[f"sum{i}_ptr"] for i in range(3)) if x is not None]
    whole = second.args["whole_ptr"]
    outputs = (*of_samples, *([] if whole is None else [whole]))

    def add_up(exact: bool) -> list[Tensor]:
        x = partial.double() if exact else partial
        each = x[: len(of_samples)].view(len(of_samples), len(of_samples[0]), -1, x.shape[-1]).sum(2)
        return [*each, *x[len(of_samples) :].sum(1)]

    return Trial(lambda config: (sum_partials(partial, of_samples, config, whole),), outputs, add_up, before=first)


# --- attention ---


def _packed(shape: Shape, half: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """q, k and v where the projection left them: views of (B, L, 3, H, D)."""
    size = (shape.batch, shape.tokens, 3, shape.heads, shape.head_dim)
    return torch.randn(size, device=device).to(half).unbind(2)


def attention(
    shape: Shape, half: torch.dtype, device: str, *, shipped: AttentionConfig, dual: bool = False, beside: bool = False
) -> Trial:
    """The forward. ``shipped`` is Triton's config; ``beside``: it writes into an o that other samples share."""
    primals = _packed(shape, half, device)
    tangents = _packed(shape, half, device) if dual else ()
    o, o_dot = primals[0].new_empty(primals[0].shape), primals[0].new_empty(primals[0].shape) if dual else None
    lse = o.new_empty((shape.batch, shape.heads, shape.tokens), dtype=torch.float32)
    scale = shape.head_dim**-0.5

    def launches(config):
        config = shipped if config is Backend.TRITON else config
        return (forward_launch(primals, tangents or (None,) * 3, (o, o_dot, lse), scale, config),)

    def library(backend):
        _require(backend, primals[0])
        with force_backend(forward=backend):
            return attention_forward(*primals, scale, FORWARD, (o, lse) if beside else None)

    def by_plain(exact):
        q, k = (x.transpose(1, 2).double() if exact else x.transpose(1, 2) for x in primals[:2])
        (o, *o_dot) = _results(functools.partial(plain.attention), primals, tangents, exact)
        return [o, (q * scale @ k.mT).logsumexp(-1), *o_dot]

    return Trial(launches, (o, lse, o_dot) if dual else (o, lse), by_plain, library)


def attention_bwd(
    shape: Shape, half: torch.dtype, device: str, *, shipped: tuple[AttentionConfig, AttentionConfig]
) -> Trial:
    """The backward into one packed gradient, a library's packed into it, and that of a bias; ``shipped`` are Triton's
    configs.
    """
    qkv = torch.stack(_packed(shape, half, device), 2)
    (q, k, v), scale = qkv.unbind(2), shape.head_dim**-0.5
    o, lse = (q.new_empty(q.shape), q.new_empty((shape.batch, shape.heads, shape.tokens), dtype=torch.float32))
    if device != "meta":
        o, lse = (x.contiguous() for x in attention_ref(q, k, v, scale=scale))
    do, delta = torch.randn_like(o), torch.empty_like(lse)
    dqkv, dbias = outputs = qkv.new_empty(qkv.shape), qkv.new_empty(3 * shape.heads * shape.head_dim)

    def launches(config):
        config = shipped if config is Backend.TRITON else config
        return backward_launches(do, (q, k, v, o, lse), delta, dqkv.unbind(2), scale, config, dbias)

    def library(backend):
        _require(backend, q)
        with force_backend(backward=backend):
            attention_qkv_backward(do, qkv, o, lse, scale, *outputs)
        return outputs

    def by_plain(exact):
        gradient = torch.stack(_gradients(functools.partial(plain.attention), (q, k, v), (do,), exact), 2)
        return [gradient, gradient.sum((0, 1)).flatten()]

    return Trial(launches, outputs, by_plain, library)


def _require(backend: Backend, q: Tensor) -> None:
    # raises Unserved where the back-end is not installed, or takes no such tensors
    if not serves(backend, q, q):
        raise Unserved("not installed, or it does not take this dtype on this device")
