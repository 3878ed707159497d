"""Adapters solved for block after block, without gradients."""

from .solver import ClosedForm, Run

__all__ = ["ClosedForm", "Run"]
