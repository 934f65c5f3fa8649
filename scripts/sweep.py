"""Find the guidance that a trained network samples best with: meanflow/apps/sweep.py; --help explains it."""

import startup

if __name__ == "__main__":
    startup.run("sweep")
