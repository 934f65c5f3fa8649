"""What was written before meanflow/ had rooms: a run, a pipeline and a cache resume, load and verify; old names import.

Made by commit 0c2f86a: two steps of digits by a network of one block, a pipeline of it, six latents in two shards.
"""

import importlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import runs
import torch

import meanflow
from meanflow.data.cache import Cache, verify
from meanflow.interop.weights import load_ema
from meanflow.training.trainer import train

FORMER = Path(__file__).parents[1] / "data" / "before_rooms"
# of steps 3 and 4, that commit's continuation
CONTINUED = {"raw": (100.32032012939453, 111.33073425292969), "grad_norm": (0.6584047675132751, 0.5786595344543457)}


def test_a_run_resumes(tmp_path):
    shutil.copytree(FORMER / "run", tmp_path / "run")
    config = runs.tiny(steps=4, save_every=2, log_every=1, sample_every=2)
    assert train(replace(config, model=replace(config.model, hidden_size=8)), tmp_path / "run") == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for name, values in CONTINUED.items():
        assert [row[name] for row in rows[2:]] == pytest.approx(values, rel=1e-5), name


def test_a_pipeline_loads():
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    from meanflow.interop.convert import load_pipeline

    pipeline = load_pipeline(FORMER / "pipeline")
    net, _, _, step = load_ema(FORMER / "run", torch.device("cpu"))
    weights = pipeline.transformer.state_dict()
    assert step == 2 and all(torch.equal(weights[name], x) for name, x in net.state_dict().items())
    images = pipeline([3, 7], num_inference_steps=1, generator=torch.Generator().manual_seed(0)).images
    assert len(images) == 2


def test_a_cache_verifies():
    assert verify(FORMER / "cache") == []
    cache, numbers = Cache(FORMER / "cache"), np.random.default_rng(0)
    mean = numbers.normal(size=(6, 2, 4, 4)).astype(np.float32).astype(np.float16)
    found, _ = cache.posterior(np.array([5, 0]), None)
    assert (found == mean[[5, 0]]).all() and cache.labels.tolist() == [0, 1, 2, 0, 1, 2]


def test_old_names_are_the_same_modules():
    for old, new in meanflow.FORMER.items():
        try:
            found = importlib.import_module(f"meanflow.{old}")
        except ModuleNotFoundError as error:  # of another package that is not installed
            assert not error.name.startswith("meanflow"), error
            continue
        assert found is importlib.import_module(f"meanflow.{new}"), old
    from meanflow.data import open_dataset
    from meanflow.evaluation import Evaluator
    from meanflow.training import Trainer

    assert [x.__module__ for x in (open_dataset, Evaluator, Trainer)] == [
        "meanflow.data.dataset", "meanflow.evaluation.evaluator", "meanflow.training.trainer",
    ]  # fmt: skip
    with pytest.raises(ModuleNotFoundError, match="meanflow.none"):
        importlib.import_module("meanflow.none")
    with pytest.raises(ImportError, match="cannot import name 'none' from 'meanflow.data'"):
        from meanflow.data import none  # noqa: F401
