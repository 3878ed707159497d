"""Which tensor of a base each tensor of an adapter changes, and how."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from ...ops import arguments
from ..vocabulary.layers import tied_to
from .expert_layouts import family_of
from .folder import Checkpoint
from .lora_names import Key, NamesInBase, parsed
from .lora_settings import LoraSettings
from .source import Source, TensorInfo

MODEL = re.compile(r"(?<![^.])model\.$")  # at the end of what is around an embedding, and not around the head


@dataclass(frozen=True)
class Product:
    """``scaling * up @ down``, added to a weight as a matrix [shape[0], everything else]."""

    down: str | None  # name in the adapter, [rank, inputs...]; None: `up` [outputs] is added to a bias
    up: str  # [outputs, rank, 1...]
    scaling: float
    transposed: bool  # the weight is [inputs, outputs], as in an embedding
    magnitude: str | None = None  # DoRA: the norm that every output of the sum is given
    num_experts: int | None = None  # of a fused weight [experts, outputs, inputs]; factors [rank of all, ...]


@dataclass(frozen=True)
class Rows:
    """Trained rows of an embedding."""

    key: str  # [tokens, dim]
    at: tuple[int, ...]


@dataclass
class Targets:
    """What becomes of the base's tensors, by their names."""

    replaced: dict[str, str] = field(default_factory=dict)  # name of what takes their place
    products: dict[str, list[Product]] = field(default_factory=dict)  # what is added, also to what was replaced
    rows: dict[str, Rows] = field(default_factory=dict)  # what takes the place of some rows in the end
    untied: dict[str, str | None] = field(default_factory=dict)  # a head that the base ties; None: as it was there
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # those that are not the base's

    @property
    def changed(self) -> set[str]:
        return {*self.replaced, *self.products, *self.rows}


def match(adapter: Checkpoint, settings: LoraSettings, base: Source) -> Targets:
    """Raises ValueError where the adapter does not fit the base."""
    return _Matching(adapter, settings, base).targets


