"""Steps of small guided runs, and what of them is compared."""

from dataclasses import replace

import pytest
import runs
import torch

from meanflow.training.trainer import Trainer

GUIDED = {"omega": 0.2, "kappa": 0.92, "guidance_end": 0.6, "label_drop": 0.2}


def config(objective=None, batch=16, **options):
    base = runs.tiny(batch=batch, **options)
    guided = GUIDED | {"share_equal": 0.75} if base.objective.guidance_input == "none" else {"label_drop": 0.2}
    return replace(base, objective=replace(base.objective, **(guided | (objective or {}))))


def steps_of(run, out, count, world=None):
    """(terms of interest, gradient, its norm, sizes) of some steps of a run, and the trainer after them."""
    trainer, rows = Trainer(run, out, world), []
    for p in trainer.net.parameters():  # adaLN-Zero starts as the identity
        generator = torch.Generator().manual_seed(p.numel())
        p.data.copy_(0.1 * torch.randn(p.shape, generator=generator))
    for step in range(count):
        micro_batches = trainer.inputs(step)
        done = trainer.make_step(*(inputs.to(trainer.device) for inputs in micro_batches))
        loss = sum(terms.loss.item() for terms in done.terms) / len(done.terms)
        raw = torch.cat([terms.raw.cpu() for terms in done.terms])
        sizes = len(micro_batches[-1].plan.rows), micro_batches[-1].plan.tangent_start
        gradient = torch.cat([p.grad.flatten() for p in trainer.net.parameters()]).cpu()
        rows.append((loss, raw, gradient, done.grad_norm.item(), sizes))
    return rows, trainer


def assert_same_steps(got, wanted, rtol):
    for step, wanted_step in zip(got, wanted, strict=True):
        loss, raw, gradient, norm, sizes = step
        loss_wanted, raw_wanted, gradient_wanted, norm_wanted, sizes_wanted = wanted_step
        assert sizes == sizes_wanted
        assert loss == pytest.approx(loss_wanted, rel=rtol) and norm == pytest.approx(norm_wanted, rel=10 * rtol)
        torch.testing.assert_close(raw, raw_wanted, rtol=rtol, atol=0)
        assert (gradient - gradient_wanted).norm() <= 10 * rtol * norm_wanted
