"""Launch config of silu, one for all widths and architectures."""

# 8 elements a thread: one 16-byte load of 16-bit data, two of fp32; no reuse, so many small programs
BLOCK, NUM_WARPS = 1024, 4
