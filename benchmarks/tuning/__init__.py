"""The tuner's subjects, its trials of a launch config, and compiling ahead of them."""
