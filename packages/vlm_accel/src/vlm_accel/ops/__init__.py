"""The merge rules as plain functions: tokens (S, N, D) and scores (S, N) in, ``Reduced`` out.

A ``Reduced`` unpacks as ``tokens, kept, assign, sizes, weight, key_bias``; ``assign`` is -1 for a token that
contributed nowhere. ``keep`` = N gives back the same tensor. No function knows a model, draws at random without a seed,
or looks at a value on the host.
"""

from vlm_accel.ops.assignment import assign
from vlm_accel.ops.bipartite import tome
from vlm_accel.ops.folding import drop, fuse, rank1, select, shift, stride
from vlm_accel.ops.pooling import pool
from vlm_accel.ops.random import uniform
from vlm_accel.ops.recycling import recycle

__all__ = ["assign", "drop", "fuse", "pool", "rank1", "recycle", "select", "shift", "stride", "tome", "uniform"]
