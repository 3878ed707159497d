"""The rows of the table: which merges, and which repairs of which merge."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..declared.settings import usual
from ..jobs import Job
from ..methods import MERGES as PAPERS
from ..repair import Setting

# Merges that are repaired, then those that stand in the table for themselves.
TRAINING_FREE = ("breadcrumbs", "dare_ties", "della", "model_stock", "sce", "karcher", "multislerp")
ADAMERGING: dict[str, Any] = {"lr": 0.02, "steps": 40, "batch_size": 8}
LEARNED = "AdaMerging"

V2_STEPS = 100
SHOWN = "task arithmetic"  # by the plots of a single merge and the bars
FEW, SOME, MANY = 16, 64, 256  # unlabeled texts of each task


def merges(num_tasks: int, *, quick: bool) -> dict[str, dict[str, Any]]:
    """Options of `merge_state_dicts` by the name of the row."""
    found = {name: dict(given) for name, given in PAPERS.items() if not (quick and name == LEARNED)}
    found["TIES"]["lam"] = 1.0  # the TIES paper's
    given = usual(num_tasks)
    return found | {name: {"method": name, **given.get(name, {})} for name in TRAINING_FREE}


def surgery(texts: int) -> Setting:
    return Setting("v1", rank=16, num_samples=texts)


def surgery_v2(texts: int) -> Setting:
    return Setting("v2", rank=16, steps=V2_STEPS, num_samples=texts)


def closed_form(texts: int, rank: int | str) -> Setting:
    return Setting("v2", rank=rank, num_samples=texts, solver="closed_form")


CALIBRATED = Setting("calibrate", num_samples=SOME, residual=True)
ON_TOP = replace(closed_form(SOME, 16), residual=True, calibrated=True)


def name_of(setting: Setting) -> str:
    """In the table, below the merge."""
    ways = {"v1": "Surgery", "v2": "SurgeryV2", "calibrate": "calibrate"}
    way = f"closed form, rank {setting.rank}" if setting.solver == "closed_form" else ways[setting.mode]
    way = way.replace("rank full", "full rank")
    return f"{'calibrate and ' if setting.calibrated else ''}{way}, {setting.num_samples} texts"


def row_name(job: Job) -> str:
    return job.merge if job.setting is None else f"{job.merge} + {name_of(job.setting)}"


def repairs(merge: str, *, quick: bool) -> list[Setting]:
    """In the order of the table."""
    if merge in TRAINING_FREE:
        return []
    if quick:
        return [surgery(SOME), closed_form(SOME, 16)] if merge == SHOWN else []
    if merge == SHOWN:
        return [
            *(surgery(texts) for texts in (SOME, MANY)),
            *(surgery_v2(texts) for texts in (SOME, MANY)),
            *(closed_form(texts, rank) for texts in (FEW, SOME, MANY) for rank in ranks(texts)),
            CALIBRATED,
            ON_TOP,
        ]
    if merge == "TIES":
        return [surgery(MANY), closed_form(SOME, 16), closed_form(SOME, "full")]
    return [closed_form(SOME, 16)]


def ranks(texts: int) -> tuple[int | str, ...]:
    return (4, 16, 64, "full") if texts == SOME else (4, 16, "full")


def jobs(names: list[str], *, quick: bool) -> list[Job]:
    """Those that take long first."""
    found = [Job(name, setting) for name in names for setting in (None, *repairs(name, quick=quick))]
    return sorted(found, key=lambda job: -effort(job))


def effort(job: Job) -> int:
    """Roughly, in samples that pass through a model."""
    if job.setting is None:
        return 0
    texts = job.setting.num_samples or 0
    if job.setting.mode == "v2" and job.setting.solver == "gradient":
        return 16 * job.setting.steps * 3
    return texts * (2 + 4 * (job.setting.calibrated or job.setting.mode == "calibrate"))


def drawn() -> list[Job]:
    """What the plots of a single merge show."""
    settings = (None, surgery(SOME), surgery_v2(SOME), closed_form(SOME, 16), CALIBRATED)
    return [Job(SHOWN, setting) for setting in settings]
