"""The language of recipes, mergekit's YAML: which models, by which method, with which numbers. It sees no tensor."""

from .documents import load_recipe, load_recipes, parse_recipe, parse_recipes
from .recipe import Recipe

__all__ = ["Recipe", "load_recipe", "load_recipes", "parse_recipe", "parse_recipes"]
