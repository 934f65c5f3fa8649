"""The network of improved MeanFlow against the official one: outputs, derivatives, parts, initialisation, sizes."""

import math
from dataclasses import replace

import numpy as np
import oracle_imf as oracle
import pytest
import torch

from meanflow.config import ModelConfig
from meanflow.interop.imf_weights import from_official, from_official_torch, to_official, to_official_torch
from meanflow.model import imf, pairs, transformer
from meanflow.model.build import build_net
from meanflow.recipe import IMF_SIZES
from meanflow_kernels import attention_jvp, timestep_embedding_jvp
from meanflow_kernels.qk_rope import reference as rope_reference
from meanflow_kernels.routing import Route, force_route

NETWORKS = oracle.networks()
F64 = torch.float64


def inputs(name, dtype):
    """z, r, t, y, omega, t_min, t_max, and the direction of z."""
    data = oracle.load(name)
    z, t, r, w, a, b, v = (oracle.tensor(data[key], dtype) for key in ("z", "t", "r", "w", "a", "b", "tangent"))
    return data, (z, r, t, oracle.tensor(data["y"]), w, a, b), v


def by_pairs(net, args, v):
    return net(*args, head="uv", tangents=(v, None, torch.ones_like(args[2])))


def by_func(net, args, v):
    z, r, t, *others = args
    outputs, tangents = torch.func.jvp(lambda z, t: net(z, r, t, *others, head="uv"), (z, t), (v, torch.ones_like(t)))
    return *outputs, tangents[0]


JVPS = {"pairs": by_pairs, "torch.func": by_func}


@pytest.mark.parametrize("jvp", JVPS.values(), ids=JVPS)
@pytest.mark.parametrize("mode", oracle.MODES)
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_and_derivative(name, mode, jvp):
    data, args, v = inputs(name, oracle.MODES[mode])
    outputs = jvp(oracle.network(name, oracle.MODES[mode]), args, v)
    for key, got, kind in zip(("u", "v", "du_dt"), outputs, ("u", "u", "derived"), strict=True):
        oracle.assert_close(got, data[f"{mode}/{key}"], mode, kind, key)


@pytest.mark.slow
def test_by_the_kernels():
    """One sample, interpreted where there is no GPU: the official numbers, and the gradients of the reference route."""
    data, args, v = inputs("imf_net_oddmlp", torch.float32)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = oracle.network("imf_net_oddmlp", torch.float32).to(device)
    args, v, grads = [x[:1].to(device) for x in args], v[:1].to(device), []
    for route in (Route.REFERENCE, Route.TRITON):
        net.zero_grad()
        with force_route(route):
            outputs = by_pairs(net, args, v)
            sum(x.square().sum() for x in outputs[:2]).backward()
        for key, got, kind in zip(("u", "v", "du_dt"), outputs, ("u", "u", "derived"), strict=True):
            oracle.assert_close(got.cpu(), data[f"f32/{key}"][:1], "f32", kind, key)
        grads.append({name: p.grad.clone() for name, p in net.named_parameters()})
    for name, grad in grads[0].items():
        assert (grads[1][name] - grad).norm() <= 1e-5 * grad.norm(), name


@pytest.mark.parametrize("name", NETWORKS)
def test_plain_forwards_are_the_primals(name):
    data, args, _ = inputs(name, F64)
    net = oracle.network(name, F64)
    oracle.assert_close(net(*args), data["f64/u"], "f64", "u")
    oracle.assert_close(net(*args, head="v"), data["f64/v"], "f64", "u")
    for got, key in zip(net(*args, head="uv"), "uv", strict=True):
        oracle.assert_close(got, data[f"f64/{key}"], "f64", "u")


@pytest.mark.parametrize("name", NETWORKS)
def test_derivative_of_v(name):
    # no training step needs it: by torch.func alone
    data, (z, r, t, *others), v = inputs(name, F64)
    net = oracle.network(name, F64)
    _, dv_dt = torch.func.jvp(lambda z, t: net(z, r, t, *others, head="v"), (z, t), (v, torch.ones_like(t)))
    oracle.assert_close(dv_dt, data["f64/dv_dt"], "f64", "derived")


