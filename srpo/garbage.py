"""Garbage collection in a process that has imported much."""

import gc


def set_imports_aside() -> None:
    """Leave what exists now out of every garbage collection from here on.

    What the imports of torch, transformers and trl made never becomes garbage, and looking through it takes about
    as long as a step of a small policy.
    """
    gc.collect()
    gc.freeze()
