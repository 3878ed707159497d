"""The public ops: checks in Python, work in torch.ops.surgery_kernels."""

from .combine import combine
from .gram import gram
from .gram_cross import GramCross, gram_cross
from .masks import masks
from .mix import mix
from .polar import polar
from .representation_loss import representation_loss
from .steps import Steps
from .surgery_adapter import surgery_adapter
from .surgery_train import surgery_train
from .ties_merge import ties_merge, ties_split
from .trim import trim_thresholds
from .weighted_merge import pcb_merge, weighted_merge

__all__ = [
    "GramCross",
    "Steps",
    "combine",
    "gram",
    "gram_cross",
    "mix",
    "masks",
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