class _Matching:
    def __init__(self, adapter: Checkpoint, settings: LoraSettings, base: Source) -> None:
        self._adapter, self._settings, self._base = adapter, settings, base
        keys = parsed(adapter.name, adapter.tensors)
        if not keys:
            raise ValueError(f"{adapter.name} must change tensors of {base.name}, got an adapter that holds none")
        modules: dict[tuple[str, int], dict[str, Key]] = {}
        for key in (key for key in keys if key.is_factor):
            parts = modules.setdefault((key.module, key.depth if settings.target_parameters else 0), {})
            if key.part in parts:
                raise ValueError(f"{adapter.name} must have one lora_{key.part} of {key.module!r}, got several")
            parts[key.part] = key
        copies = {(key.module, key.part) for key in keys if key.saved}  # PEFT may save what they were copied from too
        whole = [k for k in keys if not k.is_factor and (k.saved or (k.module, k.part) not in copies)]
        wanted = [f"{key.module}.{key.part}".lstrip(".") for key in whole if key.part != "tokens"]
        wanted += [f"{module}.weight" for module, _ in modules if not settings.target_parameters]
        self._names = NamesInBase(wanted, base)
        self._seen: dict[tuple[str, str], str] = {}
        self.targets = Targets()
        for key in whole:
            self._tokens(key) if key.part == "tokens" else self._replace(key)
        for (module, _), parts in sorted(modules.items(), key=lambda item: -item[0][1]):
            self._add(module, parts)

    def _target(self, name: str, kind: str) -> str:
        """The tensor that owns the memory; that of the input layer for an output layer that is tied to it."""
        direct = self._names.find(name)
        found = direct or tied_to(name, self._base)
        if found is None:
            raise ValueError(
                f"{self._adapter.name} must change tensors of {self._base.name}, got {name!r}, which it has not"
            )
        owner = self._base.tied.get(found, found)
        if direct and self._seen.setdefault((kind, owner), name) != name:
            raise ValueError(
                f"{self._adapter.name} must change every tensor of {self._base.name} once, got {found!r} twice"
            )
        return owner

    def _shape(self, target: str) -> tuple[int, ...]:
        return self.targets.shapes.get(target, self._base.tensors[target].shape)

    def _replace(self, key: Key) -> None:
        """What PEFT loads into a tied layer is loaded into both, unless modules_to_save made a copy of one."""
        name = f"{key.module}.{key.part}".lstrip(".")
        copied = key.saved or (not key.depth and self._settings.saves(key.module))
        if copied and self._names.find(name) is None and tied_to(name, self._base):
            if not self._settings.keeps_ties:
                self.targets.untied[name] = key.key
            return
        target = self._target(name, "replaced")
        shape, there = self._adapter.tensors[key.key].shape, self._base.tensors[target].shape
        if shape[1:] != there[1:] or len(shape) != len(there) or (shape != there and len(shape) < 2):
            self._refuse_shape(key.key, there)
        self.targets.replaced[target] = key.key
        self.targets.shapes[target] = shape
        if copied and not self._settings.keeps_ties and (head := _head_tied_to(target, self._base)):
            self.targets.untied.setdefault(head, None)

    def _tokens(self, key: Key) -> None:
        target, at = self._target(f"{key.module}.weight", "tokens"), self._settings.tokens_of(key.module)
        (count, *_), shape = self._adapter.tensors[key.key].shape, self._shape(target)
        if len(at) != count:
            raise ValueError(f"{self._settings.path} must name the {count} tokens of {key.module!r}, got {len(at)}")
        num_rows = max(shape[0], 1 + max(at, default=-1))
        if not set(range(shape[0], num_rows)) <= set(at):
            raise ValueError(
                f"{self._adapter.name} must hold all rows that {self._base.name} has not, got tokens up to "
                f"{num_rows - 1} for {shape[0]} rows"
            )
        self.targets.shapes[target] = (num_rows, *shape[1:])
        self.targets.rows[target] = Rows(key.key, at)

    def _add(self, module: str, parts: Mapping[str, Key]) -> None:
        if not {"A", "B"} <= parts.keys():
            raise ValueError(
                f"{self._adapter.name} must have lora_A and lora_B of {module!r}, got only lora_{', lora_'.join(parts)}"
            )
        parameter = self._parameter(module, parts)
        if self._settings.dora != ("magnitude_vector" in parts) and parameter is None:
            got = "lora_magnitude_vector" if "magnitude_vector" in parts else "none"
            raise ValueError(
                f"{self._adapter.name} must have a lora_magnitude_vector of {module!r} exactly where use_dora is true, "
                f"got {got} and use_dora={self._settings.dora}"
            )
        name = f"{module}.weight" if parameter is None else f"{module}.{parameter}"
        target = self._target(name, "product")
        product = self._product(module if parameter is None else name, parts, target)
        self.targets.products.setdefault(target, []).append(product)
        if bias := parts.get("B.bias"):
            target = self._target(f"{module}.bias", "bias")
            if self._adapter.tensors[bias.key].shape != self._base.tensors[target].shape:
                self._refuse_shape(bias.key, self._base.tensors[target].shape)
            added = Product(None, bias.key, product.scaling, transposed=False)
            self.targets.products.setdefault(target, []).append(added)

    def _parameter(self, module: str, parts: Mapping[str, Key]) -> str | None:
        """Which of target_parameters the factors belong to; PEFT wraps a module once for each, and names none."""
        fitting = []
        for parameter in self._settings.parameters_of(module):
            found = self._names.find(f"{module}.{parameter}")
            if found and (self._is_product(parts, found) or self._is_fused(parts, found)):
                fitting.append(parameter)
        if len(fitting) > 1:
            raise ValueError(
                f"{self._adapter.name} must have factors that fit one of the parameters of {module!r}, got such as fit "
                f"{' and '.join(fitting)}"
            )
        return fitting[0] if fitting else None

    def _factors(self, parts: Mapping[str, Key]) -> tuple[TensorInfo, TensorInfo]:
        return self._adapter.tensors[parts["A"].key], self._adapter.tensors[parts["B"].key]

    def _is_product(self, parts: Mapping[str, Key], target: str) -> bool:
        (down, up), shape = self._factors(parts), self._shape(target)
        rank = down.shape[0] if down.shape else 0
        plain = (*up.shape[:1], *down.shape[1:]) == shape
        swapped = (*down.shape[1:], *up.shape[:1]) == shape and len(shape) == 2
        return bool(rank) and (plain or swapped) and math.prod(up.shape) == up.shape[0] * rank

    def _is_fused(self, parts: Mapping[str, Key], target: str) -> bool:
        (down, up), shape = self._factors(parts), self._shape(target)
        if len(shape) != 3 or len(down.shape) != 2 or len(up.shape) != 2 or down.shape[0] != up.shape[1]:
            return False
        sizes = {(up.shape[0], down.shape[1]), (down.shape[1], up.shape[0])}
        return down.shape[0] > 0 and down.shape[0] % shape[0] == 0 and shape[1:] in sizes

    def _product(self, module: str, parts: Mapping[str, Key], target: str) -> Product:
        (down, up), weight = self._factors(parts), self._base.tensors[target]
        if weight.dtype not in arguments.DTYPES or not (down.dtype.is_floating_point and up.dtype.is_floating_point):
            raise ValueError(
                f"{self._adapter.name} must have floating-point factors for a weight of float64, float32, float16 or "
                f"bfloat16, got {module!r} with {down.dtype} and {up.dtype} for {weight.dtype}"
            )
        shape, num_experts = self._shape(target), None
        if self._is_fused(parts, target):
            num_experts = shape[0]
            shape = shape[1:]
        elif not self._is_product(parts, target):
            raise ValueError(
                f"{self._adapter.name} must have factors of {module!r} whose product has the shape of the base, "
                f"{shape}, got {down.shape} and {up.shape}"
            )
        plain = (*up.shape[:1], *down.shape[1:]) == shape
        swapped = (*down.shape[1:], *up.shape[:1]) == shape and len(shape) == 2
        # PEFT corrects fan_in_fan_out by the kind of the module: it is to be believed only where both layouts would fit
        as_inputs = parts["A"].embedding or self._settings.fan_in_fan_out
        if num_experts is not None:
            as_inputs = family_of(self._base.config).inputs_first  # which counts where a matrix is square
        scaling = self._settings.scaling(module, down.shape[0] // (num_experts or 1))
        magnitude = parts["magnitude_vector"].key if "magnitude_vector" in parts else None
        if magnitude and math.prod(self._adapter.tensors[magnitude].shape) != up.shape[0]:
            self._refuse_shape(magnitude, (up.shape[0],))
        transposed = swapped and (not plain or as_inputs)
        return Product(parts["A"].key, parts["B"].key, scaling, transposed, magnitude, num_experts)

    def _refuse_shape(self, key: str, there: tuple[int, ...]) -> None:
        shape = self._adapter.tensors[key].shape
        raise ValueError(f"{self._adapter.name} must have {key!r} in the shape of the base, {there}, got {shape}")


def _head_tied_to(target: str, base: Source) -> str | None:
    """The output layer that a base takes from this input layer without storing it."""
    around, _, _ = target.partition("embed_tokens.weight")
    for head in (f"{MODEL.sub('', around)}lm_head.weight", "lm_head.weight"):
        if head not in base.tensors and tied_to(head, base) == target:
            return head
    return None
