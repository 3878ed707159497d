"""The public ops: checks in Python, work in torch.ops.surgery_kernels."""

from . import linear_merge as _linear_merge  # noqa: F401  # registers the fake
from .ties_merge import ties_merge, ties_split
from .trim import trim_thresholds

__all__ = ["ties_merge", "ties_split", "trim_thresholds"]
