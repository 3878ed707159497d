"""Models by the names of another layout of their experts than that of their files."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from .expert_layouts import MIXTRAL, USUAL, Family, Piece, fused_blocks, fusing, pieces_of, renamed, split_family
from .source import Source, TensorInfo

OF_EXPERT = re.compile(r"\.(?P<inner>\w+)\.experts\.\d+\.")
FUSED_ENDS = (f".{USUAL.fused_gate_up}", f".{USUAL.fused_down}")


class _View:
    """What views have of the model below."""

    tensors: Mapping[str, TensorInfo]

    def __init__(self, source: Source, own_names: Mapping[str, str]) -> None:
        """`own_names`: What is not of experts, by its name below."""
        self.name, self.folder, self.files = source.name, source.folder, source.files
        self.config, self.notices, self.anatomy = source.config, source.notices, source.anatomy
        self.tied: Mapping[str, str] = {
            own_names[a]: own_names[b] for a, b in source.tied.items() if a in own_names and b in own_names
        }
        self._below = {own: name for name, own in own_names.items()}
        self._source = source

    def release(self) -> None:
        self._source.release()

    def close(self) -> None:
        self._source.close()


class SplitExperts(_View):
    """A `Source` of fused experts, by the names of split ones: views of the same bytes."""

    def __init__(self, source: Source, named: Family) -> None:
        blocks = dict(fused_blocks(source))
        pieces = [
            piece
            for block, family in blocks.items()
            for piece in pieces_of(block, family, source.tensors[family.fused(block, family.gate)].shape, named)
        ]
        inner = next(iter(blocks.values())).fused_inner
        fused = {piece.fused for piece in pieces}
        # the router lies beside the experts
        own_names = {
            name: renamed(name, set(blocks), inner, named.inner) for name in source.tensors if name not in fused
        }
        super().__init__(source, own_names)
        self._pieces = {piece.name: piece for piece in pieces}
        infos = {own: source.tensors[name] for name, own in own_names.items()}
        self.tensors = infos | {piece.name: _part(source.tensors[piece.fused], piece) for piece in pieces}
        self.changed = frozenset(
            name for name in self.tensors if (self._below.get(name) or self._pieces[name].fused) in source.changed
        )
        self._last: tuple[tuple[str, int], Tensor] | None = None  # what was computed of an expert

    def tensor(self, name: str) -> Tensor:
        if name in self._below:
            return self._source.tensor(self._below[name])
        piece = self._pieces[name]
        info = self._source.tensors[piece.fused]
        if info.offset is not None:
            return piece.within(self._source.tensor(piece.fused)).contiguous()
        expert, start = divmod(piece.start, prod(info.shape[1:]))
        which, last = (piece.fused, expert), self._last
        if last is None or last[0] != which:
            self._last = last = (which, of_expert(self._source, *which))
        return replace(piece, start=start).within(last[1]).contiguous()

    def close(self) -> None:
        self._last = None
        super().close()


class FusedExperts(_View):
    """A `Source` of split experts, by the names of fused ones, which are put together when they are asked for."""

    def __init__(self, source: Source, family: Family) -> None:
        tensors = {name: (info.dtype, info.shape) for name, info in source.tensors.items()}
        how = fusing(tensors, family, f"{source.name} must have experts that can be fused as they were trained, got")
        super().__init__(source, how.others)
        self._pieces: dict[str, list[Piece]] = {}
        for piece in how.pieces.values():
            self._pieces.setdefault(piece.fused, []).append(piece)
        infos = {own: source.tensors[name] for name, own in how.others.items()}
        for fused, (dtype, shape) in how.fused.items():
            infos[fused] = TensorInfo(dtype, shape, prod(shape) * dtype.itemsize, None, None)
        self.tensors = infos
        self.changed = frozenset(name for name in infos if any(own in source.changed for own in self._own_names(name)))

    def _own_names(self, name: str) -> list[str]:
        return [self._below[name]] if name in self._below else [piece.name for piece in self._pieces[name]]

    def tensor(self, name: str) -> Tensor:
        if name in self._below:
            return self._source.tensor(self._below[name])
        return self._assembled(name, range(self.tensors[name].shape[0]))

    def of_expert(self, name: str, expert: int) -> Tensor:
        """That of one expert alone of a fused tensor.  # [1, ...]"""
        return self._assembled(name, range(expert, expert + 1))

    def _assembled(self, name: str, experts: range) -> Tensor:
        info = self.tensors[name]
        size = prod(info.shape[1:])
        fused = torch.empty((len(experts), *info.shape[1:]), dtype=info.dtype)
        for piece in self._pieces[name]:
            if piece.start // size in experts:
                here = replace(piece, start=piece.start - experts.start * size)
                here.within(fused).copy_(self._source.tensor(piece.name))
        return fused


def of_expert(source: Source, name: str, expert: int) -> Tensor:
    """That of one expert alone of a fused tensor, without the others where they would be computed.  # [1, ...]"""
    own = getattr(source, "of_expert", None)
    if own and source.tensors[name].offset is None:
        return own(name, expert)
    return source.tensor(name)[expert : expert + 1]


def _part(info: TensorInfo, piece: Piece) -> TensorInfo:
    nbytes = prod(piece.shape) * info.dtype.itemsize
    if info.offset is None or info.strides is not None:
        return replace(info, shape=piece.shape, nbytes=nbytes, file=None, offset=None, strides=None)
    offset = info.offset + piece.start * info.dtype.itemsize
    return replace(info, shape=piece.shape, nbytes=nbytes, offset=offset, strides=piece.strides)


def as_trained(names: Collection[str], parameters: Collection[str], base: Source) -> Source:
    """A base with its experts as they were in the model that an adapter was trained in.

    Args:
        names: Of the tensors of the adapter.
        parameters: The target_parameters that it names.
    """
    keys = [found for name in names if (found := OF_EXPERT.search(name))]
    fused = next((family for _, family in fused_blocks(base)), None)
    split = split_family(base)
    if keys and fused:
        return SplitExperts(base, MIXTRAL if keys[0]["inner"] == MIXTRAL.inner else fused)
    of_files = fused or split
    if keys or of_files is None or not any(f".{parameter}".endswith(FUSED_ENDS) for parameter in parameters):
        return base
    # transformers calls them alike in all families, whatever the files do
    as_fused = replace(of_files, fused_gate_up=USUAL.fused_gate_up, fused_down=USUAL.fused_down)
    if fused == as_fused:
        return base
    return FusedExperts(SplitExperts(base, of_files) if fused else base, as_fused)
