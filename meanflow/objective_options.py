"""What a run asks of its objective's options, whichever objective that is."""

from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class ObjectiveOptions:
    """Base of an objective's options, a frozen dataclass: ``class NameConfig(ObjectiveOptions, kind="name")``.

    A preset decides which class a run has. Its kind stands in the run's config.json beside the options.
    """

    kind: ClassVar[str] = ""
    """Its name in config.json; MeanFlow's is "", which is not written."""
    guidance_input: ClassVar[str] = "none"
    """What the network is told of its guidance."""
    log_variance: ClassVar[bool] = False
    """Whether the network learns the log-variance of its error."""

    def __init_subclass__(cls, kind: str = "", **options: Any):
        super().__init_subclass__(**options)
        KINDS[kind], cls.kind = cls, kind

    def check(self, run: Any) -> None:
        """Raise UserError where the options do not fit the rest of a run's configuration."""

    def velocity(self, net: Any) -> Any:
        """A network of this objective as sampling takes it: an average velocity u(z, r, t, y)."""
        return net


KINDS: dict[str, type[ObjectiveOptions]] = {}
"""The classes of options by kind."""
