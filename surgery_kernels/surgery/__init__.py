"""Representation surgery: adapters that undo, task by task, what a merge did to the features."""

from .adapters import SurgeryAdapters
from .attach import SurgeryModel, attach
from .bias import collect_features, representation_bias
from .calibrate import Calibrated, calibrate
from .closed_form import ClosedForm
from .fit import Fit, Log, fit
from .plots import plot_bias, plot_features
from .sites import Sites, find_sites

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
    "representation_bias",
]
