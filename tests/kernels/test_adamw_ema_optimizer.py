"""AdamWEMA, the optimizer: state dicts, averages and copies, compiled, sharded, captured."""

import copy
import os
import tempfile

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from meanflow_kernels.adamw_ema import AdamWEMA, adamw_ema
from meanflow_kernels.adamw_ema.native import MISSING

HAS_GPU = torch.cuda.is_available()
needs_native = pytest.mark.skipif("cpu" in MISSING, reason=f"needs the native CPU library: {MISSING.get('cpu')}")
DEVICES = [
    pytest.param("cpu", marks=needs_native),
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(HAS_GPU and "cuda" in MISSING, reason=MISSING.get("cuda", ""))],
    ),
]


def test_backward_through_changed_weights_raises():
    """The step counts as a change in place, so autograd refuses a graph from before it."""
    w = nn.Parameter(torch.randn(4, 4))
    x = torch.randn(2, 4, requires_grad=True)
    loss = (x @ w).sum()
    w.grad = torch.ones_like(w)
    AdamWEMA([w]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def network(device="cpu"):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 33), nn.SiLU(), nn.Linear(33, 3)).to(device)


def train(net, optimizer, steps, device="cpu", first=0):
    for k in range(first, first + steps):
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(k)).to(device)
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("torchs", [dict(foreach=False), dict(fused=True), dict(foreach=True)], ids=str)
def test_state_dicts_are_interchangeable(device, torchs):
    """Two steps of one class, three of the other on its loaded state: as five of either. Both ways."""
    settings = dict(lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    make = {"torch": lambda p: torch.optim.AdamW(p, **settings, **torchs), "ours": lambda p: AdamWEMA(p, **settings)}
    final = {}
    for first in make:
        for second in make:
            net = network(device)
            one = make[first](net.parameters())
            train(net, one, 2, device)
            two = make[second](net.parameters())
            two.load_state_dict(copy.deepcopy(one.state_dict()))
            train(net, two, 3, device, first=2)
            final[first, second] = list(net.parameters()), two.state_dict()
    params, state = final["torch", "torch"]
    for got_params, got_state in final.values():
        torch.testing.assert_close(got_params, params, rtol=1e-5, atol=1e-6)
        assert got_state["param_groups"][0].keys() == state["param_groups"][0].keys()
        assert got_state["state"].keys() == state["state"].keys()
        for key, entry in state["state"].items():
            assert got_state["state"][key].keys() == entry.keys()
            for name, x in entry.items():
                torch.testing.assert_close(got_state["state"][key][name].cpu(), x.cpu(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_skipped_step_changes_nothing(device, dtype):
    """Weights, moments, steps, averages and copies, whatever is in the gradients; the next step is made."""
    net = network(device).to(dtype)
    ema, copies = copy.deepcopy(net), [p.detach().bfloat16() for p in net.parameters()]
    optimizer = AdamWEMA(net.parameters(), lr=1e-2, emas={0.9: ema.parameters()}, copies=copies)
    train(net, optimizer, 2, device) if dtype is torch.float32 else None

    def state():
        moments = [x for s in optimizer.state.values() for x in s.values()]
        return [x.detach().clone() for x in (*net.parameters(), *ema.parameters(), *copies, *moments)]

    before = state()
    for p in net.parameters():
        p.grad = torch.full_like(p, float("nan"))
    optimizer.step(skip=torch.ones((), device=device))
    assert all(torch.equal(a, b) for a, b in zip(state(), before, strict=True))
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step(skip=torch.zeros((), device=device))
    made = state()
    assert not any(torch.equal(a, b) for a, b in zip(made[:4], before[:4], strict=True))
    assert all(x.isfinite().all() for x in made)


def test_state_before_the_first_step_is_empty_in_torch():
    net, twin = network(), network()
    ours, plain = AdamWEMA(net.parameters()), torch.optim.AdamW(twin.parameters(), fused=True)
    ours.load_state_dict(plain.state_dict())
    train(net, ours, 2)
    train(twin, plain, 2)
    torch.testing.assert_close(list(net.parameters()), list(twin.parameters()), rtol=1e-5, atol=1e-6)


def test_state_of_another_algorithm_is_refused():
    net = network()
    for options in (dict(amsgrad=True), dict(maximize=True)):
        other = torch.optim.AdamW(net.parameters(), **options)
        with pytest.raises(ValueError, match=f"state_dict: got {next(iter(options))}=True, wanted False"):
            AdamWEMA(net.parameters()).load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="decoupled_weight_decay=False"):
        AdamWEMA(net.parameters()).load_state_dict(torch.optim.Adam(net.parameters()).state_dict())
    with pytest.raises(ValueError, match=r"emas\[0.9\]: got 1 tensors, wanted 4"):
        AdamWEMA(net.parameters(), emas={0.9: [torch.zeros(1)]})


@pytest.mark.parametrize("backend", [None, "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)], ids=str)
def test_optimizer_keeps_averages_and_copies(backend):
    """Groups with their own settings, a parameter without a gradient, a closure, a learning rate in a tensor."""
    net, twin = network(), network()
    emas = {0.9: copy.deepcopy(net), 0.5: copy.deepcopy(net)}
    low = copy.deepcopy(net).bfloat16()
    lr = torch.tensor(1e-2)

    def groups(n):
        return [dict(params=n[0].parameters(), weight_decay=0.3), dict(params=n[2].parameters(), lr=lr)]

    copies = [None if k == 1 else q for k, q in enumerate(low.parameters())]
    ours = AdamWEMA(groups(net), lr=2e-2, emas={d: e.parameters() for d, e in emas.items()}, copies=copies)
    plain = torch.optim.AdamW(groups(twin), lr=2e-2, fused=True)
    averages = {d: copy.deepcopy(twin) for d in emas}
    step = torch.compile(lambda: ours.step(), fullgraph=True, backend=backend) if backend else ours.step
    for k in range(4):
        x = torch.randn(8, 5)
        for n in (net, twin):
            n.zero_grad()
            n(x).square().mean().backward()
            if k == 2:
                n[2].bias.grad = None
        lr.fill_(1e-2 / (k + 1))
        step()
        plain.step()
        with torch.no_grad():
            for d, average in averages.items():
                torch._foreach_lerp_(list(average.parameters()), list(twin.parameters()), 1 - d)
    torch.testing.assert_close(list(net.parameters()), list(twin.parameters()), rtol=1e-5, atol=1e-6)
    for d, average in averages.items():
        torch.testing.assert_close(list(emas[d].parameters()), list(average.parameters()), rtol=1e-5, atol=1e-6)
    for p, q in zip(net.parameters(), copies, strict=True):
        assert q is None or torch.equal(p.bfloat16(), q)
    assert ours.step(lambda: torch.tensor(3.0)) == 3.0


@pytest.fixture
def one_process_group():
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{os.path.join(folder, 'store')}", rank=0, world_size=1)
        yield init_device_mesh("cpu", (1,))
        dist.destroy_process_group()


def test_sharded_parameters(one_process_group):
    """FSDP2's DTensors: the same numbers as unsharded, averages and state sharded like their parameters."""
    net, plain = network(), network()
    ema, plain_ema = copy.deepcopy(net), copy.deepcopy(plain)
    fully_shard(net, mesh=one_process_group)
    fully_shard(ema, mesh=one_process_group)
    ours = AdamWEMA(net.parameters(), lr=1e-2, emas={0.9: ema.parameters()})
    unsharded = AdamWEMA(plain.parameters(), lr=1e-2, emas={0.9: plain_ema.parameters()})
    train(net, ours, 3)
    train(plain, unsharded, 3)
    for a, b in ((net, plain), (ema, plain_ema)):
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            assert torch.equal(p.full_tensor(), q)
    p = next(net.parameters())
    assert ours.state[p]["exp_avg"].placements == p.placements

    p, replicated = distribute_tensor(torch.randn(4, 2), one_process_group, [Shard(0)]), torch.randn(4, 2)
    with pytest.raises(ValueError, match=r"grads\[0\]: got a plain tensor, wanted .*Shard"):
        adamw_ema([p], [replicated], [p], [p], [torch.zeros(())], lr=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(HAS_GPU and "cuda" in MISSING, reason=MISSING.get("cuda", ""))
def test_gpu_graph():
    """A captured step counts its steps on the device and sees the learning rate change."""
    net, twin = network("cuda"), network("cuda")
    ema, twin_ema = copy.deepcopy(net), copy.deepcopy(twin)
    lr = torch.tensor(1e-2, device="cuda")
    captured = AdamWEMA(net.parameters(), lr=lr, emas={0.9: ema.parameters()})
    eager = AdamWEMA(twin.parameters(), lr=1e-2, emas={0.9: twin_ema.parameters()})
    for n in (net, twin):
        for k, p in enumerate(n.parameters()):
            p.grad = torch.full_like(p, 0.1 * (k + 1))
    # the first launch loads the kernel, which a capture may not
    captured.step()
    eager.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for k in range(4):
        lr.fill_(1e-2 / (k + 1))
        eager.param_groups[0]["lr"] = 1e-2 / (k + 1)
        graph.replay()
        eager.step()
    assert captured.state[next(net.parameters())]["step"].item() == 5
    torch.testing.assert_close(list(net.parameters()), list(twin.parameters()), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(list(ema.parameters()), list(twin_ema.parameters()), rtol=1e-6, atol=1e-7)
