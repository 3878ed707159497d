"""Merging methods over whole models."""

from .average import Average
from .scope import Method, Scope
from .state_dicts import merge_state_dicts
from .task_arithmetic import TaskArithmetic
from .ties import Ties

__all__ = ["Average", "Method", "Scope", "TaskArithmetic", "Ties", "merge_state_dicts"]
