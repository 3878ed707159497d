"""Mixtures of experts, with a tensor for every matrix of an expert or two for all of a layer, read as one and the same.

Merged is always matrix by matrix: what a method decides over a tensor it decides over the matrix of one expert, however
the files have it. mergekit 0.1.5 fuses first, so that a threshold is one for all experts of a layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from .reading.lora_targets import INPUTS_FIRST
from .reading.source import Source, TensorInfo

LAYOUTS = ("fused", "split")
FUSED = re.compile(r"(?P<block>.+)\.mlp\.experts\.(gate_up_proj|down_proj)")
SPLIT = re.compile(r"(?P<block>.+)\.(?P<inner>block_sparse_moe|mlp)\.experts\.(?P<expert>\d+)\.(?P<matrix>\w+)\.weight")


@dataclass(frozen=True)
class Naming:
    """What a family calls the matrices of an expert, and what they are in."""

    inner: str
    gate: str
    up: str
    down: str


MIXTRAL = Naming("block_sparse_moe", "w1", "w3", "w2")
QWEN = Naming("mlp", "gate_proj", "up_proj", "down_proj")
OF_MIXTRAL = ("mixtral", "minimax", "minimax_m2", "phimoe")


@dataclass(frozen=True)
class Piece:
    """Where a matrix of one expert lies in a fused tensor."""

    name: str  # in the split layout
    fused: str
    start: int  # in elements
    shape: tuple[int, ...]


class SplitExperts:
    """A `Source` of fused experts, by the names of split ones: views of the same bytes."""

    def __init__(self, source: Source, naming: Naming) -> None:
        self.name, self.folder, self.files = source.name, source.folder, source.files
        self.config, self.notices, self.anatomy = source.config, source.notices, source.anatomy
        pieces = [piece for block in fused_blocks(source) for piece in _pieces(block, naming, source)]
        self._pieces = {piece.name: piece for piece in pieces}
        fused = {piece.fused for piece in pieces}
        blocks = {name.partition(".mlp.")[0] for name in fused}
        # the router lies beside the experts
        self._inner = {
            _renamed(name, blocks, "mlp", naming.inner): name for name in source.tensors if name not in fused
        }
        infos: dict[str, TensorInfo] = {own: source.tensors[name] for own, name in self._inner.items()}
        infos |= {piece.name: _part(source.tensors[piece.fused], piece) for piece in pieces}
        self.tensors: Mapping[str, TensorInfo] = infos
        own_name = {name: own for own, name in self._inner.items()}
        self.tied: Mapping[str, str] = {
            own_name[a]: own_name[b] for a, b in source.tied.items() if a in own_name and b in own_name
        }
        self.changed = frozenset(
            name for name in infos if (self._inner.get(name) or self._pieces[name].fused) in source.changed
        )
        self._source = source
        self._last: tuple[str, Tensor] | None = None  # a fused tensor that was computed

    def tensor(self, name: str) -> Tensor:
        if name in self._inner:
            return self._source.tensor(self._inner[name])
        piece = self._pieces[name]
        last = self._last
        if last is None or last[0] != piece.fused:
            self._last = last = (piece.fused, self._source.tensor(piece.fused))
        flat = last[1].reshape(-1)
        return flat[piece.start : piece.start + prod(piece.shape)].view(piece.shape)

    def release(self) -> None:
        self._source.release()

    def close(self) -> None:
        self._last = None
        self._source.close()


def layout_of(source: Source) -> str | None:
    """None for a model without experts in one of the layouts that are known."""
    if any(True for _ in fused_blocks(source)):
        return "fused"
    return "split" if _naming_of(source) else None


def in_one_layout(sources: Mapping[Any, Source]) -> dict[Any, Source]:
    """The same models with all experts split, where some have them fused."""
    found = next((naming for source in sources.values() if (naming := _naming_of(source))), None)
    views: dict[int, Source] = {}
    for source in sources.values():
        if layout_of(source) == "fused":
            of_mixtral = (source.config or {}).get("model_type") in OF_MIXTRAL
            views[id(source)] = SplitExperts(source, found or (MIXTRAL if of_mixtral else QWEN))
    return {key: views.get(id(source), source) for key, source in sources.items()}


def fused_places(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
) -> tuple[dict[str, tuple[torch.dtype, tuple[int, ...]]], dict[str, Piece]]:
    """What split tensors become in the fused layout, and where each of them lies then.

    Raises:
        ValueError: the experts of a layer are not all there, or differ in shape or dtype.
    """
    blocks: dict[tuple[str, str], dict[tuple[int, str], str]] = {}
    for name in tensors:
        if found := SPLIT.fullmatch(name):
            of_block = blocks.setdefault((found["block"], found["inner"]), {})
            of_block[int(found["expert"]), found["matrix"]] = name
    names = {block for block, _ in blocks}
    out: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    pieces: dict[str, Piece] = {}
    for (block, inner), matrices in blocks.items():
        naming = MIXTRAL if inner == MIXTRAL.inner else QWEN
        count = 1 + max(expert for expert, _ in matrices)
        wanted = [(e, m) for e in range(count) for m in (naming.gate, naming.up, naming.down)]
        facts = {m: {tensors[matrices[e, m]] for e in range(count) if (e, m) in matrices} for _, m in wanted}
        if set(wanted) != matrices.keys() or any(len(of) != 1 for of in facts.values()):
            raise ValueError(f"moe_layout must be 'split' for experts that are not alike, got 'fused' and {block!r}")
        (dtype, (width, dim)), (_, down) = facts[naming.gate].pop(), facts[naming.down].pop()
        base = f"{block}.mlp.experts"
        out[f"{base}.gate_up_proj"], out[f"{base}.down_proj"] = (
            (dtype, (count, 2 * width, dim)),
            (dtype, (count, *down)),
        )
        for expert, matrix in wanted:
            name = matrices[expert, matrix]
            if matrix == naming.down:
                pieces[name] = Piece(name, f"{base}.down_proj", expert * prod(down), down)
            else:
                at = (2 * expert + (matrix == naming.up)) * width * dim
                pieces[name] = Piece(name, f"{base}.gate_up_proj", at, (width, dim))
    others = {_renamed(name, names, MIXTRAL.inner, "mlp"): name for name in tensors if name not in pieces}
    pieces |= {name: Piece(name, own, 0, tensors[name][1]) for own, name in others.items() if own != name}
    return {**{own: tensors[name] for own, name in others.items()}, **out}, pieces


def fused_blocks(source: Source) -> Iterator[str]:
    """What is in front of `.mlp.experts` where the experts are fused [experts, outputs, inputs]."""
    if (source.config or {}).get("model_type") in INPUTS_FIRST:
        return
    for name, info in source.tensors.items():
        if name.endswith(".gate_up_proj") and (found := FUSED.fullmatch(name)):
            down = source.tensors.get(f"{found['block']}.mlp.experts.down_proj")
            if down and len(info.shape) == len(down.shape) == 3 and info.dtype == down.dtype:
                (count, width, dim), others = info.shape, down.shape
                if others == (count, dim, width // 2) and width % 2 == 0 and f"{name}_bias" not in source.tensors:
                    yield found["block"]


def _naming_of(source: Source) -> Naming | None:
    """That of split experts."""
    for name in source.tensors:
        if ".experts." in name and (found := SPLIT.fullmatch(name)):
            for naming in (MIXTRAL, QWEN):
                if (found["inner"], found["matrix"]) in (
                    (naming.inner, m) for m in (naming.gate, naming.up, naming.down)
                ):
                    return naming
    return None


def _pieces(block: str, naming: Naming, source: Source) -> Iterator[Piece]:
    base = f"{block}.mlp.experts"
    count, width, dim = source.tensors[f"{base}.gate_up_proj"].shape
    width //= 2
    for expert in range(count):
        own = f"{block}.{naming.inner}.experts.{expert}"
        start = expert * width * dim
        yield Piece(f"{own}.{naming.gate}.weight", f"{base}.gate_up_proj", 2 * start, (width, dim))
        yield Piece(f"{own}.{naming.up}.weight", f"{base}.gate_up_proj", 2 * start + width * dim, (width, dim))
        yield Piece(f"{own}.{naming.down}.weight", f"{base}.down_proj", start, (dim, width))


def _part(info: TensorInfo, piece: Piece) -> TensorInfo:
    nbytes = prod(piece.shape) * info.dtype.itemsize
    if info.offset is None or info.strides is not None:
        return replace(info, shape=piece.shape, nbytes=nbytes, file=None, offset=None, strides=None)
    return replace(info, shape=piece.shape, nbytes=nbytes, offset=info.offset + piece.start * info.dtype.itemsize)


def _renamed(name: str, blocks: set[str], old: str, new: str) -> str:
    """Of what lies beside the experts."""
    block, inner, rest = name.partition(f".{old}.")
    return f"{block}.{new}.{rest}" if inner and block in blocks else name
