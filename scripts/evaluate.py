"""Judge a trained model: meanflow/apps/evaluate.py; --help explains it."""

import startup

if __name__ == "__main__":
    startup.run("evaluate")
