"""What a long or a large run asks: memory that does not grow, ImageNet-512's latents."""

import json
from dataclasses import replace

import caches
import numpy as np
import pytest
import runs

from benchmarks.counting.accounts import account
from meanflow.config import DataConfig, ModelConfig, ObjectiveConfig, OptimConfig, RunConfig, TrainConfig
from meanflow.training.trainer import Trainer, train

SOAK_STEPS = 20_000


@pytest.mark.slow
def test_resident_memory_is_flat_over_20000_steps(tmp_path):
    """With the log, checkpoints, pictures and prefetching of a real run."""
    options = {"steps": SOAK_STEPS, "batch": 4, "log_every": 100, "save_every": 2000, "sample_every": 5000}
    assert train(runs.tiny(**options), tmp_path) == 0
    memory = np.array([row["memory_gb"] for row in rows(tmp_path)])
    assert len(memory) == SOAK_STEPS // 100
    quarter = len(memory) // 4
    # the first quarter warms caches up; from then on the slope is noise: less than 20 MB over the rest
    assert abs(np.median(memory[-quarter:]) - np.median(memory[quarter : 2 * quarter])) < 0.02
    assert memory[-quarter:].max() - memory[quarter : 2 * quarter].max() < 0.05


def rows(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def of_512(folder, steps=2) -> RunConfig:
    """Latents of 512 x 512 pixels: 4 x 64 x 64, 1,024 tokens of a patch of 2."""
    g = np.random.default_rng(0)
    mean, std = g.normal(size=(12, 4, 64, 64)).astype(np.float16), np.full((12, 4, 64, 64), 0.1, np.float16)
    cache = caches.cache_of(folder, mean, std, np.arange(12) % 3)
    return RunConfig(
        model=ModelConfig(depth=1, hidden_size=32, num_heads=2, patch_size=2, input_size=64, num_classes=3),
        objective=ObjectiveConfig(share_equal=0.5, omega=0.5, kappa=0.5),
        optim=OptimConfig(),
        data=DataConfig(path=str(cache), vae=str(folder / "vae")),
        train=TrainConfig(steps=steps, batch=4, log_every=1, sample_every=99, device="cpu"),
    )


def test_imagenet_512_goes_through_cache_and_trainer(tmp_path, capsys):
    config = of_512(tmp_path / "data")
    assert config.model.tokens == 1024
    assert train(config, tmp_path / "run") == 0
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2]
    assert "no pictures of samples" in capsys.readouterr().out  # the autoencoder is not there, and that is said


def test_imagenet_512_goes_through_accounting():
    small, large = (
        account(
            RunConfig(
                ModelConfig(depth=2, hidden_size=128, num_heads=2, patch_size=2, input_size=size),
                ObjectiveConfig(omega=1.0, kappa=0.5),
                OptimConfig(),
                DataConfig(),
                TrainConfig(steps=1, batch=8, precision="bf16"),
            ),
            batches=4,
        )
        for size in (32, 64)
    )
    # four times the tokens: the products of linear layers by four, of attention by sixteen
    linear = large["forward_flops"] - large["forward_attention_flops"]
    assert linear == pytest.approx(4 * (small["forward_flops"] - small["forward_attention_flops"]), rel=0.01)
    assert large["forward_attention_flops"] == 16 * small["forward_attention_flops"]
    assert large["saved_bytes"] == pytest.approx(4 * small["saved_bytes"], rel=0.1)


def test_latents_of_another_size_are_refused(tmp_path):
    config = of_512(tmp_path / "data")
    with pytest.raises(ValueError, match=r"data: got \(4, 64, 64\), wanted samples of the model's shape \(4, 32, 32\)"):
        Trainer(replace(config, model=replace(config.model, input_size=32)), tmp_path / "run")