@pytest.mark.parametrize("part", ["jvp_dz", "jvp_dh", "jvp_dr", "v0"])
@pytest.mark.parametrize("name", [name for name in NETWORKS if "f64/jvp_dz" in oracle.load(name)])
def test_partial_derivatives(name, part):
    data, args, v = inputs(name, F64)
    net, one = oracle.network(name, F64), torch.ones_like(args[2])
    z, _, t, y, w, a, b = args
    if part == "v0":
        # as a guidance pass asks for it: at h = 0, where guidance acts always
        got = net(z, t, t, y, w, 0 * a, 0 * b + 1, head="v")
        assert torch.equal(got, net(z, t, t, y, w, head="v"))
    else:
        direction = {"jvp_dz": (v, None, None), "jvp_dh": (None, None, one), "jvp_dr": (None, -one, None)}[part]
        _, got = net(*args, tangents=direction)
    oracle.assert_close(got, data[f"f64/{part.replace('_dr', '_dh')}"], "f64", "u", part)


@pytest.mark.parametrize("jvp", JVPS.values(), ids=JVPS)
@pytest.mark.parametrize("name", [name for name in NETWORKS if "f64c/u" in oracle.load(name)])
def test_with_the_official_casts(name, jvp, monkeypatch):
    """f64c: time features, rotation and attention in fp32, all else in fp64."""

    def single(xs):
        return tuple(None if x is None else x.float() for x in xs)

    def features(primals, tangents, dim, **options):
        out, out_dot = timestep_embedding_jvp(single(primals), single(tangents), dim, **options)
        return out.double(), None if out_dot is None else out_dot.double()

    def attention(primals, tangents, **options):
        out, out_dot = attention_jvp(single(primals), single(tangents), **options)
        return out.double(), None if out_dot is None else out_dot.double()

    rotate = rope_reference._rotate
    monkeypatch.setattr(pairs, "timestep_embedding_jvp", features)
    monkeypatch.setattr(imf, "attention_jvp", attention)
    monkeypatch.setattr(rope_reference, "_rotate", lambda x, cos, sin: rotate(*single((x, cos, sin))).to(x.dtype))
    data, args, v = inputs(name, F64)
    for key, got in zip(("u", "v", "du_dt"), jvp(oracle.network(name, F64), args, v), strict=True):
        wanted = oracle.tensor(data[f"f64c/{key}"])
        assert (got - wanted).abs().max() <= 1e-6 * wanted.abs().max(), key
        # the casts are there, and they count
        assert (got - oracle.tensor(data[f"f64/{key}"])).abs().max() > 1e-9 * wanted.abs().max(), key


def parts_of(net, args, v, monkeypatch):
    """{official name: (primal, tangent)} of what passes through the network."""
    parts, attended = {}, []

    def record(primals, tangents, **options):
        attended.append((primals, tangents))
        return attention_jvp(primals, tangents, **options)

    def keep(name, of=lambda args, out: out):
        def hook(module, args, out):
            x = of(args, out)
            parts[name] = (x.primal, x.tangent)

        return hook

    def added_up(residual):
        return residual.x + residual.branch.map(lambda branch: residual.gate.primal * branch)

    monkeypatch.setattr(imf, "attention_jvp", record)
    count = sum(transformer.TOKENS.values())
    embedders = {"h": "h", "omega": "omega", "t_min": "cfg_t_start", "t_max": "cfg_t_end"}
    for ours, official in embedders.items():
        net.get_submodule(f"{ours}_embedder").register_forward_hook(keep(f"{official}_embedder_emb"))
    net.x_embedder.register_forward_hook(keep("patch_tokens"))
    first = lambda args, out: args[0].x.map(lambda x: x[:, :count])  # noqa: E731
    net.shared_blocks[0].register_forward_hook(keep("prefix_tokens", first))
    net.shared_blocks[0].attn.register_forward_hook(keep("shared_blocks_0_attn"))
    names = [f"{g}_{i}" for g in ("shared_blocks", "u_heads", "v_heads") for i in range(len(net.get_submodule(g)))]
    for name, block in zip(names, net.blocks, strict=True):
        block.register_forward_hook(keep(name, lambda args, out: added_up(out)))
    for head in "uv":
        net.get_submodule(f"{head}_final_layer").register_forward_hook(keep(f"{head}_final_layer"))
    by_pairs(net, args, v)
    for name, (primals, tangents) in zip(names, attended, strict=True):
        parts |= {f"{letter}_{name}": pair for letter, *pair in zip("qk", primals, tangents, strict=False)}
    return {name if name.endswith("_emb") else f"{name}_s0": (x, x_dot) for name, (x, x_dot) in parts.items()}


