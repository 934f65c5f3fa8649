"""One process, DDP, zero1 and FSDP2 compute the same; two processes on the CPU (gloo)."""

import copy
import gc
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from ranks import RANKS
from torch import Tensor, nn

from meanflow.config import ObjectiveConfig
from meanflow.method.contract import ObjectiveLoss
from meanflow.model.dit import DiT
from meanflow.objectives.meanflow import MeanFlow
from meanflow.objectives.meanflow_plan import Drawn, whole_batch
from meanflow.training.optim import update_ema
from meanflow.training.parallel import (
    OwnRows,
    Zero1,
    compile_blocks,
    full_tensor,
    own_rows,
    replicate,
    shard,
    total_norm,
)
from meanflow.training.step import declare_sizes
from meanflow_kernels.adamw_ema import AdamWEMA

F64 = torch.float64
BATCH = 8
UNGUIDED = ObjectiveConfig()
GUIDED = ObjectiveConfig(omega=0.2, kappa=0.92, guidance_end=0.75)
BY_EMA = replace(GUIDED, guidance_weights="ema")
COIN = replace(GUIDED, equal_placement="bernoulli")


# --- what they compute ---


def network(dtype=F64, **options) -> DiT:
    # three rows of labels, which two processes cannot share evenly
    sizes = dict(input_size=4, patch_size=2, in_channels=2, hidden_size=16, depth=2, num_heads=2, num_classes=2)
    torch.manual_seed(0)
    net = DiT(**sizes | options).to(dtype)
    for p in net.parameters():
        nn.init.normal_(p, std=0.2)
    return net


def batch(rank: int, step: int = 0, dtype=F64, *, dropped: int = 1, equal: int = 6):
    g = torch.Generator().manual_seed(10 * step + rank)
    x, e = (torch.randn(BATCH, 2, 4, 4, generator=g, dtype=F64).to(dtype) for _ in range(2))
    r, t = torch.rand(2, BATCH, generator=g, dtype=F64).to(dtype).sort(0).values
    sample = torch.arange(BATCH)
    return x, e, torch.where(sample < equal, t, r), t, sample % 2, sample < dropped


def plan_of(objective, inputs):
    return MeanFlow(objective, BATCH).plan(Drawn(inputs[2], inputs[3], inputs[5]))


def loss_of(objective, net: DiT, guide: DiT | None = None) -> ObjectiveLoss:
    return ObjectiveLoss(MeanFlow(objective, BATCH), net, guide)


def terms_of(loss, inputs, plan):
    x, e, r, t, y, drop = inputs
    return loss(x, e, y, Drawn(r, t, drop), plan)


def whole_loss(loss: ObjectiveLoss, batches, *, planned: bool = False) -> Tensor:
    """The loss of all processes' batches; each pass on every sample, unless planned."""
    config = loss.objective.config
    plans = [plan_of(config, x) if planned else whole_batch(config, x[2], x[3], x[5]) for x in batches]
    return sum(terms_of(loss, *each).loss for each in zip(batches, plans, strict=True)) / len(batches)


class Engine:
    """The objective in one of several processes.

    backend: of the compiler, or "" for none.
    """

    def __init__(self, name: str, objective: ObjectiveConfig, net: DiT, guide: DiT | None = None, backend: str = ""):
        self.objective, self.net, self.compiled = objective, net, bool(backend)
        self.loss = loss_of(objective, net, guide)
        if name in ("ddp", "zero1"):
            if backend:
                self.loss.compile(fullgraph=True, dynamic=False, backend=backend)
            self.loss = replicate(self.loss, Zero1) if name == "zero1" else replicate(self.loss)
            return
        for each in (net,) if guide is None else (net, guide):
            if backend:
                compile_blocks(each, backend)
            shard(each)

    def terms(self, inputs, plan=None):
        plan = plan_of(self.objective, inputs) if plan is None else plan
        if self.compiled:
            declare_sizes(MeanFlow(self.objective, BATCH), plan)
        return terms_of(self.loss, inputs, plan)

    def backward(self, inputs, plan=None):
        self.net.zero_grad()
        terms = self.terms(inputs, plan)
        terms.loss.backward()
        return terms

    def gradient_error(self, wanted: DiT) -> float:
        """Of this process's gradients, whole or in part."""
        if isinstance(self.loss, Zero1):
            return furthest(self.loss.gradients(), map(own_rows, grads(wanted)))
        return furthest(grads(self.net), grads(wanted))


def furthest(got, wanted) -> float:
    """The largest error of any tensor, relative to that tensor's largest entry."""
    errors = [
        (full_tensor(a.detach()) - b.detach()).abs().max() / b.detach().abs().max()
        for a, b in zip(got, wanted, strict=True)
    ]
    return max(errors).item()


def grads(net: DiT) -> list[Tensor]:
    return [p.grad for p in net.parameters()]


