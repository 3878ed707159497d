"""Experts that are a base and a low-rank adapter of PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from .folder import Checkpoint, open_file
from .lora_settings import ADAPTER_CONFIG, LoraSettings
from .lora_targets import Product, match
from .parts import ADAPTER_FILES
from .quantized import check_plain
from .source import FileStamp, Source, TensorInfo

BLOCK = 1 << 18  # elements of a product in memory: 1 MiB stays in the cache


class LoraExpert:
    """A `Source`: ``base + scaling * lora_B @ lora_A`` where the adapter has a product, else the base's own tensors.

    Computed when asked for, in float32 (in float64 for float64), rounded once to the dtype that was asked for, or to
    that of the base. Modules that were trained as a whole (modules_to_save, bias) replace those of the base.

    Source: LoRA (arXiv 2106.09685), section 4.1; rank-stabilized: arXiv 2312.03732.
    """

    def __init__(
        self, name: str, base: Source, adapter: Checkpoint, settings: LoraSettings, dtype: torch.dtype | None
    ) -> None:
        targets = match(adapter, settings, base)
        self.name = name
        self.folder = base.folder
        self.anatomy = base.anatomy
        self.files = (*base.files, *adapter.files, FileStamp.of(settings.path))
        self.config = base.config
        owners = targets.replaced.keys() | targets.products.keys()
        self.changed = frozenset(name for name in base.tensors if base.tied.get(name, name) in owners)
        self.tensors: Mapping[str, TensorInfo] = {
            name: _computed(info, dtype) if name in self.changed else info for name, info in base.tensors.items()
        }
        self.tied = base.tied
        self.notices = adapter.notices
        self._base = base
        self._adapter = adapter
        self._targets = targets

    def tensor(self, name: str) -> Tensor:
        if name not in self.changed:
            return self._base.tensor(name)
        name = self.tied.get(name, name)
        dtype = self.tensors[name].dtype
        if name in self._targets.replaced:
            weight = self._adapter.tensor(self._targets.replaced[name]).to(dtype)
        else:
            weight = self._base.tensor(name)
        return self._add(weight, self._targets.products[name], dtype) if name in self._targets.products else weight

    def release(self) -> None:
        self._base.release()
        self._adapter.release()

    def close(self) -> None:
        """Lets go of the adapter; the base is somebody else's."""
        self._adapter.close()

    def _add(self, weight: Tensor, product: Product, dtype: torch.dtype) -> Tensor:
        out = torch.empty_like(weight, dtype=dtype)
        if not weight.numel():
            return out
        compute = torch.promote_types(torch.promote_types(weight.dtype, dtype), torch.float32)
        left, right = self._factors(product, compute)
        num_rows = max(1, BLOCK // right.shape[1])
        # one block for all: fresh memory costs more than the product
        memory = None if compute == dtype else torch.empty(num_rows, right.shape[1], dtype=compute)
        matrices = (x.view(len(left), -1).split(num_rows) for x in (out, weight))
        for into, rows, of_rows in zip(*matrices, left.split(num_rows), strict=True):
            block = into if memory is None else memory[: len(into)]
            block.copy_(rows)
            into.copy_(block.addmm_(of_rows, right, alpha=product.scaling))
        return out

    def _factors(self, product: Product, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """As matrices in the layout of the weight.  # [rows, rank], [rank, columns]"""
        up = self._adapter.tensor(product.up).to(dtype)
        if product.down is None:
            return up[:, None], up.new_ones(1, 1)
        down = self._adapter.tensor(product.down).to(dtype)
        up, down = up.flatten(1), down.flatten(1)
        return (down.T, up.T) if product.transposed else (up, down)


def _computed(info: TensorInfo, dtype: torch.dtype | None) -> TensorInfo:
    dtype = dtype or info.dtype
    nbytes = info.nbytes // info.dtype.itemsize * dtype.itemsize
    return replace(info, dtype=dtype, nbytes=nbytes, file=None, offset=None, strides=None)


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

    return LoraExpert(name, base, adapter, settings, dtype)
