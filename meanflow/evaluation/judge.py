"""Scores of the average's one-step samples during training: pictures by a classifier, latents by FID."""

from collections.abc import Callable
from pathlib import Path

from torch import nn

from ..config import RunConfig
from ..data.dataset import Dataset
from ..data.decoder import make_decoder
from ..errors import require
from ..world import World

Judge = Callable[[nn.Module], dict[str, float]]

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth, from github.com/mseitzer/pytorch-fid/releases"


def make_judge(config: RunConfig, guidance: tuple[float, ...], dataset: Dataset, world: World, kept: Path) -> Judge:
    """Make a function from a network to its scores by name, which all processes call together.

    Args:
        guidance: what the network is told of it.
        kept: folder for features of the reference, for the next time.

    Raises:
        UserError: for weights or statistics that are missing.
    """
    if config.data.in_pixels:
        from .classifier import ClassifierJudge

        judge = ClassifierJudge(config.data)
        return lambda net: judge.score_net(net, world.device, guidance=guidance).as_dict()
    from .evaluator import Evaluator
    from .features import Extractor
    from .fid_reference import load_reference
    from .protocols import OFFICIAL

    options = config.evaluation
    file, hint = options.inception, "name the file by --evaluation.inception, or set evaluation.every 0"
    require(file != "", "evaluation.inception", file, WEIGHTS, hint)
    extractor = Extractor(Path(options.inception), world.device)
    path = Path(options.reference) if options.reference else None
    reference = load_reference("adm", path, extractor, OFFICIAL.resize, kept, config.train.batch // world.size, world)
    decode = make_decoder(config.data, world.device)
    shape, classes = dataset.shape, config.model.num_classes
    evaluator = Evaluator(extractor, reference, decode, shape, classes, world=world, guidance=guidance)
    return lambda net: evaluator.score(net, options.count)
