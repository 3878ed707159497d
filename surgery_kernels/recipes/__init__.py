"""The language of recipes, mergekit's YAML: which models, by which method, with which numbers. It sees no tensor."""

from .recipe import Recipe, load_recipe, parse_recipe

__all__ = ["Recipe", "load_recipe", "parse_recipe"]
