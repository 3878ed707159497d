"""Merging methods over whole models."""

from .methods.adamerging import AdaMerging, Learned, Objective
from .methods.average import Average
from .methods.entropy import entropy_objective
from .methods.fisher import Fisher, diagonal_fisher
from .methods.regmean import RegMean, gram_matrices
from .methods.task_arithmetic import TaskArithmetic
from .methods.ties import Ties
from .scope import Method, Scope
from .state_dicts import merge_state_dicts

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
