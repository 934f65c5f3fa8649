"""Sweep one axis of the paper's ablations on digits: meanflow/apps/ablate.py; --help explains it."""

import startup

if __name__ == "__main__":
    startup.run("ablate")
