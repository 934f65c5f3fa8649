"""Prepare the latents that ImageNet models are trained on: meanflow/apps/prepare_data.py; --help explains it."""

import startup

if __name__ == "__main__":
    startup.run("prepare_data")
