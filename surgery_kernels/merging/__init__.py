"""Merging methods over whole models."""

from .denoising import BySteps, extrapolate_and_decouple, merge_by_steps
from .latents import merge_heads, merge_latents
from .loras import merge_loras
from .low_rank import LowRank
from .method import Method, Parameter
from .methods import METHODS
from .methods.adamerging import AdaMerging, Atlas
from .methods.concrete import ConcreteAdaMerging, ConcreteTaskArithmetic
from .methods.fisher import Fisher, diagonal_fisher
from .methods.learned import Learned, Objective
from .methods.linear import Average, TaskArithmetic
from .methods.objectives import cross_entropy_objective, entropy_objective
from .methods.regmean import RegMean, gram_matrices
from .methods.ties import Ties
from .scope import Scope
from .state_dicts import merge_state_dicts, wise_ft_curve

__all__ = [
    "METHODS",
    "AdaMerging",
    "Atlas",
    "Average",
    "BySteps",
    "ConcreteAdaMerging",
    "ConcreteTaskArithmetic",
    "Fisher",
    "Learned",
    "LowRank",
    "Method",
    "Objective",
    "Parameter",
    "RegMean",
    "Scope",
    "TaskArithmetic",
    "Ties",
    "cross_entropy_objective",
    "diagonal_fisher",
    "entropy_objective",
    "extrapolate_and_decouple",
    "gram_matrices",
    "merge_by_steps",
    "merge_heads",
    "merge_latents",
    "merge_loras",
    "merge_state_dicts",
    "wise_ft_curve",
]
