"""These tests are collected before those of the kernels, which choose Triton's interpreter before its first import."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
