"""The methods of the experiment, by the names of its table."""

from __future__ import annotations

from typing import Any

from ..methods import MERGES as PAPERS

MERGES: dict[str, dict[str, Any]] = PAPERS | {"Iso-C": {"method": "iso_c"}, "TSV-M": {"method": "tsv_m"}}
METHODS = ("pretrained", "individual", *(options["method"] for options in MERGES.values()))
SURGERY = {
    "v1": "Surgery",
    "v2": "SurgeryV2",
    "closed_form": "closed form",
    "calibrate": "calibrate",
    "calibrate+closed_form": "calibrate and closed form",
}
RANK = 16
IMAGES = 256  # of each task, for closed form and calibrate: those of FeatCal's published results
