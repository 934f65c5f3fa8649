"""Train a MeanFlow model: meanflow/apps/train.py; --help explains it."""

import startup

if __name__ == "__main__":
    startup.run("train")
