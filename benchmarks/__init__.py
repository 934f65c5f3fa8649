"""The stopwatch room: what the kernels cost, read off the compiler without a GPU and measured on one."""
