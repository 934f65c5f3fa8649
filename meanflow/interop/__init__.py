"""Weights of anyone, and diffusers: read, converted, written."""
