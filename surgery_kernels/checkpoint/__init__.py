"""Merging checkpoints out of core, by recipes in mergekit's YAML."""

from .opening import open_checkpoint
from .plan import plan_merge
from .recipe import load_recipe
from .stream import merge

__all__ = ["load_recipe", "merge", "open_checkpoint", "plan_merge"]
