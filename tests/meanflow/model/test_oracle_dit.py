"""The network against the official one: output, derivative, parts, tables, initialisation."""

import numpy as np
import oracle
import pytest
import torch

from meanflow.method.passes import func_jvp, pair_jvp
from meanflow.model.build import build_net
from meanflow.model.dit import Dual, position_table
from meanflow.recipe import DIT_PATCHES, DIT_SIZES, ModelConfig
from meanflow_kernels import timestep_embedding, timestep_embedding_jvp

NETWORKS = ["dit_small", "dit_hd72", "dit_hd64", "dit_p4"]
JVPS = {"pairs": pair_jvp, "torch.func": func_jvp}


def inputs(name, dtype):
    data = oracle.load(name)
    z, v, r, t = (oracle.tensor(data[key], dtype) for key in ("z", "v", "r", "t"))
    return data, z, v, r, t, oracle.tensor(data["y"])


@pytest.mark.parametrize("jvp", JVPS.values(), ids=JVPS)
@pytest.mark.parametrize("mode", oracle.MODES)
@pytest.mark.parametrize("name", NETWORKS)
def test_output_and_derivative(name, mode, jvp):
    dtype = oracle.MODES[mode]
    data, z, v, r, t, y = inputs(name, dtype)
    u, du_dt = jvp(oracle.network(name, dtype), (z, r, t), (v, None, torch.ones_like(t)), (y,))
    oracle.assert_close(u, data[f"{mode}/u"], mode, "u", "u")
    oracle.assert_close(du_dt, data[f"{mode}/du_dt"], mode, "derived", "du_dt")


@pytest.mark.parametrize("name", NETWORKS)
def test_plain_forward_is_the_primal(name):
    data, z, _, r, t, y = inputs(name, torch.float64)
    oracle.assert_close(oracle.network(name, torch.float64)(z, r, t, y), data["f64/u"], "f64", "u")


def test_rounded_position_table():
    # f64p: everything in double but the position table, which a float32 buffer would have rounded
    data, z, v, r, t, y = inputs("dit_small", torch.float64)
    net = oracle.network("dit_small", torch.float64)
    net.pos_embed = net.pos_embed.float().double()
    u, du_dt = pair_jvp(net, (z, r, t), (v, None, torch.ones_like(t)), (y,))
    oracle.assert_close(u, data["f64p/u"], "f64", "u")
    oracle.assert_close(du_dt, data["f64p/du_dt"], "f64", "derived")


@pytest.mark.parametrize("part", ["v0", "jvp_dz", "jvp_dt", "jvp_dh"])
def test_partial_derivatives(part):
    # the official h embedder sees h alone: with r held at t - h, dh is -dr and dt moves both times
    data, z, v, r, t, y = inputs("dit_small", torch.float64)
    net, one = oracle.network("dit_small", torch.float64), torch.ones_like(t)
    if part == "v0":
        got = net(z, t, t, y)
    else:
        direction = {"jvp_dz": (v, None, None), "jvp_dt": (None, one, one), "jvp_dh": (None, -one, None)}[part]
        _, got = net(z, r, t, y, tangents=direction)
    oracle.assert_close(got, data[f"f64/{part}"], "f64", "u", part)


@pytest.mark.parametrize("name", NETWORKS)
def test_parts_of_the_network(name):
    data, z, _, r, t, y = inputs(name, torch.float64)
    net = oracle.network(name, torch.float64)
    parts = {
        "patch_tokens_s0": net.x_embedder(Dual(z), z.dtype).primal[0],
        "t_emb": net.t_embedder(Dual(t), z.dtype).primal,
        "h_emb": net.h_embedder(Dual(t - r), z.dtype).primal,
        "y_emb": net.y_embedder(y),
    }

    def keep_attention(module, args, out):
        branch, bias = out
        parts["attn0_s0"] = branch.primal[0] + bias

    def keep_block(index):
        def hook(module, args, residual):
            x, branch, gate = (dual.primal for dual in residual[:3])
            parts[f"block{index}_s0"] = (x + gate[:, None] * (branch + residual.bias))[0]

        return hook

    def keep_final(module, args, out):
        parts["final_s0"] = out.primal[0]

    net.blocks[0].attn.register_forward_hook(keep_attention)
    for i, block in enumerate(net.blocks):
        block.register_forward_hook(keep_block(i))
    net.final_layer.register_forward_hook(keep_final)
    net(z, r, t, y)
    wanted = oracle.group(data, "f64/inter/")
    assert wanted.keys() <= parts.keys()
    for part, array in wanted.items():
        oracle.assert_close(parts[part], array, "f64", "u", part)


