"""Triton's interpreter, without what it does over and over."""

from types import SimpleNamespace

import triton.language as tl
from triton.runtime import interpreter


def patch_language_once() -> None:
    """Exchange the language's functions once a launch.

    The interpreter does so at each call of a device function too, `tl.sum` and its kin among them, which takes two
    fifths of its time. What such a call needs is exchanged before the kernel begins: in `tl` and in `tl.core`.
    """
    patch, scope = interpreter._patch_lang, interpreter._LangPatchScope()
    both = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    def patch_unless_patched(_):
        nonlocal scope
        # a scope that was restored has no changes left
        if not scope._changes:
            scope = patch(both)
        return scope

    interpreter._patch_lang = patch_unless_patched
