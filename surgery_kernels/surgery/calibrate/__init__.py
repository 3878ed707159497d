"""Calibration of the merged weights themselves: one model, no adapters, no gradients."""

from .in_memory import Calibrated, calibrate
from .regmean_plus_plus import regmean_plus_plus

__all__ = ["Calibrated", "calibrate", "regmean_plus_plus"]
