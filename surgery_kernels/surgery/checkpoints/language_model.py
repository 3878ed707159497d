"""A causal language model of a checkpoint, of whose blocks only those are in memory that are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...checkpoint.memory import give_back_free_memory
from ...checkpoint.reading.source import Source
from ...modules.sites import Sites, find_sites
from ...modules.stand_in import standing_in


class LanguageModel:
    """Before `load` it has no weights at all; behind it, all but those of the blocks, maps of the files if it can."""

    def __init__(self, source: Source, config: Any) -> None:
        """
        Args:
            source: The tensors, by the names that transformers has for them.
            config: As transformers reads it.

        Raises:
            ValueError: transformers has no such model, or a tensor is missing or of another shape.
        """
        self.source = source
        self.model = _empty_model(config)
        self.backbone: nn.Module = self.model.base_model
        self._prefix = next(f"{name}." for name, module in self.model.named_modules() if module is self.backbone)
        inside = find_sites(self.backbone, "v2").blocks
        self.sites = Sites(blocks=inside)
        self._blocks = [f"{self._prefix}{name}." for name in inside]
        places: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in self.model.modules():
            for local, parameter in module._parameters.items():
                places.setdefault(id(parameter), []).append((module, local))
        # of each parameter every place that shares it
        self._modules = {name: places[id(parameter)] for name, parameter in self.model.named_parameters()}
        self._places = self._found(source)
        self._dtype, self._device = torch.float32, torch.device("cpu")

    def load(self, dtype: torch.dtype, device: torch.device, *, own: bool = False) -> None:
        """To run in that dtype and there. `own`: what is not a block's, an embedding's or the head's may be changed."""
        self._dtype, self._device = dtype, device
        outside = [name for name in self._places if not name.startswith(tuple(self._blocks))]
        changing = [name for name in outside if own and self._may_change(name)]
        self._put([name for name in outside if name not in changing])
        self._put(changing, own=True)
        for name, buffer in list(self.model.named_buffers()):
            if name not in self._places:
                self._set(name, buffer.to(device))

    @property
    def in_blocks(self) -> list[str]:
        """Names in the checkpoint."""
        return [file for name, file in self._places.items() if name.startswith(tuple(self._blocks))]

    @property
    def names(self) -> dict[str, str]:
        """Of its tensors in the checkpoint, by those of the backbone's parameters."""
        prefix = len(self._prefix)
        return {name[prefix:]: file for name, file in self._places.items() if name.startswith(self._prefix)}

    def tensor(self, name: str) -> Tensor:
        """One of the backbone's, by its name there."""
        kind = self.backbone.get_parameter if f"{self._prefix}{name}" in self._modules else self.backbone.get_buffer
        return kind(name).detach()

    @contextmanager
    def holding(self, block: int, *, own: bool = False) -> Iterator[None]:
        """With the weights of a block; `own`: to be changed. Of any other number there is nothing to hold."""
        try:
            with self._held(block, own=own):
                yield
        finally:
            give_back_free_memory()

    @contextmanager
    def _held(self, block: int, *, own: bool = False) -> Iterator[None]:
        names = [name for name in self._places if block < len(self._blocks) and name.startswith(self._blocks[block])]
        self._put(names, own=own)
        try:
            yield
        finally:
            self._take(names)
            self.source.release()

    @contextmanager
    def on_demand(self) -> Iterator[None]:
        """Every block has its weights while it runs."""
        held: dict[int, Any] = {}

        def before(block: int, *_: object) -> None:
            held[block] = self._held(block)
            held[block].__enter__()

        def after(block: int, *_: object) -> None:
            held.pop(block).__exit__(None, None, None)

        handles = []
        for block, name in enumerate(self.sites.blocks):
            module = self.backbone.get_submodule(name)
            handles.append(module.register_forward_pre_hook(partial(before, block)))
            handles.append(module.register_forward_hook(partial(after, block)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for block in list(held):
                after(block)

    def logits(self, output: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """From what the backbone returned, whatever the model does behind it.  # [batch, tokens, num_tokens]"""
        with standing_in([self.backbone], lambda _: output):
            return self.model(**inputs).logits

    def _found(self, source: Source) -> dict[str, str]:
        """The names in the checkpoint of all parameters, and of the buffers that it has."""
        found = {}
        parameters = dict(self.model.named_parameters())
        for name, tensor in [*parameters.items(), *self.model.named_buffers()]:
            bare = name.removeprefix(self._prefix)
            file = next((n for n in (name, bare, f"{self._prefix}{name}") if n in source.tensors), None)
            if file is None:
                if name in parameters:
                    raise ValueError(f"{source.name} must have {name!r} for {type(self.model).__name__}, got none")
                continue
            shape = source.tensors[file].shape
            if shape != tuple(tensor.shape):
                raise ValueError(
                    f"{file!r} of {source.name} must be {list(tensor.shape)} for {type(self.model).__name__}, "
                    f"got {list(shape)}"
                )
            found[name] = file
        return found

    def _may_change(self, name: str) -> bool:
        is_embedding = any(isinstance(module, nn.Embedding) for module, _ in self._modules.get(name, ()))
        return name.startswith(self._prefix) and not is_embedding

    def _put(self, names: Sequence[str], *, own: bool = False) -> None:
        for name in names:
            stored = self.source.tensor(self._places[name])
            tensor = stored.to(self._device, self._dtype if stored.is_floating_point() else stored.dtype)
            self._set(name, tensor.clone() if own and tensor.data_ptr() == stored.data_ptr() else tensor)

    def _take(self, names: Sequence[str]) -> None:
        for name in names:
            kind = self.model.get_parameter if name in self._modules else self.model.get_buffer
            self._set(name, torch.empty_like(kind(name), device="meta"))

    def _set(self, name: str, tensor: Tensor) -> None:
        if name in self._modules:
            parameter = nn.Parameter(tensor, requires_grad=False)
            for module, local in self._modules[name]:
                module._parameters[local] = parameter
        else:
            path, _, local = name.rpartition(".")
            self.model.get_submodule(path)._buffers[local] = tensor


class _ParametersOnMeta(TorchFunctionMode):
    """Weights are made by torch.empty, and take no memory here; tables that are computed are."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if func is torch.empty:
            options["device"] = "meta"
        return func(*args, **options)


def _empty_model(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        with _ParametersOnMeta(), torch.random.fork_rng(devices=[]):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise ValueError(
            f"config.json must be of a causal language model of transformers, got model_type {config.model_type!r}"
        ) from error
    model.config.use_cache = False
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval()
