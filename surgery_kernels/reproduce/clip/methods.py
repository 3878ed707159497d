"""The methods of the experiment, by the names of its table."""

from __future__ import annotations

from ..methods import MERGES

METHODS = ("pretrained", "individual", *(options["method"] for options in MERGES.values()))
SURGERY = {"v1": "Surgery", "v2": "SurgeryV2"}
RANK = 16
