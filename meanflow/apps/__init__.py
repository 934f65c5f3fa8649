"""The commands: `python scripts/NAME.py` in a checkout, `meanflow-NAME` where it is installed."""

from ..startup import choose_waiting, keep_compiled, see_own_gpu

# before a command imports torch
choose_waiting()
keep_compiled()
see_own_gpu()
