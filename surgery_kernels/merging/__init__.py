"""Merging methods over whole models."""

from .method import Method, Parameter
from .methods import METHODS
from .methods.adamerging import AdaMerging, Atlas, Learned, Objective
from .methods.entropy import entropy_objective
from .methods.fisher import Fisher, diagonal_fisher
from .methods.linear import Average, TaskArithmetic
from .methods.regmean import RegMean, gram_matrices
from .methods.ties import Ties
from .scope import Scope
from .state_dicts import merge_state_dicts, wise_ft_curve

__all__ = [
    "METHODS",
    "AdaMerging",
    "Atlas",
    "Average",
    "Fisher",
    "Learned",
    "Method",
    "Objective",
    "Parameter",
    "RegMean",
    "Scope",
    "TaskArithmetic",
    "Ties",
    "diagonal_fisher",
    "entropy_objective",
    "gram_matrices",
    "merge_state_dicts",
    "wise_ft_curve",
]
