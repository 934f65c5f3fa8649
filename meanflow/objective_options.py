"""What a run asks of its objective's options, whichever objective that is."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

Form = Literal["boundary", "plain", "diffusers"]
"""EDM's factors of a denoiser, and others: see `meanflow.method.edm.scalings`."""
TimeInput = Literal["log_sigma", "angle"]


@dataclass(frozen=True)
class Denoising:
    """How a network denoises x + sigma e: D = c_skip (x + sigma e) + c_out net (`meanflow.method.edm`)."""

    sigma_data: float
    """Standard deviation of the data as it is trained on."""
    sigma_max: float
    """The highest level, at which sampling begins."""
    sigma_min: float = 0.0
    """The level at which D is the identity, for the form boundary."""
    form: Form = "plain"
    """Of the factors."""
    time_input: TimeInput = "log_sigma"
    """What the network is told of the level: ln(sigma) / 4, or atan(sigma / sigma_data)."""


@dataclass(frozen=True)
class Pushing:
    """How a network pushes samples from a time to an earlier one (`meanflow.method.pushforward`)."""

    sigma_data: float
    """Standard deviation of the data as it is trained on."""
    t_min: float
    """The time of data."""
    t_max: float
    """The time of noise."""
    omega: float = 1.0
    """Scale of guidance."""


@dataclass(frozen=True)
class ObjectiveOptions:
    """Base of an objective's options, a frozen dataclass: ``class NameConfig(ObjectiveOptions, kind="name")``.

    A preset decides which class a run has. Its kind stands in the run's config.json beside the options.
    """

    kind: ClassVar[str] = ""
    """Its name in config.json; MeanFlow's is "", which is not written."""
    time_embeddings: ClassVar[tuple[str, ...]] = ("t,h", "t,r", "t,r,h", "h", "t")
    """What the network may be told of its times (model.time_embedding); a level is that of a step h > 0."""
    guidance_input: ClassVar[str] = "none"
    """What the network is told of its guidance."""
    v_head: ClassVar[bool] = False
    """Whether the network has a head for v."""
    log_variance: ClassVar[bool] = False
    """Whether the network learns the log-variance of its error."""
    renoises: ClassVar[bool] = False
    """Whether sampling in several steps goes to the data each time, and adds new noise, as consistency models do."""
    pushes: ClassVar[bool] = False
    """Whether sampling pushes through times of its own, as `pushing` says."""

    def __init_subclass__(cls, kind: str = "", **options: Any):
        super().__init_subclass__(**options)
        KINDS[kind], cls.kind = cls, kind

    def check(self, run: Any) -> None:
        """Raise UserError where the options do not fit the rest of a run's configuration; `RunConfig` compares what
        stands above with the network.
        """

    @property
    def denoising(self) -> Denoising | None:
        """How a network of this objective denoises; None for an average velocity u(z, r, t, y)."""
        return None

    @property
    def finest_level(self) -> int | None:
        """Sampling steps are of the lengths 2^-k for k up to this level; None: of any length."""
        return None

    @property
    def pushing(self) -> Pushing | None:
        """How it pushes samples through its own times; None where it does not."""
        return None


KINDS: dict[str, type[ObjectiveOptions]] = {}
"""The classes of options by kind."""
