"""Launch config of timestep_embedding."""

# one sample a program: a launch of a few microseconds whatever is chosen
NUM_WARPS = 1
