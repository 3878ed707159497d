"""What the papers and public logs report: average accuracy in percent over the eight tasks.

Sources: FusionBench's table for CLIP (pretrained, individual, merges without surgery); the authors' logs of
Representation Surgery (arXiv 2402.02705) for the rows "+ Surgery". SurgeryV2 (arXiv 2410.14389) says of itself that it
comes close to the individual experts; its tables are not repeated here. "calibrate" is FeatCal (arXiv 2605.13030) with
256 images of each task; TSV-M and Iso-C are of SVC's table on ViT-B/32, TSV-M of ESM's (arXiv 2602.20208) on ViT-L/14.
What is not run here stands below the table: Surgery and ProbSurgery with 256 images as FeatCal's authors report them,
EMR-Merging (arXiv 2405.17461) from its paper, WEMoE from AdaRank.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..declared.published import PUBLISHED
from .methods import MERGES

TASKS = ("sun397", "stanford-cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd")


OTHERWISE = {"surgery", "calibrate", *(options["method"] for options in MERGES.values())}  # rows of another name
DECLARED = {name: value for name, value in PUBLISHED.items() if name not in OTHERWISE}


@dataclass(frozen=True)
class Architecture:
    """A published encoder: how it is recognised, the rank SurgeryV2 uses on it, and what is reported for it."""

    name: str
    width: int
    depth: int
    patch_size: int
    v2_rank: int
    averages: dict[str, float]
    others: dict[str, float] = field(default_factory=dict)  # of methods that are no rows


ARCHITECTURES = (
    Architecture(
        "CLIP ViT-B/32",
        width=768,
        depth=12,
        patch_size=32,
        v2_rank=16,
        averages={
            "pretrained": 48.2,
            "individual": 90.3,
            "weight averaging": 66.5,
            "weight averaging + Surgery": 80.0,
            "task arithmetic": 68.0,
            "task arithmetic + Surgery": 80.9,
            "task arithmetic + calibrate": 85.5,
            "TIES": 72.2,
            "TIES + Surgery": 83.2,
            "AdaMerging": 82.6,
            "AdaMerging + Surgery": 86.1,
            "Iso-C": 83.1,
            "TSV-M": 84.0,
            **DECLARED,
        },
        others={
            "task arithmetic + Surgery, 256 images": 77.0,
            "task arithmetic + ProbSurgery, 256 images": 78.8,
            "task arithmetic + FeatCal, 8 images": 82.9,
            "WEMoE": 89.5,
        },
    ),
    Architecture(
        "CLIP ViT-B/16",
        width=768,
        depth=12,
        patch_size=16,
        v2_rank=16,
        averages={
            "pretrained": 55.3,
            "individual": 92.3,
            "weight averaging": 72.3,
            "weight averaging + Surgery": 82.7,
            "task arithmetic": 77.1,
            "task arithmetic + Surgery": 85.0,
            "TIES": 77.5,
            "TIES + Surgery": 86.1,
            "AdaMerging": 85.0,
            "AdaMerging + Surgery": 88.9,
        },
    ),
    Architecture(
        "CLIP ViT-L/14",
        width=1024,
        depth=24,
        patch_size=14,
        v2_rank=4,
        averages={
            "pretrained": 64.6,
            "individual": 94.3,
            "weight averaging": 80.0,
            "weight averaging + Surgery": 86.0,
            "task arithmetic": 80.7,
            "task arithmetic + Surgery": 89.1,
            "TIES": 84.0,
            "TIES + Surgery": 89.3,
            "AdaMerging": 91.0,
            "AdaMerging + Surgery": 92.3,
            "TSV-M": 93.0,
        },
        others={"EMR": 93.7},
    ),
)


def others(architecture: Architecture) -> str:
    """What is reported of methods that are no rows of the table; empty if nothing is."""
    found = [f"{name} {value:.1f}" for name, value in architecture.others.items()]
    return f"Reported by others: {'; '.join(found)}" if found else ""


def canonical(name: str) -> str:
    """A task's name as in `TASKS`, however a folder spells it."""
    name = name.lower().replace("_", "-")
    return {"cars": "stanford-cars"}.get(name, name)


def recognise(width: int, depth: int, patch_size: int) -> Architecture | None:
    for architecture in ARCHITECTURES:
        if (architecture.width, architecture.depth, architecture.patch_size) == (width, depth, patch_size):
            return architecture
    return None
