"""Mixtures of experts in files: a tensor for every matrix of an expert, or fused ones for all experts of a layer.

split   ...mlp.experts.3.gate_proj.weight [width, dim], up_proj the same, down_proj [dim, width]
fused   ...mlp.experts.gate_up_proj [experts, 2 width, dim], down_proj [experts, dim, width]

Some families fuse with inputs first, [experts, dim, 2 width] and [experts, width, dim], some of them with the columns
of gate and up in turn.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from .source import Source

SPLIT = re.compile(
    r"(?P<block>.+)\.(?P<inner>block_sparse_moe|mlp|feed_forward)\.experts\.(?P<expert>\d+)\.(?P<matrix>\w+)"
    r"\.(?P<kind>weight|bias)"
)
GATE_UP = re.compile(r"(?P<block>.+)\.(?P<inner>mlp|feed_forward)\.experts\.(gate_up_proj|fc1\.weight)")


@dataclass(frozen=True)
class Family:
    """What the tensors of experts are called, and how they are fused."""

    inner: str = "mlp"  # what experts lie in, in split files
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    fused_inner: str = "mlp"  # and in fused ones
    fused_gate_up: str = "gate_up_proj"
    fused_down: str = "down_proj"
    inputs_first: bool = False
    in_turn: bool = False  # columns of gate and up
    biases: bool = False

    @property
    def matrices(self) -> tuple[str, str, str]:
        return self.gate, self.up, self.down

    def fused(self, block: str, matrix: str, kind: str = "weight") -> str:
        """The name of the tensor that a matrix, or a bias, is fused into."""
        own = self.fused_down if matrix == self.down else self.fused_gate_up
        return f"{block}.{self.fused_inner}.experts.{own}{'_bias' * (kind == 'bias')}"

    def split(self, block: str, expert: int, matrix: str, kind: str = "weight") -> str:
        return f"{block}.{self.inner}.experts.{expert}.{matrix}.{kind}"


USUAL = Family()
MIXTRAL = Family("block_sparse_moe", "w1", "w3", "w2")
LLAMA4 = Family(inner="feed_forward", fused_inner="feed_forward", inputs_first=True)
ARIA = Family(fused_gate_up="fc1.weight", fused_down="fc2.weight", inputs_first=True)
GPT_OSS = Family(inputs_first=True, in_turn=True, biases=True)
PRIVACY_FILTER = Family(inputs_first=True, biases=True)
FAMILIES = {
    **dict.fromkeys(("mixtral", "minimax", "minimax_m2", "phimoe"), MIXTRAL),
    **dict.fromkeys(("llama4", "llama4_text"), LLAMA4),
    **dict.fromkeys(("aria", "aria_text"), ARIA),
    "gpt_oss": GPT_OSS,
    "openai_privacy_filter": PRIVACY_FILTER,
}


@dataclass(frozen=True)
class Piece:
    """Where a matrix of one expert, or its bias, lies in a fused tensor."""

    name: str  # in the split layout
    fused: str
    shape: tuple[int, ...]
    start: int = 0  # in elements
    strides: tuple[int, ...] | None = None  # in elements; None: contiguous

    def within(self, fused: Tensor) -> Tensor:
        """The view of a contiguous tensor."""
        if self.strides is None:
            return fused.reshape(-1)[self.start : self.start + prod(self.shape)].view(self.shape)
        return fused.as_strided(self.shape, self.strides, fused.storage_offset() + self.start)


def family_of(config: Mapping[str, Any] | None) -> Family:
    return FAMILIES.get(str((config or {}).get("model_type")), USUAL)


def fused_blocks(source: Source) -> Iterator[tuple[str, Family]]:
    """What is in front of the experts where they are fused, and how."""
    for name, info in source.tensors.items():
        if not name.endswith(("gate_up_proj", "fc1.weight")) or not (found := GATE_UP.fullmatch(name)):
            continue
        block, family = found["block"], family_of(source.config)
        if name.endswith(USUAL.fused_gate_up):  # Aria's too, in files of transformers 5
            family = replace(family, fused_gate_up=USUAL.fused_gate_up, fused_down=USUAL.fused_down)
        down = source.tensors.get(family.fused(block, family.down))
        if family.fused(block, family.gate) != name or not down or info.dtype != down.dtype:
            continue
        with_biases = family.fused(block, family.gate, "bias") in source.tensors
        if down.shape == _shapes(family, info.shape)[1] and with_biases == family.biases:
            yield block, family


def split_family(source: Source) -> Family | None:
    """That of split experts; None where there are none."""
    for name in source.tensors:
        if ".experts." in name and (found := SPLIT.fullmatch(name)):
            for family in (family_of(source.config), MIXTRAL, USUAL):
                if found["inner"] == family.inner and found["matrix"] in family.matrices:
                    return family
    return None


def pieces_of(block: str, family: Family, gate_up: tuple[int, ...], named: Family | None = None) -> Iterator[Piece]:
    """All that is fused in a block.

    Args:
        family: How it is fused.
        gate_up: The shape of that tensor.
        named: What the pieces are called; None: as `family` does.
    """
    named = named or family
    count, (width, dim) = gate_up[0], _sizes(family, gate_up)
    for expert in range(count):
        for matrix, own in zip(family.matrices, named.matrices, strict=True):
            at = (family.matrices.index(matrix)) % 2  # up lies behind gate
            shape = (dim, width) if matrix == family.down else (width, dim)
            parts = 1 if matrix == family.down else 2  # in one tensor
            start = expert * parts * width * dim
            strides = None
            if not family.inputs_first:
                start += at * prod(shape)
            elif matrix == family.down:
                strides = (1, dim)
            else:
                start += at * (1 if family.in_turn else width)
                strides = (2 if family.in_turn else 1, 2 * width)
            yield Piece(named.split(block, expert, own), family.fused(block, matrix), shape, start, strides)
            if family.biases:
                length = shape[0]
                begin = expert * parts * length + at * (1 if family.in_turn else length)
                step = (2,) if family.in_turn and matrix != family.down else None
                yield Piece(
                    named.split(block, expert, own, "bias"), family.fused(block, matrix, "bias"), (length,), begin, step
                )


@dataclass(frozen=True)
class Fusing:
    """What becomes of the tensors of a model when its experts are fused."""

    fused: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    pieces: dict[str, Piece]  # by their names in the split layout
    others: dict[str, str]  # what is not of experts, and its name then


def fusing(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], family: Family, must: str) -> Fusing:
    """How split experts are fused.

    Args:
        tensors: dtypes and shapes by name.
        family: Of both layouts.
        must: How the sentence of the error begins.

    Raises:
        ValueError: the experts of a layer are not all there, or differ in shape or dtype.
    """
    blocks: dict[str, dict[tuple[int, str, str], str]] = {}
    for name in tensors:
        found = SPLIT.fullmatch(name)
        if found and found["inner"] == family.inner and found["matrix"] in family.matrices:
            own = blocks.setdefault(found["block"], {})
            own[int(found["expert"]), found["matrix"], found["kind"]] = name
    fused: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    pieces: dict[str, Piece] = {}
    for block, names in blocks.items():
        experts = range(1 + max(expert for expert, _, _ in names))
        kinds = ("weight", "bias") if family.biases else ("weight",)
        wanted = {(expert, matrix, kind) for expert in experts for matrix in family.matrices for kind in kinds}
        (dtype, shape), *_ = (tensors[name] for name in names.values())
        first = names.get((0, family.gate, "weight"))
        width, dim = tensors[first][1] if first and len(tensors[first][1]) == 2 else (0, 0)
        gate_up = (len(experts), dim, 2 * width) if family.inputs_first else (len(experts), 2 * width, dim)
        found_pieces = {piece.name: piece for piece in pieces_of(block, family, gate_up)}
        alike = all(
            tensors[name] == (dtype, found_pieces[name].shape) for name in names.values() if name in found_pieces
        )
        if names.keys() != wanted or not alike:
            raise ValueError(f"{must} {block!r}")
        pieces |= found_pieces
        _, down = _shapes(family, gate_up)
        fused[family.fused(block, family.gate)] = dtype, gate_up
        fused[family.fused(block, family.down)] = dtype, down
        if family.biases:
            fused[family.fused(block, family.gate, "bias")] = dtype, (len(experts), 2 * width)
            fused[family.fused(block, family.down, "bias")] = dtype, (len(experts), dim)
    others = {
        name: renamed(name, set(blocks), family.inner, family.fused_inner) for name in tensors if name not in pieces
    }
    return Fusing(fused, pieces, others)


def renamed(name: str, blocks: set[str], old: str, new: str) -> str:
    """Of what lies beside the experts, such as the router."""
    block, inner, rest = name.partition(f".{old}.")
    return f"{block}.{new}.{rest}" if inner and block in blocks else name


def _sizes(family: Family, gate_up: tuple[int, ...]) -> tuple[int, int]:
    """Width and dimension of an expert."""
    wide, dim = (gate_up[2], gate_up[1]) if family.inputs_first else gate_up[1:]
    return wide // 2, dim


def _shapes(family: Family, gate_up: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of both fused weights; nothing fits an odd one."""
    if len(gate_up) != 3 or gate_up[2 if family.inputs_first else 1] % 2:
        return gate_up, ()
    width, dim = _sizes(family, gate_up)
    return gate_up, (gate_up[0], width, dim) if family.inputs_first else (gate_up[0], dim, width)
