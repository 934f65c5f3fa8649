"""Build the objective of a configuration."""

from ..config import ObjectiveConfig, RunConfig
from ..method.contract import Objective
from ..recipes.consistency import IctConfig, ImmConfig, ScmConfig
from ..recipes.flow import AlphaFlowConfig, ShortcutConfig, SoFlowConfig
from .alpha_flow import AlphaFlow
from .ict import Ict
from .imm import Imm
from .meanflow import MeanFlow
from .scm import Scm
from .shortcut import Shortcut
from .soflow import SoFlow

OBJECTIVES: dict[type, type[Objective]] = {
    ObjectiveConfig: MeanFlow,
    IctConfig: Ict,
    ScmConfig: Scm,
    ShortcutConfig: Shortcut,
    SoFlowConfig: SoFlow,
    ImmConfig: Imm,
    AlphaFlowConfig: AlphaFlow,
}
"""By the class of their options."""


def make_objective(run: RunConfig, processes: int = 1) -> Objective:
    """The objective of a run in so many processes.

    Raises:
        UserError: for a batch that does not divide.
    """
    train = run.train
    made = OBJECTIVES[type(run.objective)]
    return made(run.objective, train.batch, train.groups or processes, processes * train.accumulate, train.steps)
