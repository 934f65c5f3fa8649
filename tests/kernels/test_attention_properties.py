"""Properties of attention_jvp that hold whatever the numbers: those of every dual operator, bit-equality, opcheck,
errors.
"""

import pytest
import torch
from attention_inputs import make_inputs, plain_attention
from dual_properties import Case, DualProperties

from meanflow_kernels import attention, attention_jvp
from meanflow_kernels.attention.config import (
    AttentionConfig,
    PersistentConfig,
    backward_configs,
    dual_config,
    plain_config,
)
from meanflow_kernels.attention.launches import column_tiles, forward_launch
from meanflow_kernels.routing import Route, force_route

pytestmark = pytest.mark.usefixtures("poisoned_empty")
SHAPE = (3, 17, 33, 2, 24, torch.float32)


class TestProperties(DualProperties):
    case = Case(attention, attention_jvp, plain_attention, lambda device: make_inputs("iid", *SHAPE, device))
    # samples without a tangent have tiles of their own, and the reference's products are a library's, which may round
    # otherwise for another number of samples
    tolerance = 1e-6


def test_a_slice_with_the_tangent_has_the_bits_of_the_whole(kernel_route, device):
    primals, tangents = make_inputs("iid", *SHAPE, device)
    o, o_dot = attention_jvp(primals, tuple(x[1:] for x in tangents), tangent_start=1)
    o_full, o_dot_full = attention_jvp(primals, tangents)
    assert torch.equal(o[1:], o_full[1:]) and torch.equal(o_dot, o_dot_full[1:])


@pytest.mark.parametrize("present", [(True, True, False), (False, False, True)])
def test_an_absent_tangent_is_neither_loaded_nor_multiplied(present):
    (q, k, v), tangents = make_inputs("iid", *SHAPE, "cpu")
    some = tuple(x if p else None for x, p in zip(tangents, present, strict=True))
    launch = forward_launch((q, k, v), some, (q, q, q), 1.0, AttentionConfig(16, 16, 4, 1))
    for name, x in zip(("q", "k", "v"), some, strict=True):
        assert (launch.args[f"{name}_dot_ptr"] is None) == (x is None)
        assert launch.constexprs[f"HAS_{name.upper()}_DOT"] == (x is not None)


@pytest.mark.parametrize("head_dim", (64, 72))
@pytest.mark.parametrize("config", (AttentionConfig(64, 64, 4, 2), AttentionConfig(16, 32, 4, 2)), ids=str)
def test_plain_and_dual_primal_are_bit_equal(device, config, head_dim):
    primals, tangents = make_inputs("iid", 1, 64, 100, 1, head_dim, torch.float16, device)
    (o, lse), (o_dual, lse_dual), o_dot = (
        *(
            (torch.empty(1, 64, 1, head_dim, dtype=torch.float16, device=device), torch.empty(1, 1, 64, device=device))
            for _ in range(2)
        ),
        torch.empty(1, 64, 1, head_dim, dtype=torch.float16, device=device),
    )
    forward_launch(primals, (None, None, None), (o, None, lse), 0.125, config).run()
    forward_launch(primals, tangents, (o_dual, o_dot, lse_dual), 0.125, config).run()
    assert torch.equal(o, o_dual) and torch.equal(lse, lse_dual)


@pytest.mark.parametrize("head_dim", range(16, 129, 8))
def test_column_tiles_cover_the_head_dim_without_waste(head_dim):
    first, second = column_tiles(head_dim)
    assert first & (first - 1) == 0 and second & (second - 1) == 0
    assert first in (16, 32, 64, 128) and second in (0, 16, 32)
    # the second tile starts inside the head dim, and the split is narrower than the next power of two
    assert head_dim <= first + second < max(2 * head_dim, 17) and (second == 0 or first < head_dim)
    assert first + second <= 1 << (head_dim - 1).bit_length()
    if head_dim == 72:
        assert (first, second) == (64, 16)


@pytest.mark.parametrize("arch", (0, 80, 86, 90, 100, 120))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
def test_every_architecture_has_a_config(arch, dtype):
    for head_dim in range(16, 129, 8):
        for length in (1, 64, 256, 65536):
            call = (arch, dtype, head_dim, length)
            for config in (dual_config(*call), plain_config(*call), *backward_configs(*call)):
                assert isinstance(config, AttentionConfig | PersistentConfig)


ops = torch.ops.meanflow_kernels


Q, KV = torch.zeros(2, 5, 3, 16), torch.zeros(2, 7, 3, 16)
BAD_PRIMALS = {
    "q": [
        (Q[0], KV, KV),
        ("text", KV, KV),
        (Q.double(), KV.double(), KV.double()),
        (Q[..., :12], KV[..., :12], KV[..., :12]),
    ],
    "k": [
        (Q, KV[:1], KV),
        (Q, KV[..., :8], KV),
        (Q, KV[:, :, :1], KV),
        (Q, KV.half(), KV),
        (Q, KV[:, :0], KV[:, :0]),
        (Q, KV.to("meta"), KV),
    ],
    "v": [(Q, KV, KV[:, :1]), (Q, KV, KV[..., :8]), (Q, KV, KV.bfloat16()), (Q, KV, KV.to("meta"))],
}


@pytest.mark.parametrize(("name", "primals"), [(name, x) for name, xs in BAD_PRIMALS.items() for x in xs])
def test_wrong_primals_raise(kernel_route, name, primals):
    for call in (lambda: attention(*primals), lambda: attention_jvp(primals, (Q, None, None))):
        with pytest.raises(ValueError, match=rf"^{name}: got .*, wanted .*; "):
            call()


BAD_TANGENTS = {
    "k_dot": [(Q, Q, None), (Q, KV[:1], None), (None, KV.double(), None)],
    "v_dot": [(None, None, KV[:, :1]), (None, KV, KV[..., :8])],
    "tangents": [(Q, KV)],
}


@pytest.mark.parametrize(("name", "tangents"), [(name, x) for name, xs in BAD_TANGENTS.items() for x in xs])
def test_tangents_that_do_not_match_raise(each_route, name, tangents):
    with pytest.raises(ValueError, match=rf"^{name}: got .*, wanted .*; "):
        attention_jvp((Q, KV, KV), tangents)


@pytest.mark.parametrize("scale", (0.0, -1.0, float("nan")))
def test_a_scale_that_is_not_positive_raises(each_route, scale):
    with pytest.raises(ValueError, match="^scale: got .*, wanted .*; "):
        attention(Q, KV, KV, scale=scale)


def test_the_reference_takes_what_the_kernel_does_not():
    with force_route(Route.REFERENCE):
        assert attention(Q.double()[..., :12], KV.double()[..., :12], KV.double()[..., :12]).dtype == torch.float64


def test_an_empty_batch(each_route, device):
    q, kv = Q[:0].to(device), KV[:0].to(device)
    o, o_dot = attention_jvp((q, kv, kv), (q, None, None))
    assert o.shape == o_dot.shape == (0, 5, 3, 16)
