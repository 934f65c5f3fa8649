"""Generate images from a trained model: meanflow/apps/sample.py; --help explains it."""

import startup

if __name__ == "__main__":
    startup.run("sample")
