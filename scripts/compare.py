"""Compare objectives at equal FLOPs: meanflow/apps/compare.py; --help explains it."""

import startup

if __name__ == "__main__":
    startup.run("compare")
