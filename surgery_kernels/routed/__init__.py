"""Merges that stay several models: experts that a router weighs, sample by sample, or that training averages."""

from .averaging import ExpertsAveraging, RandomExperts, collapse, upcycle

__all__ = ["ExpertsAveraging", "RandomExperts", "collapse", "upcycle"]
