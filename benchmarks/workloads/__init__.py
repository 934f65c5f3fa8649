"""What is timed: the step by variant, the operators by variant, the decoders, and how they take turns."""
