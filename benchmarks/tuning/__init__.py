"""What the tuner sweeps, how it tries a launch config, and how it compiles ahead."""
