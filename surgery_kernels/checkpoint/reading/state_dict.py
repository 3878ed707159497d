"""The state dict in what torch.save was given."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

# What programs call the weights of a model among other things. None comes before another: two are two models.
CONTAINERS = (
    *("state_dict", "model_state_dict", "model", "module", "net", "network", "params", "weights"),
    *("ema", "model_ema", "ema_model", "ema_state_dict", "state_dict_ema", "params_ema", "ema_params"),
)
# What they keep beside it to go on with the training.
TRAINING = re.compile(
    r"(optim\w*|(lr_?)?sched\w*|(grad_)?scaler\w*|callbacks|loops|rng_?states?|(random|cuda|torch)_\w*states?|losses|history)"
)


def state_dict(path: Path, content: Any) -> dict[str, Tensor]:
    """The tensors by name in the content of a file, also one or more levels down; numbers and words are passed over.

    Raises:
        ValueError: there are none, or nothing says which of several dicts of them is meant.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold a dict of tensors by name, got {type(content).__name__}")
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    groups = [
        name
        for name, value in content.items()
        if name not in tensors and _holds_tensors(value) and not _of_training(name)
    ]
    # beside a dict of tensors are only counters
    beside = [name for name, tensor in tensors.items() if tensor.ndim and not _of_training(name)] if groups else []
    if not groups and tensors:
        for name in tensors:
            if not isinstance(name, str):
                raise ValueError(f"{path} must hold tensors by name, got the name {name!r}")
        return tensors
    if len(groups) == 1 and groups[0] in CONTAINERS and not beside:
        return state_dict(path, content[groups[0]])
    found = ", ".join(map(repr, [*groups, *beside][:5])) or "none"
    raise ValueError(
        f"{path} must hold one dict of tensors by name, itself or as its {', '.join(CONTAINERS[:4])}, ..., "
        f"got tensors in {found}: save the one that you mean with torch.save"
    )


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(isinstance(inner, Tensor) or _holds_tensors(inner) for inner in value.values())
    if isinstance(value, (list, tuple, set)):
        return any(isinstance(inner, Tensor) or _holds_tensors(inner) for inner in value)
    return False


def _of_training(name: Any) -> bool:
    return isinstance(name, str) and TRAINING.fullmatch(name.lower()) is not None
