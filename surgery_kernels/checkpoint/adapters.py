"""Merging folders of LoRAs into a folder of one, without the model that they belong to."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from json import dumps
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ..merging import LowRank, merge_loras
from .reading.files import read_json
from .reading.folder import open_file
from .reading.lora_names import PREFIX, Key, parsed
from .reading.lora_settings import ADAPTER_CONFIG, LoraSettings
from .reading.parts import ADAPTER_FILES
from .writing.durable import write_bytes, write_text
from .writing.output import OutputFolder

ONE_BY_NAME = ("layers_to_transform", "layers_pattern", "exclude_modules", "modules_to_save", "eva_config")


@dataclass(frozen=True)
class Adapter:
    """The products of a folder, by module."""

    products: Mapping[str, LowRank]  # scaled; kernels as matrices
    keys: Mapping[str, Mapping[str, Key]]  # those of A and B by module
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]]  # theirs
    dtype: torch.dtype
    base: str | None


def merge_adapters(
    adapters: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    method: str = "knots",
    scope: str = "model",
    rank: int | None = None,
    **options: Any,
) -> None:
    """The folder `out` with one LoRA of PEFT from the folders of several, merged from their factors.

    Args:
        adapters: At least one folder that PEFT saved; of any ranks, scales and modules, all of one base.
        out: Folder to make; it is complete or not there. The ranks of its modules may differ; its scale is 1.
        method, scope, rank, **options: As in `surgery_kernels.merging.merge_loras`.

    Raises:
        ValueError, TypeError, FileNotFoundError: `out` exists, an adapter is not there, is of another base, or holds
            more than plain products (DoRA, a bias, whole modules), or an option is wrong; before anything is written.
        RuntimeError: NaN or infinity.
    """
    if not adapters:
        raise ValueError("adapters must be at least one folder, got none")
    found = [_read(Path(adapter)) for adapter in adapters]
    _check_one_base(found, adapters)
    dtype = torch.float32 if all(one.dtype.itemsize <= 4 for one in found) else torch.float64
    merged = merge_loras(
        [{module: product.to(dtype) for module, product in one.products.items()} for one in found],
        method=method,
        scope=scope,
        rank=rank,
        **options,
    )
    merged = {module: product for module, product in merged.items() if product.rank}
    if not merged:
        raise ValueError("adapters must change their base, got products that are all 0")
    tensors = _tensors(merged, found)
    config = _config(read_json(Path(adapters[0]) / ADAPTER_CONFIG), {k: one.rank for k, one in merged.items()})
    folder = OutputFolder(out)
    folder.check(sum(tensor.nbytes for tensor in tensors.values()), resume=False)
    with folder.begun("adapters"):
        write_bytes(folder.model / ADAPTER_FILES[0], save(tensors, metadata={"format": "pt"}))
        write_text(folder.model / ADAPTER_CONFIG, dumps(config, indent=2))
        folder.publish()
        folder.discard()


def _read(folder: Path) -> Adapter:
    settings = LoraSettings.read(folder / ADAPTER_CONFIG)
    file = next((folder / file for file in ADAPTER_FILES if (folder / file).exists()), None)
    if file is None:
        raise FileNotFoundError(f"{folder} must be a folder with {' or '.join(ADAPTER_FILES)}, got neither of them")
    with ExitStack() as stack:
        weights = stack.enter_context(closing(open_file(str(folder), file)))
        keys: dict[str, dict[str, Key]] = {}
        for key in parsed(weights.name, weights.tensors):
            if key.part not in ("A", "B") or settings.target_parameters:
                raise ValueError(f"{folder} must hold plain products alone to be merged as an adapter, got {key.key!r}")
            keys.setdefault(key.module, {})[key.part] = key
        products, shapes = {}, {}
        for module, parts in keys.items():
            if len(parts) != 2:
                raise ValueError(f"{folder} must have lora_A and lora_B of {module!r}, got one of them")
            down, up = (weights.tensor(parts[part].key) for part in "AB")
            scaling = settings.scaling(module, down.shape[0])
            wide = torch.promote_types(up.dtype, torch.float32)
            products[module] = LowRank(up.to(wide).flatten(1) * scaling, down.to(wide).flatten(1))
            shapes[module] = {"A": tuple(down.shape), "B": tuple(up.shape)}
        if not products:
            raise ValueError(f"{folder} must hold products, got none")
        dtypes = {weights.tensors[key.key].dtype for parts in keys.values() for key in parts.values()}
        dtype = next(iter(dtypes)) if len(dtypes) == 1 else torch.float32
    return Adapter(products, keys, shapes, dtype, settings.base)


def _check_one_base(found: Sequence[Adapter], adapters: Sequence[str | os.PathLike[str]]) -> None:
    """By the ends of the names: a folder may lie anywhere."""
    first = (found[0].base or "").rstrip("/").rpartition("/")[2].lower()
    for one, adapter in zip(found, adapters, strict=True):
        if (one.base or "").rstrip("/").rpartition("/")[2].lower() != first:
            raise ValueError(f"adapters must be of one base, got {found[0].base} and, of {adapter}, {one.base}")


def _tensors(merged: Mapping[str, LowRank], found: Sequence[Adapter]) -> dict[str, Tensor]:
    """As PEFT names and shapes them, in the dtype of the first adapter that has the module."""
    tensors = {}
    for module, product in merged.items():
        like = next(one for one in found if module in one.products)
        for part, factor in (("A", product.down), ("B", product.up)):
            shape = like.shapes[module][part]
            whole = (product.rank, *shape[1:]) if part == "A" else (shape[0], product.rank, *shape[2:])
            kind = "lora_embedding_" if like.keys[module][part].embedding else "lora_"
            end = "" if like.keys[module][part].embedding else ".weight"
            tensors[f"{PREFIX}{module}.{kind}{part}{end}"] = factor.to(like.dtype).reshape(whole).contiguous()
    return tensors


def _config(of_first: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, Any]:
    """With every module by its whole name, and a scale of 1."""
    most = max(ranks.values())
    pattern = {re.escape(module): rank for module, rank in ranks.items() if rank != most}
    return {
        **of_first,
        **{option: None for option in ONE_BY_NAME if option in of_first},
        "r": most,
        "lora_alpha": most,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "use_rslora": False,
        "init_lora_weights": True,
        "target_modules": sorted(ranks),
    }
