"""Weights of other projects, and diffusers: read, converted, written."""
