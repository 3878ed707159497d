"""The report of a merge, from the reads that it makes anyway."""

from __future__ import annotations

import json
from pathlib import Path

from ..checkpoint.plan import Plan
from ..json_numbers import finite
from .facts import as_json
from .inspection import Observer
from .page import write_page

PAGE, NUMBERS = "report.html", "report.json"


class Reporting(Observer):
    """Is told of every tensor that a plan merges, and writes a page and its numbers at the end."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        """
        Raises:
            ValueError: the folder is there, or the plan has no base that changes could be counted from.
        """
        if folder.exists():
            raise ValueError(f"report must be a new folder, got {folder}, which exists")
        if not any(step.has_base for step in plan.merged):
            raise ValueError(f"report must be of a merge with a base, got {plan.recipe.merge_method}")
        method = plan.merged[0].method
        density = getattr(method, "density", None)
        densities = density if isinstance(density, list) else [density]
        known = all(isinstance(value, float) and 0 < value <= 1 for value in densities)
        super().__init__(plan, max(densities) if known else 0.2)
        self._folder = folder

    def write(self) -> Path:
        """The page; the numbers lie beside it."""
        self._folder.mkdir(parents=True)
        write_page(self.inspection, self._folder / PAGE)
        (self._folder / NUMBERS).write_text(json.dumps(finite(as_json(self.inspection)), indent=1) + "\n")
        return self._folder / PAGE
