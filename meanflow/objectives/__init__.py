"""The objectives: what a step draws, which passes it makes, and how it mixes them into a loss."""
