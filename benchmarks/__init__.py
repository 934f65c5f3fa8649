"""Benchmarks of the kernels and of the step: read off the compiler without a GPU, and measured on one.

On top stand the commands (``python -m benchmarks.NAME``) and the benches of the operators (``bench_*.py``, for pytest).
Their helpers are in the rooms: ``harness`` (how everything is timed), ``counting`` (work counted, not computed),
``workloads`` (what is timed), ``parts`` (of the suite), ``pages`` (of the report), ``static`` (what the compilers
make of a kernel) and ``tuning``. No helper imports a command.
"""

import sys

from meanflow.startup import choose_waiting, enter

if sys.argv[0] == "-m":  # python -m benchmarks.NAME, and not where another program imports one
    enter("benchmarks", ("numpy", "torch"))
    choose_waiting()
