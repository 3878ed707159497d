"""Calibration of language models from disk to disk, block by block."""

from .run import calibrate_checkpoint

__all__ = ["calibrate_checkpoint"]
