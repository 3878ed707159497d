"""Merging checkpoints out of core, by recipes in mergekit's YAML."""