@pytest.mark.parametrize("mode", oracle.MODES)
def test_time_features(mode):
    data = oracle.load("tables")
    t = oracle.tensor(data["t_values"], oracle.MODES[mode])
    for key, wanted in oracle.group(data, f"{mode}/t_embed_").items():
        dim, _, derivative = key.partition("_")
        if derivative:
            _, got = timestep_embedding_jvp((t,), (torch.ones_like(t),), int(dim))
        else:
            got = timestep_embedding(t, int(dim))
        oracle.assert_close(got, wanted, mode, "table", key)


@pytest.mark.parametrize("mode", oracle.MODES)
def test_position_tables(mode):
    data = oracle.load("tables")
    checked = 0
    for key, wanted in data.items():
        _, _, size = key.removeprefix(f"{mode}/").partition("_")
        if not key.startswith(f"{mode}/pos_"):
            continue
        *what, width, grid = size.split("_")
        table = position_table(int(width), int(grid), dtype=oracle.MODES[mode])
        match what[0]:
            case "embed":
                got = table
            case "rows":
                got = table[data[f"pos_rows_idx_{width}_{grid}"]]
            case "colsum":
                got = table.sum(0)
            case "sqsum":
                got = table.square().sum()
        oracle.assert_close(got, wanted, mode, "table", key)
        checked += 1
    assert checked >= 3


def test_parameter_counts():
    counts = oracle.settings(oracle.load("init_stats"), "param_counts")
    assert len(counts) == len(DIT_SIZES) * len(DIT_PATCHES)
    for name, wanted in counts.items():
        _, size, patch = name.split("_")
        with torch.device("meta"):
            net = build_net(ModelConfig.official(f"{size}/{patch}"))
        assert sum(p.numel() for p in net.parameters()) == wanted, name


def test_initialisation():
    data = oracle.load("init_stats")
    config, seeds = oracle.settings(data, "config"), int(data["n_seeds"])
    net = oracle.DiT(**config)
    pooled = {name: [] for name in net.state_dict()}
    for seed in range(seeds):
        net.init_weights(torch.Generator().manual_seed(seed))
        for name, weight in net.state_dict().items():
            pooled[name].append(weight.flatten().clone())
    shapes = oracle.settings(data, "shapes")
    for i, path in enumerate(data["names"]):
        blank = np.zeros(shapes[str(path)], np.float32)
        ((name, official),) = oracle.from_official({str(path): blank}).items()
        assert net.state_dict()[name].shape == official.shape
        weight = torch.cat(pooled[name])
        mean, std, absmax = (float(data[key][i]) for key in ("mean", "std", "absmax"))
        if std == 0:
            assert weight.abs().max() == absmax == 0, name
            continue
        # five standard errors of each statistic, both sides being samples of the same size
        n = weight.numel()
        assert abs(weight.mean() - mean) < 5 * std * (2 / n) ** 0.5, name
        uniform = float(data["kurtosis"][i]) < 2.4  # 1.8 for a uniform weight, 3 for a normal one
        spread = (0.2 if uniform else 0.5) ** 0.5
        assert abs(weight.std() / std - 1) < 5 * spread * (2 / n) ** 0.5, name
        # a uniform weight ends at sqrt(3) sigma, a normal one does not
        assert (weight.abs().max() < 1.8 * weight.std()) == uniform, name
        assert absmax == pytest.approx(float(weight.abs().max()), rel=0.02 if uniform else 0.5), name
