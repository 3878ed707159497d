"""What a recipe merges, as slices: stretches of layers of some models that become the next layers of the result.

models: [{model: a}, {model: b}]             # one slice of whole models
slices:
  - sources: [{model: a, layer_range: [0, 16]}, {model: b, layer_range: [8, 24]}]
    parameters: {...}                        # before those of the recipe, after those of a source
modules: {default: {slices: [...]}}          # as mergekit writes recipes of its own, see `modules.py`
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from ..merging import Method
from ..merging.depths import depths
from ..merging.method import count_in_words
from .layers import comes_first, in_layer, layers_of
from .model_reference import ModelReference
from .node import Node
from .settings import Settings, number, read_settings, whole_number

KEYS = ("models", "slices", "modules")
# Between two models either of which may be the base: old recipes name another one, or none.
SYMMETRIC = ("slerp",)


@dataclass(frozen=True)
class Source:
    """A model of a slice."""

    model: ModelReference
    settings: Settings  # its own
    layers: range | None = None  # None: all of it
    at: str | None = None  # in the recipe; None: a base that is not listed

    def own_name(self, output: Output) -> str:
        """What a tensor of the result is called in this model."""
        if output.layer is None or self.layers is None:
            return output.name
        return in_layer(output.name, self.layers[output.layer])


@dataclass(frozen=True)
class Slice:
    """Layers of some models that become the next layers of the result, or all there is of whole models."""

    experts: tuple[Source, ...]  # what is merged
    base: Source | None  # what task vectors are taken from, for methods that have a base
    first: Source  # whose tensors the result has; one of those above
    scopes: tuple[Settings, ...]  # of all its models, the nearest first
    start: int = 0  # layers of the result before it
    is_first: bool = True  # it has what comes before the layers, the embeddings
    is_last: bool = True  # it has what comes after them, the final norm and the output layer
    module: str | None = None  # whose layers, and what is around them, it is of; None: the model has but one

    @property
    def is_base_alone(self) -> bool:
        """Whether nothing is merged into it."""
        return self.base is not None and not self.experts

    @property
    def of_whole_models(self) -> Slice:
        """The same where a module has no layers to pick from."""
        experts = tuple(replace(source, layers=None) for source in self.experts)
        base = self.base and replace(self.base, layers=None)
        return replace(self, experts=experts, base=base, first=replace(self.first, layers=None))

    @property
    def sources(self) -> tuple[Source, ...]:
        return self.experts if self.base is None else (self.base, *self.experts)

    @property
    def num_layers(self) -> int | None:
        return None if self.first.layers is None else len(self.first.layers)

    def names(self, source: Source, names: Collection[str]) -> dict[str, str]:
        """What the tensors of a model that belong to the slice are called in the result.

        Args:
            source: One of the slice's.
            names: Of all tensors of the model, or of those of its module.

        Returns:
            Names of the result to those of the model, in the order of `names`.

        Raises:
            ValueError: the slice takes layers, and the model has not one stack of them, or not these.
        """
        if source.layers is None:
            return {name: name for name in names}
        layers = layers_of(names, source.at or str(source.model))
        beyond = set(source.layers) - {layer for layer in layers.values() if layer is not None}
        if beyond:
            there = 1 + max((layer for layer in layers.values() if layer is not None), default=-1)
            got = [source.layers.start, source.layers.stop]
            at = f"{source.at}.layer_range" if source.at else "base_model"
            raise ValueError(f"{at} must be of the {there} layers of {source.model}, got {got}")
        found = {}
        for name, layer in layers.items():
            if layer is None:
                if self.is_first if comes_first(name) else self.is_last:
                    found[name] = name
            elif layer in source.layers:
                found[in_layer(name, self.start + layer - source.layers.start)] = name
        return found

    def outputs(self, names: Collection[str], num_layers: int | None) -> list[Output]:
        """The tensors of the result, by the names of all tensors of the first model or its module, in their order.

        `num_layers` is that of the first model's configuration, see `depths`.
        """
        if self.num_layers is None:
            return [Output(name, depth) for name, depth in depths(names, num_layers).items()]
        found = []
        for name, layer in layers_of(self.names(self.first, names), str(self.first.model)).items():
            place = None if layer is None else layer - self.start
            depth = 0.0 if place is None else place / (self.num_layers - 1) if self.num_layers > 1 else 1.0
            found.append(Output(name, depth, place))
        return found


@dataclass(frozen=True)
class Output:
    """A tensor of the result."""

    name: str
    depth: float  # where gradients are read; every slice begins again at 0
    layer: int | None = None  # counted from the first of the slice; None: in none, or of whole models


@dataclass(frozen=True)
class Context:
    """What slices inherit from the recipe around them."""

    method: type[Method]
    base_model: ModelReference | None
    scopes: tuple[Settings, ...]
    module: str | None = None


def read_slices(root: Node, keys: dict[str, Node], context: Context) -> tuple[Slice, ...]:
    """The slices of a recipe, in order."""
    given = [name for name in KEYS if keys.get(name) is not None and keys[name].value not in ([], {})]
    if len(given) != 1:
        got = " and ".join(given) or "none"
        raise ValueError(f"{root.at} must have one of models, slices and modules, got {got}")
    (name,) = given
    if name == "modules":
        modules = keys[name].value
        if not isinstance(modules, dict):
            raise keys[name].must("be a mapping of modules")
        read = [
            _read_module(keys[name].key(module, value), replace(context, module=str(module)))
            for module, value in modules.items()
        ]
        return tuple(part for slices in read for part in slices)
    return _read_models(keys[name], context) if name == "models" else _read_stack(keys[name], context)


def _read_module(node: Node, context: Context) -> tuple[Slice, ...]:
    keys = node.given(("models", "slices", "parameters"), "a module")
    settings = read_settings(keys.get("parameters"), context.method, of_model=False)
    return read_slices(node, keys, replace(context, scopes=(settings, *context.scopes)))


def _read_models(node: Node, context: Context) -> tuple[Slice, ...]:
    """One slice of whole models."""
    listed = []
    for entry in node.entries():
        keys = entry.given(("model", "parameters", "revision", "layer_range"), "a model of a merge")
        if "layer_range" in keys:
            keys["layer_range"].ignored(", as by mergekit: slices pick layers, models are whole")
        listed.append(_read_source(entry, keys, context))
    return (_slice(node, listed, context),)


def _read_stack(node: Node, context: Context) -> tuple[Slice, ...]:
    slices: list[Slice] = []
    entries = node.entries()
    for entry in entries:
        keys = entry.given(("sources", "parameters", "base_model", "residual_weight"), "a slice")
        if "residual_weight" in keys:
            number(keys["residual_weight"])
            keys["residual_weight"].ignored(", as by mergekit")
        settings = read_settings(keys.get("parameters"), context.method, of_model=False)
        base = ModelReference.read(keys["base_model"]) if "base_model" in keys else context.base_model
        inside = replace(context, base_model=base, scopes=(settings, *context.scopes))
        sources = entry.required(keys, "sources")
        listed = []
        for source in sources.entries():
            of_source = source.given(("model", "layer_range", "parameters", "revision"), "a source")
            layers = _read_range(source.required(of_source, "layer_range"), empty=context.module is not None)
            listed.append(replace(_read_source(source, of_source, inside), layers=layers))
        if len({len(source.layers or ()) for source in listed}) > 1:
            counts = ", ".join(f"{len(source.layers or ())} of {source.model}" for source in listed)
            raise ValueError(f"{sources.at} must have equally many layers, got {counts}")
        part = _slice(sources, listed, inside)
        start = sum(len(before.first.layers or ()) for before in slices)
        slices.append(replace(part, start=start, is_first=not slices, is_last=len(slices) == len(entries) - 1))
    return tuple(slices)


def _read_source(node: Node, keys: dict[str, Node], context: Context) -> Source:
    model = ModelReference.read(node.required(keys, "model"))
    if "revision" in keys:
        meant = replace(model, model=replace(model.model, revision=keys["revision"].value))
        keys["revision"].ignored(f", as by mergekit: write {meant} to have it")
    return Source(model, read_settings(keys.get("parameters"), context.method, of_model=True), at=node.at)


def _read_range(node: Node, *, empty: bool) -> range:
    """`empty`: It may be, as mergekit writes it of a module without layers."""
    if not isinstance(node.value, list) or len(node.value) != 2:
        raise node.must("be [first layer, layer behind the last]")
    first, end = map(whole_number, node.entries())
    if not 0 <= first < end and not (empty and first == end == 0):
        raise node.must("be [first layer, layer behind the last]")
    return range(first, end)


def _slice(node: Node, listed: Sequence[Source], context: Context) -> Slice:
    """Listed models in their roles: who is the base, and whether one that is not listed takes part."""
    method, base_model = context.method, context.base_model
    base = next((source for source in listed if source.model == base_model), None)
    experts = list(listed)
    if base_model is not None and base is None and not _names_the_donor(node, listed, context):
        base = _unlisted(node, base_model, listed, method)
        experts += [base] if base else []
    first = base or experts[0]
    if method.base == "none":
        return _checked(node, Slice(tuple(experts), None, first, context.scopes, module=context.module), method)
    if base is None and method.base == "required":
        if method.name not in SYMMETRIC or len(listed) != 2:
            raise ValueError(f"{node.at.partition('.')[0]}.base_model must be given for {method.name}, got none")
        base = first
        if base_model is None:
            node.notices.append(f"{node.at} are merged from {base.model} to {listed[1].model}, without a base_model")
    if base is not None:
        experts = [source for source in experts if (source.model, source.layers) != (base.model, base.layers)]
    return _checked(node, Slice(tuple(experts), base, first, context.scopes, module=context.module), method)


def _names_the_donor(node: Node, listed: Sequence[Source], context: Context) -> bool:
    """Whether a base that is not listed has no part in the merge but to name the donor of its files."""
    method, base_model = context.method, context.base_model
    if method.base == "none" and listed[0].layers is not None:
        return True  # as in mergekit, which adds the base to whole models only
    if method.name in SYMMETRIC and len(listed) == 2:
        why = f"are merged from {listed[0].model} to {listed[1].model}: {base_model} gives the files beside the weights"
    elif method.base == "none" and not method.takes(len(listed) + 1):
        why = f"are merged without {base_model}, which gives the files beside the weights"
    else:
        return False
    node.notices.append(f"{node.at} {why}")
    return True


def _unlisted(node: Node, base_model: ModelReference, listed: Sequence[Source], method: type[Method]) -> Source | None:
    """The base as one source more: where layers are picked, the same as of all others."""
    ranges = {source.layers for source in listed}
    if len(ranges) > 1:
        raise ValueError(f"{node.at} must list the base_model {base_model} where layers differ, got none of it")
    (layers,) = ranges
    if layers is not None:
        node.notices.append(f"{node.at} are merged over the same layers of {base_model}, which is not listed")
    return Source(base_model, {}, layers)


def _checked(node: Node, part: Slice, method: type[Method]) -> Slice:
    models = [source.model for source in part.experts]
    if not models and part.base and method.num_experts == (1, None):
        return part  # the base alone, see `base_alone`
    if not method.takes(len(models)):
        besides = " besides the base" if part.base else ""
        listed = ", ".join(map(str, models)) or "none"
        raise ValueError(f"{node.at} must be {count_in_words(method)}{besides} for {method.name}, got {listed}")
    for model in _repeated(models):
        node.notices.append(f"{node.at} have {model} more than once: it takes part as often")
    return part


def base_alone(root: Node, slices: Sequence[Slice]) -> tuple[Slice, ...] | None:
    """For passthrough, slices of a base into which none merges anything, such as one with an adapter; else None."""
    if not all(part.is_base_alone for part in slices):
        return None
    models = ", ".join(dict.fromkeys(str(part.first.model) for part in slices))
    root.notices.append(f"{root.at} merges nothing into {models}: the result is that alone")
    return tuple(replace(part, experts=(replace(part.first, settings={}),), base=None, scopes=()) for part in slices)


def _repeated(models: Iterable[ModelReference]) -> list[ModelReference]:
    seen: dict[ModelReference, int] = {}
    for model in models:
        seen[model] = seen.get(model, 0) + 1
    return [model for model, count in seen.items() if count > 1]
