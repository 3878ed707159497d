"""The merges of both experiments, by the names of their tables, with the papers' settings."""

from __future__ import annotations

from typing import Any

DENSITY, LAM = 0.2, 0.3
MERGES: dict[str, dict[str, Any]] = {  # options of merge_state_dicts
    "weight averaging": {"method": "average"},
    "task arithmetic": {"method": "task_arithmetic", "lam": LAM},
    "TIES": {"method": "ties", "density": DENSITY, "lam": LAM, "reduce": "sum"},
    "AdaMerging": {"method": "adamerging", "initial": LAM},
}
