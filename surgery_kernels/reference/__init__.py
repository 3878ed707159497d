"""The oracle: what every backend must compute, in plain PyTorch, expert after expert. One file per stem.

A scope is a list of tensors that share one threshold per expert and, under "paper", one sign for exact zeros: an
expert is then a list of tensors too. Steps run in the compute type (float32, or float64 for float64 tensors) and are
rounded to the stored dtype exactly where the toolkit behind `semantics` rounds. `compute_dtype=torch.float64` runs
everything in float64, rounds nothing and returns float64: what a backend's error is measured against.
"""

from .census import census
from .combine import combine
from .gram import gram, scope_gram
from .gram_cross import gram_cross
from .masks import masks, philox, scope_masks
from .mix import mix
from .representation_loss import representation_loss
from .scope import load_scope, scope_keys
from .steps import steps, steps_limits
from .sums import block_sum
from .surgery_adapter import surgery_adapter
from .surgery_train import surgery_train
from .ties_merge import scope_merge, ties_merge, ties_split
from .trim import keep_count, kept_entries, ranked_entries, scope_thresholds, trim_thresholds
from .weighted_merge import merge_by_scores, score_limits, scores, weighted_merge

__all__ = [
    "block_sum",
    "census",
    "combine",
    "gram",
    "gram_cross",
    "keep_count",
    "kept_entries",
    "load_scope",
    "mix",
    "masks",
    "merge_by_scores",
    "philox",
    "ranked_entries",
    "representation_loss",
    "scope_gram",
    "scope_keys",
    "scope_masks",
    "scope_merge",
    "scope_thresholds",
    "score_limits",
    "scores",
    "steps",
    "steps_limits",
    "surgery_adapter",
    "surgery_train",
    "ties_merge",
    "ties_split",
    "trim_thresholds",
    "weighted_merge",
]
