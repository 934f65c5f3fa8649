"""The parts of the suite: their commands, and the schedule that runs them."""
