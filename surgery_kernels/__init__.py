"""Exact and fast model merging: TIES and its relatives as fused torch ops."""

import os

import torch  # noqa: F401  # the native module resolves its symbols against torch's libraries

try:
    from . import _C
except ImportError as error:
    raise ImportError(
        "surgery_kernels must be built for this Python and torch, got no loadable surgery_kernels._C: "
        f"run `pip install --no-build-isolation .` or `make build` ({error})"
    ) from error

from . import triton as _triton  # noqa: F401  # registers the ops for CUDA tensors
from .merging import merge_state_dicts
from .ops import (
    Steps,
    combine,
    gram,
    gram_cross,
    masks,
    mix,
    pcb_merge,
    polar,
    representation_loss,
    surgery_adapter,
    surgery_train,
    ties_merge,
    ties_split,
    trim_thresholds,
    weighted_merge,
)

if _isa := os.environ.get("SURGERY_KERNELS_ISA"):
    _C.set_isa(_isa, "SURGERY_KERNELS_ISA")

__version__: str = _C.build_info()["version"]

__all__ = [
    "Steps",
    "combine",
    "gram",
    "gram_cross",
    "masks",
    "merge_state_dicts",
    "mix",
    "pcb_merge",
    "polar",
    "representation_loss",
    "surgery_adapter",
    "surgery_train",
    "ties_merge",
    "ties_split",
    "trim_thresholds",
    "weighted_merge",
]
