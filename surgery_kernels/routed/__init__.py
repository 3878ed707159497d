"""Merges that stay several models: experts that a router weighs, sample by sample, or that training averages."""

from .averaging import ExpertsAveraging, RandomExperts, collapse, upcycle
from .feed_forward import FeedForward, find_feed_forward
from .model import RoutedModel
from .smile import Smile, smile
from .training import fit_by_entropy, fit_router
from .twin import TwinMerging, twin_merging
from .wemoe import WEMoE, wemoe

__all__ = [
    "ExpertsAveraging",
    "FeedForward",
    "RandomExperts",
    "RoutedModel",
    "Smile",
    "TwinMerging",
    "WEMoE",
    "collapse",
    "find_feed_forward",
    "fit_by_entropy",
    "fit_router",
    "smile",
    "twin_merging",
    "upcycle",
    "wemoe",
]
