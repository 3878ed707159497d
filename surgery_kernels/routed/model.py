"""A model that keeps its experts: built from a base and them, saved, and loaded."""

from __future__ import annotations

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from os import PathLike
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..merging.methods.spectral.family import Leading
from ..merging.state_dicts import owners_of
from ..modules.hooks import token_major_of
from ..modules.inputs import batch_size, run
from ..modules.sites import find_sites
from ..ops import arguments
from .layers import Route
from .replace import replace

StateDict = Mapping[str, Tensor]
Expert = nn.Module | StateDict

METADATA = "surgery_kernels.routed"  # the key of the configuration in a file
VERSION = 1

Routed = TypeVar("Routed", bound="RoutedModel")


class RoutedModel(nn.Module, ABC):
    """A copy of a model with experts in some of its layers; called as the model is. One call at a time."""

    kind: ClassVar[str]

    def __init__(self, base: nn.Module, configuration: dict[str, Any]) -> None:
        super().__init__()
        self.model = copy.deepcopy(base).requires_grad_(False)
        self.configuration = configuration
        self.routes: list[Route] = []
        try:
            self._blocks = find_sites(self.model, "v2").blocks
        except ValueError:
            self._blocks = ()
        self._put_layers()

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the experts."""
        return tuple(self.configuration["tasks"])

    @property
    def unrouted(self) -> tuple[str, ...]:
        """Names of the tensors in which experts differ, but which are the same for every input."""
        return tuple(self.configuration["unrouted"])

    @abstractmethod
    def _put_layers(self) -> None:
        """Layers with experts in the place of those that the configuration names, not filled yet."""

    def linear(self, name: str) -> nn.Linear:
        layer = self.model.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"base must have a linear layer {name!r}, got {type(layer).__name__}")
        return layer

    def _put(self, name: str, layer: nn.Module) -> None:
        old = self.model.get_submodule(name)
        device = next((parameter.device for parameter in old.parameters()), None)
        replace(self.model, old, layer.to(device).train(old.training))

    def token_major(self, layer: str) -> bool:
        """Whether a layer's tokens are [tokens, batch, dim]: as given, or as the attention of its block says."""
        given = self.configuration["token_major"]
        block = next((block for block in self._blocks if layer.startswith(f"{block}.")), None)
        if block is None:
            return bool(given) and not self._blocks
        return bool(token_major_of(self.model.get_submodule(block)) if given is None else given)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        for route in self.routes:
            route.batch = batch_size((inputs, options))
        return run(self.model, *inputs, **options)

    def extra_repr(self) -> str:
        return f"tasks={list(self.tasks)}"

    def save(self, path: str | PathLike[str]) -> None:
        """Writes a safetensors file: all parameters and buffers, and the configuration as JSON in its metadata."""
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        for name, tensor in _apart(self.state_dict()):
            tensors[name] = tensor.detach().contiguous()
        configuration = {"version": VERSION, "kind": self.kind, **self.configuration}
        save_file(tensors, path, metadata={METADATA: json.dumps(configuration)})

    @classmethod
    def load(cls: type[Routed], path: str | PathLike[str], base: nn.Module) -> Routed:
        """What `save` wrote, on the device of `base`.

        Args:
            path: The file.
            base: A model of the architecture that it was built from; of its parameters only the dtype is looked at.

        Raises:
            ValueError: the file is none of this class, or does not fit the base.
        """
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            found = json.loads((file.metadata() or {}).get(METADATA, "{}"))
            if found.pop("kind", None) != cls.kind:
                raise ValueError(f"path must be a file written by {cls.__name__}.save, got {str(path)!r}")
            if found.pop("version") > VERSION:
                raise ValueError(f"path must be a file of version {VERSION}, got one of a newer surgery_kernels")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
        modules = dict(base.named_modules())
        for name in found["layers"]:
            if name not in modules:
                raise ValueError(f"base must have the layers of the file, got no {name!r}")
        routed = cls(base, found)
        own = dict(_apart(routed.state_dict()))
        for name in own.keys() ^ tensors.keys():
            raise ValueError(f"base must have the tensors of the file, got {name!r} in one of them alone")
        for name, tensor in own.items():
            stored = tensors[name]
            if stored.shape != tensor.shape or stored.dtype != tensor.dtype:
                raise ValueError(
                    f"base must have the shapes and dtypes of the file, got {name!r} with {tuple(tensor.shape)}, "
                    f"{tensor.dtype} for {tuple(stored.shape)}, {stored.dtype}"
                )
            with torch.no_grad():
                tensor.copy_(stored)
        return routed.train(base.training)


