"""What the compilers say of a kernel: PTX, SASS, registers and occupancy, without a GPU."""
