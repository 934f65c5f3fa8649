"""Configurations as plain values for JSON, and back."""

from dataclasses import asdict, fields

from .config import RunConfig
from .errors import UserError, require
from .objective_options import KINDS

# for their kinds
from .recipes import consistency, flow  # noqa: F401


def to_dict(config: RunConfig) -> dict:
    """Convert a configuration to plain values for JSON."""
    sections = {
        section: {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
        for section, values in asdict(config).items()
    }
    if config.objective.kind:
        sections["objective"]["kind"] = config.objective.kind
    return sections


def from_dict(values: dict) -> RunConfig:
    """Build a configuration from :func:`to_dict`'s values.

    Raises:
        UserError: for a name that is not an option, a missing one, or a value out of range.
    """
    sections = {}
    for section in fields(RunConfig):
        options, made = dict(values.get(section.name, {})), section.type
        if section.name == "objective":
            kind = options.pop("kind", "")
            wanted = f"one of {sorted(KINDS)}"
            require(kind in KINDS, "config.objective.kind", kind, wanted, "was it written by this version?")
            made = KINDS[kind]
        if options.get("network") == "imf":
            # the first such networks had no other
            options = {"conditioning": "in_context", "guidance_input": "interval"} | options
        unknown = options.keys() - {option.name for option in fields(made)}
        require(
            not unknown, f"config.{section.name}", sorted(unknown), "known options", "was it written by this version?"
        )
        try:
            sections[section.name] = made(
                **{key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
            )
        except TypeError as error:
            raise UserError(
                f"config.{section.name}: got {options!r}, wanted all its options ({error}); "
                "was it written by this version?"
            ) from None
    return RunConfig(**sections)
