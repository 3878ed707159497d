"""Merging checkpoints out of core, by recipes in mergekit's YAML."""

from ..recipes import load_recipe
from .plan import plan_merge
from .reading.opening import open_checkpoint
from .run import merge

__all__ = ["load_recipe", "merge", "open_checkpoint", "plan_merge"]
