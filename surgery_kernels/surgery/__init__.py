"""Representation surgery: adapters that undo, task by task, what a merge did to the features."""

from ..modules.sites import Sites, find_sites
from .adapters import SurgeryAdapters
from .attach import SurgeryModel, attach
from .bias import collect_features, representation_bias
from .calibrate import Calibrated, calibrate, regmean_plus_plus
from .closed_form import ClosedForm
from .fit import Fit, Log, fit
from .plots import plot_bias, plot_features

__all__ = [
    "Calibrated",
    "ClosedForm",
    "Fit",
    "Log",
    "Sites",
    "SurgeryAdapters",
    "SurgeryModel",
    "attach",
    "calibrate",
    "collect_features",
    "find_sites",
    "fit",
    "plot_bias",
    "plot_features",
    "regmean_plus_plus",
    "representation_bias",
]
