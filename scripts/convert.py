"""Convert weights between formats: meanflow/apps/convert.py; --help explains it."""

import startup

if __name__ == "__main__":
    startup.run("convert")
