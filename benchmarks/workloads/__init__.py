"""The timed workloads: the step by variant, the operators by variant, the decoders; and the timer of the step."""
