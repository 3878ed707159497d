"""Models that started from different initialisations: which units of one are which of the other, and merges of both."""

from .activations import match_activations
from .assignment import Matching
from .pleas import Merged, pleas
from .symmetries import Group, Member, Symmetries, find_symmetries
from .weights import match_weights

__all__ = [
    "Group",
    "Matching",
    "Member",
    "Merged",
    "Symmetries",
    "find_symmetries",
    "match_activations",
    "match_weights",
    "pleas",
]