@pytest.mark.parametrize("name", [name for name in NETWORKS if oracle.group(oracle.load(name), "f64/inter/")])
def test_parts_of_the_network(name, monkeypatch):
    data, args, v = inputs(name, F64)
    parts = parts_of(oracle.network(name, F64), args, v, monkeypatch)
    for i, kind in enumerate(("inter", "dinter")):
        wanted = oracle.group(data, f"f64/{kind}/")
        assert wanted and wanted.keys() <= parts.keys()
        for part, array in wanted.items():
            got = parts[part][i]
            got = got[0] if part.endswith("_s0") else got
            oracle.assert_close(got, torch.from_numpy(array), "f64", "u", part)


def assert_queries_and_keys_are_reached(net, args, v, monkeypatch):
    """That the gradient of u reaches q, k and the weights of their norms, and the tangent q and k, in every block."""
    tangents = []

    def record(primals, dots, **options):
        tangents.append(dots)
        return attention_jvp(primals, dots, **options)

    with monkeypatch.context() as patch:
        patch.setattr(imf, "attention_jvp", record)
        u, *_ = by_pairs(net, args, v)
    net.zero_grad()
    u.square().sum().backward()
    for i, block in enumerate([*net.shared_blocks, *net.u_heads]):
        q, k, _ = block.attn.qkv.weight.grad.chunk(3)
        for name, gradient in (
            ("q", q),
            ("k", k),
            ("q_norm", block.attn.q_norm.grad),
            ("k_norm", block.attn.k_norm.grad),
        ):
            assert gradient is not None and (gradient != 0).all(), f"no gradient of {name} in block {i}"
        for name, x_dot in zip("qk", tangents[i], strict=False):
            assert x_dot is not None and x_dot.abs().max() > 0, f"no tangent of {name} in block {i}"


def test_a_rotation_by_a_view_of_complex_numbers_would_lose_them(monkeypatch):
    name = NETWORKS[0]
    data, args, v = inputs(name, torch.float32)
    net = oracle.network(name, torch.float32)
    assert_queries_and_keys_are_reached(net, args, v, monkeypatch)

    def by_view(x, cos, sin):
        turned = x.contiguous().view(torch.complex64) * torch.complex(cos, sin)[:, None]
        return turned.view(torch.float32)

    def rope(qk, q_weight, k_weight, cos, sin):
        norms = (
            rope_reference.rmsnorm_ref(x, w, eps=1e-6) for x, w in zip(qk.unbind(2), (q_weight, k_weight), strict=True)
        )
        return tuple(by_view(x, cos, sin) for x in norms)

    def trap(primals, tangents, **options):
        (qk,), (qk_dot,) = primals, tangents
        if qk_dot is None:
            return rope(qk, **options), (None, None)
        return torch.func.jvp(lambda x: rope(x, **options), (qk,), (qk_dot,))

    monkeypatch.setattr(imf, "qk_rope_jvp", trap)
    # forward it is the same
    oracle.assert_close(net(*args), data["f32/u"], "f32", "u")
    with pytest.raises(AssertionError, match="no gradient of q in block 0"):
        assert_queries_and_keys_are_reached(net, args, v, monkeypatch)


# --- weights ---