def gradient_error(
    rank: int, name: str, objective, checkpoint_blocks: bool, backend: str, batches=None, all_sizes: bool = False
) -> dict:
    batches = [batch(rank) for rank in range(RANKS)] if batches is None else batches
    # wide enough for DDP, whose first bucket holds 1 MB, to cut the compiled graph
    sizes = dict(hidden_size=96) if backend and name != "fsdp" else {}
    # each block is compiled
    sizes |= dict(depth=1) if backend and not all_sizes else {}
    wanted = network(**sizes)
    whole_loss(loss_of(objective, wanted), batches).backward()
    engine = Engine(name, objective, network(**sizes, checkpoint_blocks=checkpoint_blocks), backend=backend)
    if all_sizes:
        planned = MeanFlow(objective, BATCH)
        for sizes in planned.declared:
            engine.backward(batches[rank], planned.example(sizes))
    elif backend:
        engine.backward(batches[rank])
    with torch.compiler.set_stance("fail_on_recompile") if backend else nullcontext():
        terms = engine.backward(batches[rank])
    return {
        "error": engine.gradient_error(wanted),
        "guidance rows": len(plan_of(objective, batches[rank]).rows),
        "tangent recorded": terms.du_dt.requires_grad,
    }


# --- gradients ---

ENGINES = ("ddp", "fsdp")
KINDS = ("ddp", "zero1", "fsdp")


@pytest.mark.parametrize("checkpoint_blocks", (False, True), ids=("kept", "checkpointed"))
@pytest.mark.parametrize("name", KINDS)
def test_gradients_are_those_of_one_process(ranks, name, checkpoint_blocks):
    for found in ranks(gradient_error, name, GUIDED, checkpoint_blocks, ""):
        assert found["error"] < 1e-10 and found["guidance rows"] and not found["tangent recorded"]


@pytest.mark.parametrize(
    "name, checkpoint_blocks, objective",
    [
        # each kind of pass is compiled, and guidance is one more
        ("fsdp", False, UNGUIDED),
        pytest.param("fsdp", False, GUIDED, marks=pytest.mark.slow),
        pytest.param("ddp", False, GUIDED, marks=pytest.mark.slow),
        pytest.param("zero1", False, GUIDED, marks=pytest.mark.slow),
        pytest.param("zero1", True, GUIDED, marks=pytest.mark.slow),
        pytest.param("ddp", True, GUIDED, marks=pytest.mark.slow),
        pytest.param("fsdp", True, GUIDED, marks=pytest.mark.slow),
    ],
    ids=lambda x: {UNGUIDED: "unguided", GUIDED: "guided"}.get(x),
)
def test_compiled_gradients_are_those_of_one_process(ranks, name, checkpoint_blocks, objective):
    for found in ranks(gradient_error, name, objective, checkpoint_blocks, "aot_eager"):
        assert found["error"] < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("objective, backend", [(COIN, "aot_eager"), (GUIDED, "inductor")], ids=("coin", "inductor"))
@pytest.mark.parametrize("name", ENGINES)
def test_compiled_gradients_with_groups_of_any_size(ranks, name, objective, backend):
    for found in ranks(gradient_error, name, objective, False, backend, None, True):
        assert found["error"] < 1e-10


UNEVEN = {  # samples dropped and with r = t on each process
    "nobody guided on one": ((BATCH, 6), (1, 6)),
    "no derivative on one": ((1, BATCH), (1, 6)),
    "neither on one": ((1, 6), (BATCH, BATCH)),
    "nobody guided on any": ((BATCH, 6), (BATCH, 6)),
}


@pytest.mark.parametrize("shares", UNEVEN.values(), ids=UNEVEN)
@pytest.mark.parametrize("name", ENGINES)
def test_a_process_may_lack_what_another_has(ranks, name, shares):
    batches = [batch(rank, dropped=dropped, equal=equal) for rank, (dropped, equal) in enumerate(shares)]
    for found in ranks(gradient_error, name, COIN, False, "", batches):
        assert found["error"] < 1e-10
        # where nobody is guided the guidance forward, a collective operation under FSDP2, has rows all the same
        assert found["guidance rows"] > 0


# --- steps ---


def step_error(rank: int, name: str, objective, native: bool, dtype) -> float:
    """Three steps with the average of the weights, which guides: the error of both."""
    results = []
    for single in (True, False):
        net = network(dtype=dtype)
        ema = copy.deepcopy(net).requires_grad_(False)
        guide = ema if objective.guidance_weights == "ema" else None
        engine = loss_of(objective, net, guide) if single else Engine(name, objective, net, guide)
        if name == "fsdp" and not single and guide is None:
            shard(ema)
        params, averages = list(net.parameters()), list(ema.parameters())
        if name == "zero1" and not single:
            rows = OwnRows(net, ema, copies=False, guides=guide is not None)
            params, averages = rows.weights, rows.averages
        # the biases of keys have no gradient but rounding errors, which Adam without its eps would make steps of
        settings = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8 if dtype is F64 else 1e-2)
        if native:
            optimizer = AdamWEMA(params, **settings, emas={0.9: averages})
        else:
            optimizer = torch.optim.AdamW(params, **settings)
            optimizer.register_step_post_hook(lambda *_, a=averages, p=params: update_ema(a, p, 0.9))
        if name == "zero1" and not single:
            rows.follow(optimizer, engine.loss)
            params, averages = rows.net.parameters(), rows.ema.parameters()
        for step in range(3):
            batches = [batch(rank, step, dtype) for rank in range(RANKS)]
            if single:
                net.zero_grad()
                whole_loss(engine, batches).backward()
            else:
                engine.backward(batches[rank])
            norm = total_norm(engine if single else engine.loss, grads(net))
            optimizer.step()
        results.append([norm, *(full_tensor(x.detach()) for x in (*params, *averages))])
    return furthest(*reversed(results))


