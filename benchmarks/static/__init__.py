"""Reading a kernel's compilers without a GPU: PTX, SASS, registers and occupancy."""
