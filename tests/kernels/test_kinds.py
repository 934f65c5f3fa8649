"""Checks decided once a kind: what is refused at first is refused after good calls too, and nothing else is."""

import numpy
import pytest
import torch

import meanflow_kernels
from meanflow_kernels import attention, attention_jvp, kinds, rmsnorm
from meanflow_kernels.kinds import once_a_kind
from meanflow_kernels.routing import Route, force_route

DEVICES = ("meta", "cpu")
"""Where a good call is, and another; results are not computed."""


def room(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=DEVICES[0])


X, VECTOR, WEIGHT, T = room(3, 4, 32), room(3, 32), room(32), room(3)
Q, QKV, QK, ANGLES = room(3, 8, 2, 16), room(3, 8, 3, 2, 16), room(3, 8, 2, 2, 16), room(8, 8)
HALF = WEIGHT[:16]
START, DTYPE = {"tangent_start": 0}, {"out_dtype": torch.float32}
CALLS = {
    "attention": ((Q, Q, Q), {"scale": 0.5}),
    "attention_jvp": (((Q, Q, Q), (Q, Q, Q)), {"scale": 0.5, **START}),
    "attention_qkv": ((QKV,), {"bias": room(96), "scale": None}),
    "attention_qkv_jvp": (((QKV,), (QKV,)), {"bias": room(96), **START}),
    "adaln": ((X, VECTOR, VECTOR), DTYPE),
    "adaln_jvp": (((X, VECTOR, VECTOR), (X, VECTOR, VECTOR)), DTYPE | START),
    "gate_adaln": ((X, X, *[VECTOR] * 3), {"bias": WEIGHT, **DTYPE}),
    "gate_adaln_jvp": (((X, X, *[VECTOR] * 3), (X, X, *[VECTOR] * 3)), {"bias": WEIGHT, **DTYPE, **START}),
    "rmsnorm": ((X, WEIGHT), DTYPE),
    "rmsnorm_jvp": (((X,), (X,), WEIGHT), DTYPE | START),
    "gate_rmsnorm": ((X, X, WEIGHT, WEIGHT), DTYPE),
    "gate_rmsnorm_jvp": (((X, X), (X, X), WEIGHT, WEIGHT), DTYPE | START),
    "qk_rope": ((QK, HALF, HALF, ANGLES, ANGLES), {}),
    "qk_rope_jvp": (((QK,), (QK,), HALF, HALF, ANGLES, ANGLES), START),
    "bias_gelu": ((X, WEIGHT), {}),
    "bias_gelu_jvp": (((X,), (X,), WEIGHT), START),
    "silu": ((X,), {}),
    "silu_jvp": (((X,), (X,)), START),
    "swiglu": ((X,), {}),
    "swiglu_jvp": (((X,), (X,)), START),
    "timestep_embedding": ((T, 8), {"max_period": 100.0}),
    "timestep_embedding_jvp": (((T,), (T,), 8), {"max_period": 100.0, **START}),
}
"""A good call of each operator. `linear` is torch's own: its check looks at autocast too, and sees every call."""

NUMBERS = (True, 0, 0.0, -1, -1.0, 1, 2, 1.0, float("nan"), float("inf"), "0", torch.tensor(-1.0), None, numpy.ones(2))
DTYPES = (torch.float16, torch.float64, torch.int64, torch.complex64, "float16", torch.zeros(1), numpy.ones(2))


def others(argument) -> list:
    """What could be passed for an argument, in each respect that a check may look at."""
    if isinstance(argument, tuple):
        return [argument[:-1], (*argument, argument[-1]), list(argument), *elsewhere(argument)]
    if not isinstance(argument, torch.Tensor):
        return list(DTYPES if isinstance(argument, torch.dtype) else NUMBERS)
    dtypes = [argument.to(dtype) for dtype in (torch.float64, torch.bfloat16, torch.int64, torch.complex64)]
    shapes = [argument[:-1], argument[..., :-1], argument[None], argument[0], argument.flatten(), argument[:0]]
    places = [torch.empty(argument.shape, dtype=argument.dtype, device=DEVICES[1]), argument.expand_as(argument)]
    return [*dtypes, *shapes, *places, None, 1.0, numpy.ones(tuple(argument.shape)), "x"]


