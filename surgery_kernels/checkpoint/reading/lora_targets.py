"""Which tensor of a base each tensor of an adapter changes, and how."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ...ops import arguments
from .folder import Checkpoint
from .lora_settings import LoraSettings
from .source import Source, TensorInfo

PREFIX = "base_model.model."  # in front of every name in an adapter
WRAPPED = ".base_layer."  # stands in the name of what PEFT has wrapped
PART = re.compile(r"(?P<module>.+)\.lora_(embedding_)?(?P<part>A|B|B\.bias)(\.weight)?")


@dataclass(frozen=True)
class Product:
    """``scaling * up @ down``, added to a weight as a matrix [shape[0], everything else]."""

    down: str | None  # name in the adapter, [rank, inputs...]; None: `up` [outputs] is added to a bias
    up: str  # [outputs, rank, 1...]
    scaling: float
    transposed: bool  # the weight is [inputs, outputs], as in an embedding


@dataclass
class Targets:
    """What becomes of the base's tensors, by their names."""

    replaced: dict[str, str] = field(default_factory=dict)  # name of what takes their place
    products: dict[str, Product] = field(default_factory=dict)  # what is added, also to what was replaced


def match(adapter: Checkpoint, settings: LoraSettings, base: Source) -> Targets:
    """Raises ValueError where the adapter does not fit the base."""
    parts: dict[str, dict[str, str]] = {}  # of every module: A, B and B.bias
    whole: dict[str, str] = {}
    for key in adapter.tensors:
        name = key.removeprefix(PREFIX).replace(WRAPPED, ".")
        if found := PART.fullmatch(name):
            parts.setdefault(found["module"], {})[found["part"]] = key
        else:
            whole[name] = key

    wanted = [*whole, *(f"{module}.weight" for module in parts)]
    wanted += [f"{module}.bias" for module, of_module in parts.items() if "B.bias" in of_module]
    name_in_base = _names_in_base(adapter.name, wanted, base)

    targets = Targets()
    for name, key in whole.items():
        target = name_in_base[name]
        _check_shape(adapter, key, base.tensors[target])
        _put(adapter.name, targets.replaced, target, key, base)
    for module, of_module in parts.items():
        target = name_in_base[f"{module}.weight"]
        product = _product(adapter, module, of_module, settings, base.tensors[target])
        _put(adapter.name, targets.products, target, product, base)
        if bias := of_module.get("B.bias"):
            target = name_in_base[f"{module}.bias"]
            _check_shape(adapter, bias, base.tensors[target])
            added = Product(None, bias, product.scaling, transposed=False)
            _put(adapter.name, targets.products, target, added, base)
    return targets


def _names_in_base(adapter: str, wanted: Sequence[str], base: Source) -> dict[str, str]:
    for removed, added in _prefixes(wanted, base):
        names = {name: f"{added}{name.removeprefix(removed)}" for name in wanted}
        if all(name in base.tensors for name in names.values()):
            return names
    absent = next(name for name in wanted if name not in base.tensors)
    raise ValueError(f"{adapter} must change tensors of {base.name}, got {absent!r}, which it has not")


def _prefixes(wanted: Sequence[str], base: Source) -> Iterator[tuple[str, str]]:
    """A checkpoint may be of a model without its head, and the adapter of the whole, or the other way round."""
    yield "", ""
    for prefix in dict.fromkeys(name.partition(".")[0] for name in wanted):
        yield f"{prefix}.", ""
    for prefix in dict.fromkeys(name.partition(".")[0] for name in base.tensors):
        yield "", f"{prefix}."


def _product(
    adapter: Checkpoint, module: str, parts: dict[str, str], settings: LoraSettings, weight: TensorInfo
) -> Product:
    if not {"A", "B"} <= parts.keys():
        raise ValueError(
            f"{adapter.name} must have lora_A and lora_B of {module!r}, got only lora_{', lora_'.join(parts)}"
        )
    down, up = adapter.tensors[parts["A"]], adapter.tensors[parts["B"]]
    if weight.dtype not in arguments.DTYPES or not (down.dtype.is_floating_point and up.dtype.is_floating_point):
        raise ValueError(
            f"{adapter.name} must have floating-point factors for a weight of float64, float32, float16 or bfloat16, "
            f"got {module!r} with {down.dtype} and {up.dtype} for {weight.dtype}"
        )
    rank = down.shape[0] if down.shape else 0
    plain = (*up.shape[:1], *down.shape[1:]) == weight.shape
    swapped = (*down.shape[1:], *up.shape[:1]) == weight.shape and len(weight.shape) == 2
    if not rank or not (plain or swapped) or math.prod(up.shape) != up.shape[0] * rank:
        raise ValueError(
            f"{adapter.name} must have factors of {module!r} whose product has the shape of the base, {weight.shape}, "
            f"got {down.shape} and {up.shape}"
        )
    # PEFT corrects fan_in_fan_out by the kind of the module: it is to be believed only where both layouts would fit
    embedding = ".lora_embedding_" in parts["A"]
    transposed = swapped and (not plain or embedding or settings.fan_in_fan_out)
    return Product(parts["A"], parts["B"], settings.scaling(module, rank), transposed)


def _check_shape(adapter: Checkpoint, key: str, target: TensorInfo) -> None:
    shape = adapter.tensors[key].shape
    if shape != target.shape:
        raise ValueError(f"{adapter.name} must have {key!r} in the shape of the base, {target.shape}, got {shape}")


def _put(adapter: str, changes: dict, target: str, change: object, base: Source) -> None:
    owner = _owner(base, target)
    if owner in changes:
        raise ValueError(f"{adapter} must change every tensor of {base.name} once, got {target!r} twice")
    changes[owner] = change


def _owner(base: Source, name: str) -> str:
    return base.tied.get(name, name)
