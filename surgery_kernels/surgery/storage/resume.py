"""Interrupted training goes on where its last checkpoint was written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Checkpoint:
    """A file with the state of one training, told from others by its configuration."""

    path: Path
    configuration: Mapping[str, Any]
    every: int  # steps

    def save(self, state: Mapping[str, Any]) -> None:
        """Replaces the file as a whole: whoever is interrupted here leaves the last one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_name(self.path.name + ".unfinished")
        torch.save({"configuration": dict(self.configuration), **state}, unfinished)
        os.replace(unfinished, self.path)

    def load(self) -> dict[str, Any] | None:
        """The last state on the CPU; None where there is no file."""
        if not self.path.exists():
            return None
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            configuration = state["configuration"]
        except Exception as error:  # unpickling other bytes may raise any
            raise ValueError(f"checkpoint must be a file written by fit, got {str(self.path)!r}") from error
        for name, here in self.configuration.items():
            there = configuration.get(name)
            if there != here:
                raise ValueError(f"checkpoint must be of a fit with {name}={here!r}, got {there!r}")
        return state