def elsewhere(arguments: tuple) -> list[tuple]:
    """The arguments with one of them exchanged for another."""
    return [(*arguments[:i], other, *arguments[i + 1 :]) for i, old in enumerate(arguments) for other in others(old)]


def outcome(op, arguments, options) -> tuple:
    """What comes out of a call, or how it is refused."""
    try:
        results = torch.utils._pytree.tree_leaves(op(*arguments, **options))
    except Exception as error:
        return type(error), str(error)
    return tuple((x.shape, x.dtype, x.device) if isinstance(x, torch.Tensor) else x for x in results)


@pytest.mark.parametrize("route", Route)
@pytest.mark.parametrize("name", CALLS)
def test_what_is_refused_at_first_is_refused_after_good_calls(name, route, monkeypatch):
    monkeypatch.setattr(kinds, "_passed", {})
    op, (arguments, options) = getattr(meanflow_kernels, name), CALLS[name]
    calls = [(each, options) for each in elsewhere(arguments)]
    calls += [(arguments, options | {key: other}) for key, value in options.items() for other in others(value)]
    with force_route(route):
        good = outcome(op, arguments, options)
        assert not isinstance(good[0], type), good
        found = []
        for call in calls:
            kinds._passed.clear()
            found.append(outcome(op, *call))
        assert len({each for each in found if isinstance(each[0], type)}) >= 5
        for _ in range(2):
            # every good call is known the second time
            assert outcome(op, arguments, options) == good and kinds._passed
            for call, first in zip(calls, found, strict=True):
                assert outcome(op, *call) == first, call


def test_a_good_call_on_one_route_is_refused_on_the_other():
    x = room(3, 4, 32, dtype=torch.float64)
    with force_route(Route.REFERENCE):
        rmsnorm(x, WEIGHT)
    with force_route(Route.TRITON), pytest.raises(ValueError, match="^x: got torch.float64"):
        rmsnorm(x, WEIGHT)


def test_what_a_transform_makes_of_a_good_call_is_refused():
    x, weight, q = torch.randn(2, 3, 8), torch.randn(8), torch.randn(1, 8, 2, 16)
    rmsnorm(x, weight)
    with pytest.raises(ValueError, match="^weight: got a tensor with a forward-mode tangent"):
        torch.func.jvp(lambda weight: rmsnorm(x, weight), (weight,), (weight,))
    attention(q, q, q)
    attention_jvp((q, q, q), (q, None, None))
    with pytest.raises(ValueError, match="^q: got a forward-mode dual tensor"):
        torch.func.jvp(lambda q: attention_jvp((q, q, q), (q, None, None)), (q,), (q,))
    with pytest.raises(RuntimeError, match="it would lose a derivative"):
        torch.func.grad(lambda q: torch.func.jvp(lambda q: attention(q, q, q), (q,), (q,))[1].sum())(q)


def test_a_check_sees_one_call_of_a_kind(monkeypatch):
    monkeypatch.setattr(kinds, "_passed", {})
    seen = []

    @once_a_kind
    def check(*tensors, value=None):
        seen.append((tensors, value))
        if value == "bad":
            raise ValueError(value)
        return len(seen)

    x = torch.zeros(2, 3)
    assert check(x) == check(torch.ones(2, 3)) == check(x.t().contiguous().t()) == 1
    different = [((x.t(),), None), ((x.double(),), None), ((x, None), None), (((x,),), None), ((x,), 1), ((x,), True)]
    assert [check(*tensors, value=value) for tensors, value in different] == [2, 3, 4, 5, 6, 7]
    assert [check(*tensors, value=value) for tensors, value in different] == [2, 3, 4, 5, 6, 7]
    for refused in range(2):
        with pytest.raises(ValueError, match="bad"):
            check(x, value="bad")
        assert len(seen) == 8 + refused
    # a value that changes, and one that cannot be looked up
    for value in (torch.zeros(()), []):
        assert check(x, value=value) < check(x, value=value)


def test_not_more_kinds_are_kept_than_a_limit(monkeypatch):
    monkeypatch.setattr(kinds, "_passed", {})
    monkeypatch.setattr(kinds, "MOST_KINDS", 3)
    for n in range(1, 8):
        rmsnorm(room(n, 4, 32), WEIGHT)
        assert len(kinds._passed) <= 3
