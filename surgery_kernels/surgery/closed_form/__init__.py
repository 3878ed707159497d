"""Adapters solved for block after block, without gradients."""

from .options import ClosedForm
from .solver import solve_closed_form

__all__ = ["ClosedForm", "solve_closed_form"]
