"""Experts that are a base and a low-rank adapter of PEFT."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ...merging.low_rank import LowRank
from ..vocabulary.layers import tied_to, untied
from .expert_views import as_trained, of_expert
from .folder import Checkpoint, open_file
from .lora_product import add_products, as_low_rank
from .lora_settings import ADAPTER_CONFIG, LoraSettings
from .lora_targets import Rows, match
from .parts import ADAPTER_FILES
from .quantized import check_plain
from .source import FileStamp, Source, TensorInfo


class LoraExpert:
    """A `Source`: ``base + scaling * lora_B @ lora_A`` where the adapter has a product, else the base's own tensors.

    Computed when asked for, in float32 (in float64 for float64), rounded once to the dtype that was asked for, or to
    that of the base. Modules that were trained as a whole (modules_to_save, bias) replace those of the base, and may
    have more rows; a copy of a layer that the base ties is a tensor more.

    Source: PEFT's `merge_and_unload`; rank-stabilized: arXiv 2312.03732.
    """

    def __init__(
        self, name: str, base: Source, adapter: Checkpoint, settings: LoraSettings, dtype: torch.dtype | None
    ) -> None:
        targets = match(adapter, settings, base)
        self.name = name
        self.folder = base.folder
        self.anatomy = base.anatomy
        self.files = (*base.files, *adapter.files, FileStamp.of(settings.path))
        self.config = untied(base.config) if base.config and targets.untied else base.config
        self.changed = frozenset(name for name in base.tensors if base.tied.get(name, name) in targets.changed)
        tensors = dict(base.tensors)
        for own in self.changed:
            tensors[own] = _computed(base.tensors[own], dtype, targets.shapes.get(base.tied.get(own, own)))
        for head, key in targets.untied.items():
            tensors[head] = adapter.tensors[key] if key else base.tensors[tied_to(head, base) or head]
        self.tensors: Mapping[str, TensorInfo] = tensors
        self.tied = base.tied
        self.notices = (*adapter.notices, *_of_another_base(name, settings, base))
        self._base = base
        self._adapter = adapter
        self._targets = targets

    def tensor(self, name: str) -> Tensor:
        if name in self._targets.untied:
            key = self._targets.untied[name]
            return self._adapter.tensor(key) if key else self._base.tensor(tied_to(name, self._base) or name)
        if name not in self.changed:
            return self._base.tensor(name)
        name = self.tied.get(name, name)
        dtype = self.tensors[name].dtype
        if name in self._targets.replaced:
            weight = self._adapter.tensor(self._targets.replaced[name]).to(dtype)
        else:
            weight = self._base.tensor(name)
        if name in self._targets.products:
            weight = add_products(weight, self._targets.products[name], self._adapter, dtype)
        if name in self._targets.rows:
            weight = self._with_rows(weight.to(dtype), self._targets.rows[name], self.tensors[name].shape)
        return weight.to(dtype)

    def is_over(self, base: Source) -> bool:
        return self._base is base

    def factors(self, name: str) -> LowRank | None:
        """What is added to the base's tensor, as a product; of rank 0 where nothing is, None where it is none."""
        info = self.tensors[name]
        own = self.tied.get(name, name)
        if name in self._targets.untied or len(info.shape) < 2 or info.shape != self._base.tensors[name].shape:
            return None
        dtype = torch.promote_types(info.dtype, torch.float32)
        if name not in self.changed:
            rows, columns = info.shape[0], math.prod(info.shape[1:])
            return LowRank(torch.zeros(rows, 0, dtype=dtype), torch.zeros(0, columns, dtype=dtype))
        if own in self._targets.replaced or own in self._targets.rows:
            return None
        return as_low_rank(self._targets.products[own], self._adapter, dtype)

    def of_expert(self, name: str, expert: int) -> Tensor:
        """That of one expert alone of a fused tensor that has changed.  # [1, ...]"""
        dtype = self.tensors[name].dtype
        if name in self._targets.replaced:
            weight = self._adapter.tensor(self._targets.replaced[name])[expert : expert + 1].to(dtype)
        else:
            weight = of_expert(self._base, name, expert)
        if name in self._targets.products:
            weight = add_products(weight, self._targets.products[name], self._adapter, dtype, expert)
        return weight.to(dtype)

    def check_changes(self) -> None:
        """Raises ValueError for an adapter that leaves its base as it is; reads until something differs."""
        for products in self._targets.products.values():
            for product in products:
                factors = [product.up, *([product.down] if product.down else [])]
                if product.magnitude or all(bool(self._adapter.tensor(key).any()) for key in factors):
                    return
            self.release()
        for target in (*self._targets.replaced, *self._targets.rows):
            if not torch.equal(self.tensor(target), self._base.tensor(target).to(self.tensors[target].dtype)):
                return
        for head, key in self._targets.untied.items():
            if key and not torch.equal(self.tensor(head), self._base.tensor(tied_to(head, self._base) or head)):
                return
        raise ValueError(f"{self.name} must change {self._base.name}, got an adapter whose products are all 0")

    def _with_rows(self, weight: Tensor, rows: Rows, shape: tuple[int, ...]) -> Tensor:
        out = torch.empty(shape, dtype=weight.dtype)
        out[: len(weight)].copy_(weight)
        out[list(rows.at)] = self._adapter.tensor(rows.key).to(weight.dtype)
        return out

    def release(self) -> None:
        self._base.release()
        self._adapter.release()

    def close(self) -> None:
        """Lets go of the adapter; the base is somebody else's."""
        self._adapter.close()


def _computed(info: TensorInfo, dtype: torch.dtype | None, shape: tuple[int, ...] | None) -> TensorInfo:
    dtype, shape = dtype or info.dtype, info.shape if shape is None else shape
    nbytes = math.prod(shape) * dtype.itemsize
    return replace(info, dtype=dtype, shape=shape, nbytes=nbytes, file=None, offset=None, strides=None)


def _of_another_base(name: str, settings: LoraSettings, base: Source) -> list[str]:
    """Said where the names differ; a folder may have any name, so the end of a path is enough to agree."""
    if not settings.base:
        return []
    own = [base.name.partition("@")[0], str((base.config or {}).get("_name_or_path") or "")]
    ends = {path.rstrip("/").rpartition("/")[2].lower() for path in own}
    if settings.base.rstrip("/").rpartition("/")[2].lower() in ends:
        return []
    return [f"{name} was trained on {settings.base}, by its {ADAPTER_CONFIG}, and is added to {base.name}"]


def open_lora(name: str, folder: Path, base: Source, dtype: torch.dtype | None = None) -> LoraExpert:
    """The expert that the adapter in `folder` makes of `base`, in that dtype or in the base's."""
    settings = LoraSettings.read(folder / ADAPTER_CONFIG)
    check_plain(base)
    for file in ADAPTER_FILES:
        if (folder / file).exists():
            adapter = open_file(name, folder / file)
            break
    else:
        raise FileNotFoundError(f"{name} must be a folder with {' or '.join(ADAPTER_FILES)}, got neither of them")

    base = as_trained(adapter.tensors, settings.target_parameters, base)
    return LoraExpert(name, base, adapter, settings, dtype)
