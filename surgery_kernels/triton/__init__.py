"""The ops on CUDA tensors. Triton and the kernels are imported by the first call, never by `import surgery_kernels`."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from .. import _C
from ..ops import looks

MODULES = {  # of every op in csrc/ops.cpp; the function there is named like the op
    "trim_thresholds": "trim",
    "trim_limits": "trim",
    "ties_merge": "ties_merge",
    "ties_split": "ties_merge",
    "ties_merge_out": "ties_merge",
    "masks": "masks",
    "mix_out": "mix",
    "weighted_merge_out": "weighted_merge",
    "weighted_merge_scored_out": "weighted_merge",
    "weighted_merge_limits": "weighted_merge",
    "census": "census",
    "gram": "gram",
    "gram_cross": "gram_cross",
    "steps_out": "steps",
    "steps_limits": "steps",
    "surgery_adapter": "surgery_adapter",
    "surgery_adapter_backward": "surgery_adapter",
    "surgery_train": "surgery_train",
    "representation_loss": "representation_loss",
    "representation_loss_backward": "representation_loss",
    "combine": "combine",
    "combine_backward": "combine",
    "combine_masked": "combine_masked",
    "combine_masked_backward": "combine_masked",
    "combine_grouped": "combine_grouped",
    "combine_grouped_backward": "combine_grouped",
}


CUDA_OPS = ("trim_thresholds", "trim_limits", "ties_merge", "ties_split", "ties_merge_out")  # csrc/cuda has these too


@functools.cache
def host_function(op: str) -> Callable[..., Any]:
    """What runs on CUDA tensors: Triton, or with SURGERY_KERNELS_CUDA=1 the CUDA kernels where there is one."""
    if os.environ.get("SURGERY_KERNELS_CUDA", "0") == "1" and op in CUDA_OPS:
        if not _C.build_info()["cuda"]:
            raise RuntimeError("SURGERY_KERNELS_CUDA must be 0 where the library was built without CUDA, got 1")
        return _where_it_can(getattr(torch.ops.surgery_kernels_cuda, op), op)
    return _of_triton(op)


def _of_triton(op: str) -> Callable[..., Any]:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise ImportError("triton must be installed for CUDA tensors, got none: pip install triton") from error
    return getattr(importlib.import_module(f".{MODULES[op]}", __name__), op)


def _where_it_can(cuda: Callable[..., Any], op: str) -> Callable[..., Any]:
    """The CUDA op; Triton's where an option is given that it lacks.

    With the ValueError of Triton's host functions: C++ can raise RuntimeError only.
    """
    schema = getattr(torch.ops.surgery_kernels, op).default._schema.arguments
    known = {argument.name for argument in cuda.default._schema.arguments}  # type: ignore[attr-defined]
    defaults = {argument.name: argument.default_value for argument in schema if argument.name not in known}

    def call(*arguments: Any, **options: Any) -> Any:
        given = {**dict(zip([argument.name for argument in schema], arguments, strict=False)), **options}
        lacking = any(given.get(name, default) != default for name, default in defaults.items())
        if lacking or given.get("semantics") == "exact":
            return _of_triton(op)(**given)
        taken = {name: value for name, value in given.items() if name in known}
        if given.get("nonfinite", "error") != "error":
            return cuda(**taken)
        device = _first_tensor((given["experts"],)).device
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise ValueError("nonfinite must be 'propagate' or 'drop' while a CUDA graph is captured, got 'error'")
        found = torch.zeros(1, dtype=torch.int64, device=device)
        result = cuda(**taken, found=found)
        looks.look(found, _inputs_of(given).tell)
        return result

    return call


def _inputs_of(given: dict[str, Any]) -> looks.Inputs:
    base, experts = given["base"], given["experts"]
    compute = torch.float64 if experts[0].dtype == torch.float64 else torch.float32
    bases = [base] if isinstance(base, Tensor) else base or []
    num_tasks = len(given["density"])
    return looks.Inputs(bases, experts, num_tasks, compute, given.get("names") or [], task_vectors=True, certain=True)


def _first_tensor(arguments: tuple[Any, ...]) -> Tensor:
    """Every op takes one, or a list of some."""
    lists = (argument if isinstance(argument, (list, tuple)) else [argument] for argument in arguments)
    return next(argument for listed in lists for argument in listed[:1] if isinstance(argument, Tensor))


def _implementation(op: str) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        with torch.cuda.device_of(_first_tensor(arguments)):  # where kernels are launched and memory is allocated
            return host_function(op)(*arguments, **options)

    return call


def _may_raise_for_numbers(op: OpOverload) -> bool:
    return any(argument.name == "nonfinite" for argument in op._schema.arguments)


_library = torch.library.Library("surgery_kernels", "IMPL")
for _op in MODULES:
    _library.impl(_op, _implementation(_op), "CUDA")
    # Under nonfinite="error" it looks at the device, which no graph can: torch.compile ends its CUDA graph before it.
    if _may_raise_for_numbers(_overload := getattr(torch.ops.surgery_kernels, _op).default):
        _overload.tags.append(torch.Tag.cudagraph_unsafe)
