"""Merging checkpoints out of core, by recipes in mergekit's YAML."""

from ..recipes import load_recipe
from .adapters import merge_adapters
from .packed import PackedExperts, pack_experts
from .plan import plan_merge
from .reading.opening import open_checkpoint
from .run import merge

__all__ = ["PackedExperts", "load_recipe", "merge", "merge_adapters", "open_checkpoint", "pack_experts", "plan_merge"]
