"""What the tests of conversions share: the command, equality bit for bit, and SiT."""

import contextlib
import io
import sys
from unittest import mock

import numpy as np
import torch
from torch import nn

from meanflow import cli
from meanflow.apps import convert
from meanflow.model.dit import position_table


def run_convert(*args: object) -> tuple[int, str, str]:
    """Run the command convert in this process: exit code, output, error output."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with mock.patch.object(sys, "argv", ["convert.py", *map(str, args)]):
            try:
                cli.run(convert.main)
            except SystemExit as exit:
                code = exit.code or 0
    return code, out.getvalue(), err.getvalue()


def assert_equal(a: dict, b: dict) -> None:
    """Two trees of tensors or arrays, bit for bit."""
    assert a.keys() == b.keys()
    for name in a:
        x, y = (t if isinstance(t, torch.Tensor) else torch.from_numpy(np.array(t)) for t in (a[name], b[name]))
        assert x.dtype == y.dtype and torch.equal(x, y), name


class SiT(nn.Module):
    """SiT's forward as its authors' code defines it, written anew: one velocity, time s, data at s = 1."""

    def __init__(self, *, width=32, depth=2, heads=4, patch=2, channels=4, classes=5, size=8, outputs=2, gap=None):
        super().__init__()
        self.heads, self.patch, self.channels, self.gap = heads, patch, channels, gap
        self.x_embedder = nn.Module()
        self.x_embedder.proj = nn.Conv2d(channels, width, patch, patch)
        for name in ["t_embedder", *([gap] if gap == "r_embedder" else [])]:
            embedder = nn.Module()
            embedder.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
            self.add_module(name, embedder)
        self.y_embedder = nn.Module()
        self.y_embedder.embedding_table = nn.Embedding(classes + 1, width)
        self.pos_embed = nn.Parameter(position_table(width, size // patch, dtype=torch.float32)[None])
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            block = nn.Module()
            block.attn, block.mlp = nn.Module(), nn.Module()
            block.attn.qkv, block.attn.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
            block.mlp.fc1, block.mlp.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
            block.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
            self.blocks.append(block)
        self.final_layer = nn.Module()
        self.final_layer.linear = nn.Linear(width, patch * patch * channels * outputs)
        self.final_layer.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        generator = torch.Generator().manual_seed(0)
        for name, p in self.named_parameters():
            if name != "pos_embed":
                nn.init.normal_(p, std=0.1, generator=generator)

    def embed(self, name, t):
        frequencies = torch.exp(-np.log(10000) * torch.arange(128, dtype=t.dtype) / 128)
        angles = t[:, None] * frequencies
        return self.get_submodule(name).mlp(torch.cat([angles.cos(), angles.sin()], -1))

    def forward(self, x, t, y, r=None):
        norm = nn.functional.layer_norm
        b, width = len(x), self.pos_embed.shape[-1]
        h = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed
        c = self.embed("t_embedder", t) + self.y_embedder.embedding_table(y)
        if self.gap:
            c = c + self.embed(self.gap, t - r)
        for block in self.blocks:
            shift, scale, gate, shift2, scale2, gate2 = block.adaLN_modulation(c)[:, None].chunk(6, -1)
            a = norm(h, [width], eps=1e-6) * (1 + scale) + shift
            q, k, v = block.attn.qkv(a).reshape(b, -1, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
            a = ((q @ k.mT) * q.shape[-1] ** -0.5).softmax(-1) @ v  # forward AD has no other
            a = a.transpose(1, 2).flatten(2)
            h = h + gate * block.attn.proj(a)
            a = norm(h, [width], eps=1e-6) * (1 + scale2) + shift2
            h = h + gate2 * block.mlp.fc2(nn.functional.gelu(block.mlp.fc1(a), approximate="tanh"))
        shift, scale = self.final_layer.adaLN_modulation(c)[:, None].chunk(2, -1)
        u = self.final_layer.linear(norm(h, [width], eps=1e-6) * (1 + scale) + shift)
        grid, p = round(u.shape[1] ** 0.5), self.patch
        u = torch.einsum("nhwpqc->nchpwq", u.reshape(b, grid, grid, p, p, -1)).reshape(b, -1, grid * p, grid * p)
        return u[:, : self.channels]  # the variances of learn_sigma are not used
