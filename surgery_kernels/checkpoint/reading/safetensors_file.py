"""What lies where in a safetensors file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .files import check_weights
from .source import TensorInfo

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
LENGTH_BYTES = 8  # of the header's length, little-endian, in front of it
LONGEST_HEADER = 100_000_000  # bytes; the format has no longer ones


def read_safetensors(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a file by name, in the order in which they lie there; reads the header, which it checks first.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not safetensors, not complete, names a tensor twice or holds a dtype that torch has not.

    Source: the format, https://huggingface.co/docs/safetensors.
    """
    check_weights(path)
    try:
        # torch's framework would map the whole file as private memory, which the system may refuse
        with safe_open(path, framework="np"):
            pass
    except SafetensorError as error:
        raise ValueError(_refusal(path, error)) from None
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        header = json.loads(file.read(length), object_pairs_hook=lambda pairs: _unique(path, pairs))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(
                f"{path} must hold tensors of dtypes that torch has, got {entry['dtype']} for {name!r}: "
                f"what torch has not is mostly quantized, dequantize it first"
            )
    in_order = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    return {name: _info(path, LENGTH_BYTES + length, entry) for name, entry in in_order}


def _info(path: Path, data_start: int, entry: dict[str, Any]) -> TensorInfo:
    start, end = entry["data_offsets"]
    return TensorInfo(DTYPES[entry["dtype"]], tuple(entry["shape"]), end - start, path, data_start + start)


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for name, value in pairs:
        if name in entries:
            raise ValueError(f"{path} must name every tensor once, got {name!r} twice")
        entries[name] = value
    return entries


def _refusal(path: Path, error: SafetensorError) -> str:
    """A file that was cut off is worth a sentence of its own."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        needed = LENGTH_BYTES + int.from_bytes(file.read(LENGTH_BYTES), "little")
        begins_well = LENGTH_BYTES < needed <= LONGEST_HEADER and file.read(1) == b"{"
        file.seek(LENGTH_BYTES)
        header = file.read(needed - LENGTH_BYTES) if begins_well else b""
    if begins_well and needed <= size:
        try:
            entries = json.loads(header)
            needed += max(entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__")
        except (AttributeError, LookupError, TypeError, ValueError):
            begins_well = False
    if begins_well and needed > size:
        return f"{path} must be complete, got {size} bytes of {needed}"
    return f"{path} must be a safetensors file, got: {error}"
