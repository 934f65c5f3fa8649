"""Train digits and generate them in one step: meanflow/apps/quickstart.py; --help explains it."""

import startup

if __name__ == "__main__":
    startup.run("quickstart")
