"""ImageNet's path at small size, with the real parts: images, latents, two processes, a kill, one, samples, FID."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import caches
import fid_inputs
import numpy as np
import pytest
from fresh import ROOT, environment
from safetensors.torch import save_file

from meanflow.evaluation.inception import Inception

MODEL = (
    "--model.input-size 8 --model.in-channels 4 --model.num-classes 3 --model.depth 1 --model.hidden-size 32 "
    "--model.num-heads 2"
)
RUN = "--train.batch 8 --train.groups 2 --train.log-every 1 --train.save-every 2 --train.sample-every 1000"


def rank_of(pid: str) -> str | None:
    """The rank of a process, from its environment."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((v.decode().removeprefix("RANK=") for v in variables if v.startswith(b"RANK=")), None)


def workers(job: subprocess.Popen) -> dict[str, int]:
    """The processes that torchrun started, by their rank."""
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    return {rank: int(pid) for pid in children if (rank := rank_of(pid)) is not None}


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds processes the Linux way")


def images_to_samples(command, tmp_path) -> tuple[Path, Path, Path]:
    """The way up to samples that were judged while training: the run, the Inception's weights, the reference."""
    images, vae = caches.image_folder(tmp_path / "images"), caches.tiny_vae(tmp_path / "vae")
    latents, inception, run = tmp_path / "latents", tmp_path / "inception.safetensors", tmp_path / "run"
    save_file(fid_inputs.weights({name: tuple(x.shape) for name, x in Inception().state_dict().items()}), inception)

    options = f"--vae {vae} --image-size {caches.SIZE} --shard-rows 7 --inception {inception} --device cpu"
    code, said, err = command("prepare_data", "encode", images, "--out", latents, *options.split())
    assert code == 0 and "20 latents 4x8x8 fp16 in 3 shards" in said, err
    assert command("prepare_data", "verify", latents)[0] == 0

    data = f"--data.name latents --data.path {latents} --data.vae {vae} --train.device cpu"
    judge = f"--evaluation.every 4 --evaluation.count 4 --evaluation.inception {inception}"
    judge = [*judge.split(), "--evaluation.reference", str(latents / "reference.npz")]
    arguments = ["digits", "--out", str(run), *f"{MODEL} {RUN} {data}".split()]
    train = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    job = subprocess.Popen(
        [*train, str(ROOT / "scripts" / "train.py"), *arguments, "--train.parallel", "fsdp", "--train.steps", "5000"],
        env=environment() | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_for(lambda: (run / "checkpoints" / "step_00000004").exists() or job.poll() is not None)
        assert job.poll() is None
        os.kill(workers(job)["1"], signal.SIGKILL)
        start = time.monotonic()
        assert job.wait(60) != 0 and time.monotonic() - start < 60
    finally:
        job.kill()

    last = max(int(p.name[5:13]) for p in (run / "checkpoints").glob("step_????????"))
    steps = last + 2
    code, said, err = command("train", *arguments, *judge, "--train.steps", steps)
    assert code == 0 and f"resuming from step {last}" in said and f"finished at step {steps}" in said, err
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    scores = [json.loads(line) for line in (run / "scores.jsonl").read_text().splitlines()]
    assert scores[-1]["step"] == steps and np.isfinite(scores[-1]["fid"]) and scores[-1]["fid"] > 0

    code, said, err = command("sample", run, "--count", 6, "--columns", 3, "--out", tmp_path / "samples")
    assert code == 0, err
    assert np.load(tmp_path / "samples.npz")["images"].shape == (6, caches.SIZE, caches.SIZE, 3)

    return run, inception, latents / "reference.npz"


def test_images_to_frechet_distance_with_a_fault_between(command, tmp_path):
    images_to_samples(command, tmp_path)


@pytest.mark.slow
def test_images_to_scores_with_their_errors(command, tmp_path):
    run, inception, reference = images_to_samples(command, tmp_path)
    options = f"--count 20 --batch 8 --protocols own-data --inception {inception} --device cpu --json"
    code, said, err = command(
        "evaluate", run, "--out", tmp_path / "scores", "--data-reference", reference, *options.split()
    )
    assert code == 0, err
    fid = next(iter(found(json.loads(said), "fid")))
    assert np.isfinite(fid) and fid > 0


def found(values, name):
    """Every number of this name in a report."""
    if isinstance(values, dict):
        for key, value in values.items():
            if key == name and not isinstance(value, list):
                yield value["value"] if isinstance(value, dict) else value
            else:
                yield from found(value, name)
    elif isinstance(values, list):
        for value in values:
            yield from found(value, name)


def wait_for(done, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "took too long"
        time.sleep(0.1)
