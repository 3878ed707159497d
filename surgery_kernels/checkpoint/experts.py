"""Mixtures of experts in several layouts, read as one and the same, and written in one.

Merged is matrix by matrix: what a method decides over a tensor it decides over the matrix of one expert, however the
files have it. mergekit 0.1.5 fuses first, so that a threshold is one for all experts of a layer; that is "tensor".
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch

from .reading.expert_layouts import Family, Piece, family_of, fused_blocks, fusing, split_family
from .reading.expert_views import FusedExperts, SplitExperts
from .reading.source import Source

LAYOUTS = ("fused", "split")
DECISIONS = ("matrix", "tensor")

Tensors = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def layout_of(source: Source) -> str | None:
    """None for a model without experts in one of the layouts that are known."""
    if any(True for _ in fused_blocks(source)):
        return "fused"
    return "split" if split_family(source) else None


def in_one_layout(sources: Mapping[Any, Source], decisions: str = "matrix") -> dict[Any, Source]:
    """The same models with all experts split where some have them fused, or the other way round to decide by tensor."""
    layouts = {id(source): layout_of(source) for source in sources.values()}
    named = next((family for source in sources.values() if (family := split_family(source))), None)
    views: dict[int, Source] = {}
    for source in sources.values():
        layout, family = layouts[id(source)], named or family_of(source.config)
        if decisions == "tensor" and layout == "split":
            views[id(source)] = FusedExperts(source, split_family(source) or family)
        elif layout == "fused" and (decisions == "matrix" or _has_names_of_split(source, family)):
            split = SplitExperts(source, family)
            views[id(source)] = split if decisions == "matrix" else FusedExperts(split, family)
    return {key: views.get(id(source), source) for key, source in sources.items()}


def _has_names_of_split(source: Source, family: Family) -> bool:
    """Whether what lies beside fused experts, the router, is called as beside split ones."""
    return family.inner != family.fused_inner and any(f".{family.inner}." in name for name in source.tensors)


def written_family(donor: Source, sources: Collection[Source]) -> Family:
    """By which the experts of a result are fused: as the donor's are, from what they are called when split."""
    named = next((family for source in sources if (family := split_family(source))), family_of(donor.config))
    own = split_family(donor) or next((family for _, family in fused_blocks(donor)), family_of(donor.config))
    return replace(own, inner=named.inner, gate=named.gate, up=named.up, down=named.down)


def fused_places(tensors: Tensors, family: Family) -> tuple[Tensors, dict[str, Piece]]:
    """What split tensors become in the fused layout, and where each of them lies then.

    Raises:
        ValueError: the experts of a layer are not all there, or differ in shape or dtype.
    """
    how = fusing(tensors, family, "moe_layout must be 'split' for experts that are not alike, got 'fused' and")
    moved = {name: Piece(name, own, tensors[name][1]) for name, own in how.others.items() if own != name}
    return {**{own: tensors[name] for name, own in how.others.items()}, **how.fused}, how.pieces | moved