@pytest.mark.parametrize("objective", (GUIDED, BY_EMA), ids=("guided by itself", "guided by the average"))
@pytest.mark.parametrize("native", (False, True), ids=("torch", "native"))
@pytest.mark.parametrize("name", KINDS)
def test_steps_are_those_of_one_process(ranks, name, native, objective):
    for error in ranks(step_error, name, objective, native, F64):
        assert error < 1e-10


@pytest.mark.parametrize("name", KINDS)
def test_native_fp32_steps_are_those_of_one_process(ranks, name):
    for error in ranks(step_error, name, GUIDED, True, torch.float32):
        assert error < 1e-5


# --- bf16 ---


def bf16_error(rank: int) -> dict:
    batches = [batch(rank, dtype=torch.float32) for rank in range(RANKS)]
    nets = [network(torch.float32, compute_dtype=dtype) for dtype in (None, torch.bfloat16, torch.bfloat16)]
    for net in nets:
        for block in net.blocks:
            # the parameters of a block that one process uses in fp32, and that are gathered in bf16
            for layer in (block.attn.proj, block.mlp.fc1, block.mlp.fc2):
                layer.bias.data = layer.bias.data.bfloat16().float()
    wanted, single, sharded = nets
    engine = Engine("fsdp", GUIDED, sharded)
    for net in (wanted, single):
        # planned, for what is rounded depends on the samples that are computed together
        whole_loss(loss_of(GUIDED, net), batches, planned=True).backward()
    seen = {}
    block = engine.net.blocks[1]
    block.attn.register_forward_pre_hook(lambda attn, _: seen.update(weight=attn.qkv.weight.dtype))
    block.register_forward_hook(lambda _, __, residual: seen.update(residual=residual.x.primal.dtype))
    terms = engine.backward(batches[rank])
    flat = [torch.cat([full_tensor(g).flatten() for g in grads(net)]) for net in nets]
    return seen | {
        "output": terms.u.dtype,
        "grad": engine.net.blocks[0].attn.qkv.weight.grad.dtype,
        "to fp32": [((g - flat[0]).norm() / flat[0].norm()).item() for g in flat[1:]],
        "to one process": ((flat[2] - flat[1]).norm() / flat[1].norm()).item(),
    }


def test_sharded_bf16_is_that_of_one_process(ranks):
    for found in ranks(bf16_error):
        assert found["weight"] == torch.bfloat16
        assert found["residual"] == found["output"] == found["grad"] == torch.float32
        single, sharded = found["to fp32"]
        assert 1e-3 < single < 0.05 and sharded < 1.1 * single
        # what rounds is the same, but for the gradients of those biases
        assert found["to one process"] < 1e-4


# --- memory ---


def kept(rank: int, name: str, checkpoint_blocks: bool) -> dict:
    """Bytes saved for backward, parameters excluded, and the tangents of tokens still alive after the forward."""
    found = {}
    for case, objective in (("plain", replace(GUIDED, share_equal=1.0)), ("dual", GUIDED)):
        engine = Engine(name, objective, network(checkpoint_blocks=checkpoint_blocks))
        saved: dict[int, int] = {}

        def pack(x, saved=saved, net=engine.net):
            # gathered parameters are looked up while they are there
            own = {local(p).untyped_storage().data_ptr() for p in net.parameters()}
            if (storage := local(x).untyped_storage()).data_ptr() not in own:
                saved[storage.data_ptr()] = storage.nbytes()
            return x

        inputs = batch(rank, equal=BATCH if case == "plain" else 6)
        # what the tests before left in cycles, compiled ones above all
        gc.collect()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            terms = engine.terms(inputs)
        n = len(terms.du_dt)
        alive = [x for x in gc.get_objects() if type(x) is Tensor and x.dim() == 3 and len(x) == n]
        found[case] = sum(saved.values()), len(alive) if n else 0
        terms.loss.backward()
    return found


def local(x: Tensor) -> Tensor:
    return x.to_local() if hasattr(x, "to_local") else x


@pytest.mark.parametrize("checkpoint_blocks", (False, True), ids=("kept", "checkpointed"))
@pytest.mark.parametrize("name", ENGINES)
def test_tangents_are_not_kept(ranks, name, checkpoint_blocks):
    for found in ranks(kept, name, checkpoint_blocks):
        (plain, _), (dual, tangents) = found["plain"], found["dual"]
        assert plain > 0 and abs(dual / plain - 1) < 0.02
        assert tangents == 0
