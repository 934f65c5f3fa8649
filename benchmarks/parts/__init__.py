"""The parts of the suite: their commands, and which of them runs when."""
