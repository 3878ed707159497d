"""Merging methods over whole models."""

from .adamerging import AdaMerging, Learned, Objective
from .average import Average
from .entropy import entropy_objective
from .fisher import Fisher, diagonal_fisher
from .regmean import RegMean, gram_matrices
from .scope import Method, Scope
from .state_dicts import merge_state_dicts
from .task_arithmetic import TaskArithmetic
from .ties import Ties

__all__ = [
    "AdaMerging",
    "Average",
    "Fisher",
    "Learned",
    "Method",
    "Objective",
    "RegMean",
    "Scope",
    "TaskArithmetic",
    "Ties",
    "diagonal_fisher",
    "entropy_objective",
    "gram_matrices",
    "merge_state_dicts",
]
