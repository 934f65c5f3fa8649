"""Serve a local web page to sample from a model: meanflow/apps/page.py; --help explains it."""

import startup

if __name__ == "__main__":
    startup.run("page")
