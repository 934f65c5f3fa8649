"""Write the weights of a run as one safetensors file: meanflow/apps/export.py; --help explains it."""

import startup

if __name__ == "__main__":
    startup.run("export")