def _apart(state: StateDict) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a state dict, tied ones once."""
    seen: set[tuple[int, torch.Size]] = set()
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() == 0 or place not in seen:
            seen.add(place)
            yield name, tensor


def states_of(base: nn.Module, experts: Mapping[str, Expert]) -> tuple[StateDict, dict[str, StateDict]]:
    """The state dicts of the base and of every expert, which have the same tensors.

    Raises:
        ValueError, TypeError: there are no experts, or they differ from the base in names, shapes, dtypes or devices.
    """
    if not isinstance(experts, Mapping) or not all(isinstance(task, str) for task in experts):
        got = list(experts) if isinstance(experts, Mapping) else type(experts).__name__
        raise TypeError(f"experts must be a mapping from names of tasks, got {got}")
    if not experts:
        raise ValueError("experts must be of at least one task, got none")
    states = {
        task: expert.state_dict() if isinstance(expert, nn.Module) else expert for task, expert in experts.items()
    }
    of_base = base.state_dict()
    owners_of(of_base, list(states.values()), "base")
    return of_base, states


def layers_of(model: nn.Module, exclude: tuple[str, ...], kinds: tuple[type[nn.Module], ...]) -> dict[str, Any]:
    """The layers of some kinds by name, but those that an attention of torch's reads without calling them."""
    if isinstance(exclude, str) or not all(isinstance(pattern, str) for pattern in exclude):
        raise TypeError(f"exclude must be a sequence of patterns, got {exclude!r}")
    attentions = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    inside = {id(below) for attention in attentions for below in attention.modules()}
    return {
        name: layer
        for name, layer in model.named_modules()
        if name
        and isinstance(layer, kinds)
        and id(layer) not in inside
        and not any(fnmatchcase(name, p) for p in exclude)
    }


def parameters_of(model: nn.Module, layers: list[str]) -> set[str]:
    """The names of the weights and biases of some layers, under all names that these have."""
    modules = dict(model.named_modules())
    chosen = {id(modules[name]) for name in layers}
    everywhere = model.named_modules(remove_duplicate=False)
    return {f"{name}.{part}" for name, module in everywhere if id(module) in chosen for part in ("weight", "bias")}


def differing(names: list[str], base: StateDict, states: Mapping[str, StateDict]) -> list[str]:
    """Those of the tensors in which an expert differs from the base."""
    return [name for name in names if any(not torch.equal(base[name], state[name]) for state in states.values())]


def check_rank(argument: str, rank: object) -> None:
    """None for all of it, a number of directions, or a share of them."""
    if isinstance(rank, float) and not 0 < rank <= 1:
        raise ValueError(f"{argument} must be an integer, or a share in (0, 1], got {rank}")
    if rank is not None and not isinstance(rank, float):
        arguments.check_count(argument, rank)


def rank_of(rank: int | float | None, *shape: int) -> int:
    """How many directions of a matrix are kept."""
    full = min(shape)
    if isinstance(rank, float):
        return max(1, int(full * rank)) if full else 0
    return full if rank is None else min(full, rank)


def wide(tensor: Tensor) -> Tensor:
    """As it is computed with."""
    return tensor.to(arguments.compute_dtype(tensor))


def factors_of(vector: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The leading directions of a matrix [out, in]: orthonormal rows [rank, in], and [out, rank] so that their product
    is nearest to it; zero where it has fewer."""
    leading = Leading.of(wide(vector), rank)
    missing = rank - len(leading.values)
    right, left = leading.right, leading.left * leading.values
    return nn.functional.pad(right, (0, 0, 0, missing)), nn.functional.pad(left, (0, missing))


def check_finite(names: list[str], states: Mapping[str, StateDict]) -> None:
    """
    Raises:
        ValueError: NaN or infinity in what is taken apart.
    """
    for task, state in states.items():
        for name in names:
            if not torch.isfinite(state[name]).all():
                raise ValueError(f"experts[{task!r}] must be finite, got NaN or infinity in {name!r}")
