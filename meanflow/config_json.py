"""Configurations as plain values for JSON, and back."""

from dataclasses import asdict, fields

from .config import RunConfig
from .errors import UserError, require


def to_dict(config: RunConfig) -> dict:
    """Convert a configuration to plain values for JSON."""
    return {
        section: {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
        for section, values in asdict(config).items()
    }


def from_dict(values: dict) -> RunConfig:
    """Build a configuration from :func:`to_dict`'s values.

    Raises:
        UserError: for a name that is not an option, a missing one, or a value out of range.
    """
    sections = {}
    for section in fields(RunConfig):
        options = dict(values.get(section.name, {}))
        unknown = options.keys() - {option.name for option in fields(section.type)}
        require(
            not unknown, f"config.{section.name}", sorted(unknown), "known options", "was it written by this version?"
        )
        try:
            sections[section.name] = section.type(
                **{key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
            )
        except TypeError as error:
            raise UserError(
                f"config.{section.name}: got {options!r}, wanted all its options ({error}); "
                "was it written by this version?"
            ) from None
    return RunConfig(**sections)
