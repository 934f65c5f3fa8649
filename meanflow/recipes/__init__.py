"""What is trained beside MeanFlow: the options of the other objectives, and their presets."""
