"""The commands: `python scripts/NAME.py` in a checkout, `meanflow-NAME` where it is installed."""

from ..startup import choose_waiting

choose_waiting()  # before a command imports torch
