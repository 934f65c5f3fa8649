"""MeanFlow: one-step image generators, trained with fused forward-mode operators. README.md here maps the rooms."""

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec

FORMER = {
    "ablation": "apps.ablate", "cache": "data.cache", "card": "interop.card", "checkpoint": "storage.checkpoint",
    "convert": "interop.official_weights", "converters": "interop.convert", "copies": "model.copies",
    "decoding": "data.decoding", "digits_evaluation": "evaluation.classifier", "dit": "model.dit",
    "engine": "training.engine", "entries": "data.entries", "features": "evaluation.features",
    "flax_files": "storage.flax_files", "flops": "training.flops", "foreign": "storage.foreign",
    "frechet": "evaluation.frechet", "guard": "training.guard", "images": "data.images",
    "importers": "data.import_latents", "inception": "evaluation.inception", "judge": "evaluation.judge",
    "labels": "data.labels", "microbatch": "method.microbatch", "objective": "objectives.meanflow",
    "optim": "training.optim", "page": "apps.page", "pairs": "model.pairs", "parallel": "training.parallel",
    "peaks": "training.peaks", "pipeline": "interop.pipeline", "plan": "objectives.meanflow_plan",
    "prefetch": "training.prefetch", "preparation": "data.preparation", "protocols": "evaluation.protocols",
    "quickstart": "apps.comparison", "reference": "evaluation.fid_reference", "runlog": "training.runlog",
    "sampling": "method.sampling", "scheduler": "interop.scheduler", "scores": "evaluation.scores",
    "sit": "interop.sit", "sources": "data.sources", "step": "training.step", "tars": "data.tars",
    "times": "method.times", "transformer": "interop.transformer", "vae": "data.vae", "weights": "interop.weights",
}  # fmt: skip
"""Where the modules of the flat package are now. Saved pipelines name theirs, and so does the code of users."""


class _Former(MetaPathFinder, Loader):
    """Imports meanflow.OLD as the module that it has become, the same object."""

    def find_spec(self, name, path=None, target=None):
        package, _, old = name.rpartition(".")
        return ModuleSpec(name, self) if package == __name__ and old in FORMER else None

    def exec_module(self, module):
        sys.modules[module.__name__] = importlib.import_module(f"{__name__}.{FORMER[module.__name__.split('.')[1]]}")


sys.meta_path.append(_Former())
