"""Captured steps of a tiny network on the stand-in, one of every declared size, in the processes that torchrun starts.

python tests/standin/run.py -m torch.distributed.run --nproc-per-node 1 tests/standin/train.py batch=8
STANDIN_DEVICES=2 python tests/standin/run.py -m torch.distributed.run --nproc-per-node 2 tests/standin/train.py \
    accumulate=2

Words name=value are options of train.*, whole numbers or names.
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

# what a command does before it imports torch
import meanflow.apps  # noqa: F401

# isort: split
import runs

from meanflow.training import parallel
from meanflow.training.trainer import Trainer
from meanflow.world import World

parallel.BUCKET_MB = 0.01  # several for so small a network


def main(words: list[str]) -> None:
    options = {name: int(value) if value.isdigit() else value for name, value in (word.split("=") for word in words)}
    run = runs.tiny(**{"batch": 32, "device": "cuda", "cuda_graph": True} | options)
    # several sizes of both groups
    objective = replace(run.objective, omega=0.2, kappa=0.92, equal_placement="bernoulli", label_drop=0.2)
    with World("cuda") as world, tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(replace(run, objective=objective), Path(folder), world)
        step = 0
        for sizes in reversed(trainer.objective.declared):
            plan = trainer.objective.example(sizes)
            trainer.train_step(tuple(inputs._replace(plan=plan) for inputs in trainer.inputs(step)))
            step += 1
        trainer.make_step.drop_graphs()
        print(f"process {world.rank + 1} of {world.size}: {step} steps, a size each", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
