"""Triton's interpreter, without what it does in vain."""

from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def spare_work() -> None:
    """Leave out what takes two thirds of the interpreter's time and changes no result but sums' last bits."""
    # integers' overflow is computed, and looked at under `debug` alone
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    interpreter._get_np_dtype = _remembered(interpreter._get_np_dtype)
    interpreter._patch_lang = _once_a_launch(interpreter._patch_lang)
    interpreter.ReduceOps.generic_reduce = _by_halves(interpreter.ReduceOps.generic_reduce)


def _remembered(numpy_dtype):
    """Make no table of all types for each value."""
    known = cache(numpy_dtype)
    return lambda dtype: numpy_dtype(dtype) if dtype.scalar.is_ptr() else known(dtype.scalar)


def _once_a_launch(patch):
    """Exchange the language's functions once a launch, and not at each call of a device function (`tl.sum`) too."""
    scope, both = interpreter._LangPatchScope(), SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    def patch_unless_patched(_):
        nonlocal scope
        # a scope that was restored has no changes left
        if not scope._changes:
            scope = patch(both)
        return scope

    return patch_unless_patched


def _by_halves(reduce):
    """Combine whole halves, neighbours with neighbours as a GPU's threads do, and not one element after the other."""

    def reduce_halves(self, input):
        input, axis = self.unravel(input, self.axis)
        parts = [np.moveaxis(x.handle.data, axis, 0) for x in input]
        # a block's lengths are powers of 2
        while len(parts[0]) > 1:
            halves = [self.to_tensor(x[k::2], t.dtype) for k in (0, 1) for x, t in zip(parts, input, strict=True)]
            combined = self.combine_fn.fn(*halves)
            combined = combined if isinstance(combined, tuple) else (combined,)
            parts = [x.handle.data for x in combined]
        last = (self.to_tensor(np.moveaxis(x, 0, axis), t.dtype) for x, t in zip(parts, input, strict=True))
        return reduce(self, tuple(last))

    return reduce_halves
