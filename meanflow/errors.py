"""The errors a user can cause or must act on, each one clear line."""


class UserError(ValueError):
    """Bad input: says the name, what it got, what it wanted and what to do. The commands exit with code 2."""


class TrainingStopped(RuntimeError):
    """Training cannot go on (a loss that is not finite). The commands exit with code 1."""


def require(condition: bool, name: str, got: object, wanted: str, hint: str) -> None:
    """Raise the one-line :class:`UserError` unless the condition holds."""
    if not condition:
        raise UserError(f"{name}: got {got!r}, wanted {wanted}; {hint}")
