"""A model called with other tensors than its own."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from .inputs import Inputs


def call_with(model: nn.Module, tensors: Mapping[str, Tensor], inputs: Inputs) -> Any:
    """``model(inputs)`` with `tensors` in place of its own; a tied one is replaced wherever it is, under any name.

    torch's own rule for tied tensors would leave a module that has two names with the replacement for good.
    """
    names_of: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        own = itertools.chain(module.named_parameters(path, recurse=False), module.named_buffers(path, recurse=False))
        for name, tensor in own:
            names_of.setdefault(id(tensor), []).append(name)
    everywhere = dict(tensors)
    for names in names_of.values():
        for given in filter(tensors.__contains__, names):
            everywhere |= {name: tensors[given] for name in names if name not in tensors}
    args, options = (inputs, {}) if isinstance(inputs, Tensor) else ((), inputs)
    return functional_call(model, everywhere, args, options, tie_weights=False)
