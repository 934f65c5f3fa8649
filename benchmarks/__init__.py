"""The stopwatch room: what the kernels cost, read off the compiler without a GPU and measured on one."""

import sys

from meanflow.startup import enter

if sys.argv[0] == "-m":  # python -m benchmarks.NAME, and not where another program imports one
    enter("benchmarks", ("numpy", "torch"))