@pytest.mark.parametrize("name", [*NETWORKS, "imf_loss_cases"])
def test_official_weights_and_back(name):
    data = oracle.load(name)
    official = oracle.group(data, "params/")
    mlp_hidden = oracle.options(oracle.settings(data, "config"))["mlp_hidden"]
    ours = from_official({f"params/net/{path}": array for path, array in official.items()})
    assert ours.keys() == oracle.network(name, F64).state_dict().keys()
    back = to_official(ours, mlp_hidden)
    assert back.keys() == official.keys()
    assert all((back[path] == array).all() and back[path].shape == array.shape for path, array in official.items())
    # the same through the names of the official PyTorch code
    theirs = to_official_torch(ours, mlp_hidden)
    assert "net.u_heads.0.attn.q_proj._flax_linear.weight" in theirs
    assert theirs["net.shared_blocks.0.mlp.w2._flax_linear.weight"].shape[1] == mlp_hidden
    again = from_official_torch(theirs)
    assert again.keys() == ours.keys() and all(torch.equal(again[key], x) for key, x in ours.items())


def test_foreign_or_missing_weights_are_refused():
    from meanflow.errors import UserError

    blank = np.zeros((4, 4), np.float32)
    for path in (
        "blocks/layers_0/attn/qkv/_flax_linear/kernel",
        "shared_blocks_0/attn/qkv/kernel",
        "x_embedder/kernel",
    ):
        with pytest.raises(UserError, match="params: got .*, wanted a path of the official iMF network"):
            from_official({path: blank})
    with pytest.raises(UserError, match="params: got '1 of the weights of u_heads.0.attn.qkv.weight'"):
        from_official({"u_heads_0/attn/q_proj/_flax_linear/kernel": blank})


def test_parameter_counts():
    counts = oracle.settings(oracle.load("imf_init_stats"), "param_counts")
    assert len(counts) == 2 * len(IMF_SIZES)
    inference = {"B": 88.94, "M": 173.91, "L": 409.05, "XL": 610.42}
    for size in IMF_SIZES:
        model = ModelConfig.official(f"imf-{size}/2")
        assert model.name == f"imf-{size}/2"
        with torch.device("meta"):
            training, sampling = build_net(model), build_net(replace(model, head_depth=0))
        last = training.v_final_layer
        assert training.parameter_count == counts[f"imfDiT_{size}_2/train"]
        # the official network for evaluation keeps v's last layer
        unused = sum(p.numel() for p in last.parameters())
        assert sampling.parameter_count + unused == counts[f"imfDiT_{size}_2/eval"]
        assert round(sampling.parameter_count / 1e6, 2) == inference[size]
        stored, padding = sum(p.numel() for p in training.parameters()), training.parameter_count
        assert (stored == padding) == (model.mlp_hidden % 16 == 0) and stored < 1.003 * padding


def test_initialisation():
    data = oracle.load("imf_init_stats")
    config, seeds = oracle.options(oracle.settings(data, "config")), int(data["n_seeds"])
    net = imf.ImfDiT(**config)
    pooled = {str(path): [] for path in data["names"]}
    for seed in range(seeds):
        net.init_weights(torch.Generator().manual_seed(seed))
        arrays = to_official(net.state_dict(), config["mlp_hidden"])
        assert arrays.keys() == pooled.keys()
        for path, array in arrays.items():
            pooled[path].append(array.ravel().copy())
    shapes = oracle.settings(data, "shapes")
    for i, path in enumerate(map(str, data["names"])):
        assert list(arrays[path].shape) == list(shapes[path]), path
        weight = np.concatenate(pooled[path])
        mean, std, absmax = (float(data[key][i]) for key in ("mean", "std", "absmax"))
        if std == 0:
            assert weight.min() == weight.max() == mean and abs(mean) == absmax, path
            continue
        # five standard errors of each statistic, both sides being samples of the same size
        n = weight.size
        assert abs(weight.mean() - mean) < 5 * std * math.sqrt(2 / n), path
        uniform = float(data["kurtosis"][i]) < 2.4  # 1.8 for a uniform weight, 3 for a normal one
        spread = math.sqrt(0.2 if uniform else 0.5)
        assert abs(weight.std() / std - 1) < 5 * spread * math.sqrt(2 / n), path
        assert (abs(weight).max() < 1.8 * weight.std()) == uniform, path
    assert all(padding.abs().max() == 0 for block in net.blocks for padding in block.mlp.padding if padding.numel())
