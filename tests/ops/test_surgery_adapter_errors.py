"""What surgery_adapter refuses, and how it says so."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels import surgery_adapter

OPS = torch.ops.surgery_kernels
FEATURES, DOWN, UP = torch.zeros(2, 3, 5), torch.zeros(2, 4, 5), torch.zeros(2, 5, 4)
BIAS = torch.zeros(2, 5)
INDEX = torch.zeros(3, dtype=torch.int64)


@pytest.mark.any_isa
@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([1.0], DOWN, UP), {}, "features must be a tensor, got list"),
        ((FEATURES, 1.0, UP), {}, "down must be a tensor, got float"),
        ((FEATURES, DOWN, None), {}, "up must be a tensor, got NoneType"),
        ((FEATURES, DOWN.to("meta"), UP), {}, "down must be on the device of features, cpu, got meta"),
        ((FEATURES, DOWN, UP.to("meta")), {}, "up must be on the device of features, cpu, got meta"),
        (
            (FEATURES.long(), DOWN, UP),
            {},
            "features must be float64, float32, float16 or bfloat16, got torch.int64",
        ),
        ((FEATURES, DOWN[0], UP), {}, "down must be [num_tasks, rank, dim], got (4, 5)"),
        ((FEATURES, DOWN, UP.mT), {}, "up must have shape (2, 5, 4), got (2, 4, 5)"),
        (
            (FEATURES, DOWN.double(), UP.double()),
            {},
            "down must be torch.float32 like features, or float32, got torch.float64",
        ),
        (
            (FEATURES.half(), DOWN, UP.half()),
            {},
            "up must be torch.float16 like features, or float32, got torch.float16",
        ),
        (
            (FEATURES[0, 0], DOWN, UP),
            {},
            "features must be [num_tasks, rows, dim] or [num_tasks, batch, tokens, dim], got (5,)",
        ),
        ((FEATURES, DOWN, UP), {"token_mean": True}, "features must be [num_tasks, batch, tokens, dim], got (2, 3, 5)"),
        (
            (FEATURES[0, 0], DOWN, UP),
            {"task_index": INDEX},
            "features must be [rows, dim] or [rows, tokens, dim], got (5,)",
        ),
        (
            (FEATURES[0], DOWN, UP),
            {"task_index": INDEX, "token_mean": True},
            "features must be [rows, tokens, dim], got (3, 5)",
        ),
        ((FEATURES[..., :4], DOWN, UP), {}, "features must have the dim of down, 5, got 4"),
        ((FEATURES, DOWN, UP), {"bias": 1.0}, "bias must be a tensor, got float"),
        ((FEATURES, DOWN, UP), {"bias": BIAS.to("meta")}, "bias must be on the device of features, cpu, got meta"),
        ((FEATURES, DOWN, UP), {"bias": BIAS[0]}, "bias must have shape (2, 5), got (5,)"),
        (
            (FEATURES, DOWN, UP),
            {"bias": BIAS.double()},
            "bias must be torch.float32 like features, or float32, got torch.float64",
        ),
        ((FEATURES, DOWN, UP), {"activation": "gelu"}, "activation must be one of 'relu', 'none', got 'gelu'"),
        ((FEATURES[:1], DOWN, UP), {}, "features must have the num_tasks of down, 2, got 1"),
        ((FEATURES[0], DOWN, UP), {"task_index": [0, 1, 0]}, "task_index must be a tensor, got list"),
        ((FEATURES[0], DOWN, UP), {"task_index": INDEX.int()}, "task_index must be int64 [3], got torch.int32 [3]"),
        ((FEATURES[0], DOWN, UP), {"task_index": INDEX[:2]}, "task_index must be int64 [3], got torch.int64 [2]"),
        (
            (FEATURES[0], DOWN, UP),
            {"task_index": INDEX.to("meta")},
            "task_index must be on the device of features, cpu, got meta",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_refused(arguments: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{re.escape(message)}$"):
        surgery_adapter(*arguments, **options)


@pytest.mark.any_isa
@pytest.mark.parametrize("number", [-1, 2, 2**62])
def test_task_index_out_of_range(number: int) -> None:
    index = torch.tensor([0, number, 1])
    with pytest.raises(RuntimeError, match=rf"^task_index must be in \[0, 2\), got {number}$"):
        surgery_adapter(FEATURES[0], DOWN, UP, task_index=index)


@pytest.mark.any_isa
def test_ops_refuse_what_would_corrupt_memory() -> None:
    corrected, _, hidden = OPS.surgery_adapter(FEATURES, DOWN, UP, None, False, True)
    means = torch.zeros(2, 5)
    implied = " must be what surgery_adapter's results imply on the CPU, got another device, dtype or shape"

    def forward(features: Tensor, down: Tensor = DOWN, up: Tensor = UP, index: Tensor | None = None) -> Any:
        return OPS.surgery_adapter(features, down, up, index)

    def backward(
        grad: Tensor | None = corrected, grad_means: Tensor | None = None, hidden: Tensor = hidden, **options: Tensor
    ) -> Any:
        features, down = options.get("features", FEATURES), options.get("down", DOWN)
        return OPS.surgery_adapter_backward(grad, grad_means, features, down, UP, None, hidden, True, True)

    refused: list[tuple[str, Callable[[], Any]]] = [
        ("features must have 3 or 4 dimensions, got 1", lambda: forward(FEATURES[0, 0])),
        ("features must have 2 or 3 dimensions, got 1", lambda: forward(FEATURES[0, 0], index=INDEX)),
        ("features must have 3 or 4 dimensions, got 0", lambda: forward(FEATURES[0, 0, 0])),
        (
            "features must be contiguous in the last dimension, got stride 3",
            lambda: forward(torch.zeros(2, 5, 3).mT),
        ),
        (
            "features must be float64, float32, float16 or bfloat16, got another dtype",
            lambda: forward(FEATURES.long()),
        ),
        (
            "down and up must be float32, or float64 for float64 features, got another dtype",
            lambda: forward(FEATURES, up=UP.double()),
        ),
        (
            "down and up must be float32, or float64 for float64 features, got another dtype",
            lambda: forward(FEATURES.half(), DOWN.half(), UP.half()),
        ),
        ("down must be [num_tasks, rank, dim], got 2 dimensions", lambda: forward(FEATURES, DOWN[0])),
        ("down must have the dim of features, 4, got 5", lambda: forward(FEATURES[..., :4])),
        ("up must have shape (2, 5, 4), got another", lambda: forward(FEATURES, up=UP.mT)),
        ("up must have shape (2, 5, 4), got another", lambda: forward(FEATURES, up=UP[0])),
        ("features must have the num_tasks of down, 2, got 1", lambda: forward(FEATURES[:1])),
        (
            "bias must be (2, 5) on the CPU in the dtype of down, got another tensor",
            lambda: OPS.surgery_adapter(FEATURES, DOWN, UP, bias=BIAS[:1]),
        ),
        (
            "bias must be (2, 5) on the CPU in the dtype of down, got another tensor",
            lambda: OPS.surgery_adapter(FEATURES, DOWN, UP, bias=BIAS.double()),
        ),
        (
            "activation must be one of 'relu', 'none', got 'gelu'",
            lambda: OPS.surgery_adapter(FEATURES, DOWN, UP, activation="gelu"),
        ),
        (
            "task_index must be int64 [3] on the CPU, got another tensor",
            lambda: forward(FEATURES[0], index=INDEX.int()),
        ),
        ("task_index must be int64 [3] on the CPU, got another tensor", lambda: forward(FEATURES[0], index=INDEX[:2])),
        ("task_index must be in [0, 2), got 2", lambda: forward(FEATURES[0], index=INDEX + 2)),
        ("grad" + implied, lambda: backward(corrected[:1])),
        ("grad" + implied, lambda: backward(corrected.double())),
        ("grad_means" + implied, lambda: backward(grad_means=means)),
        ("grad_means" + implied, lambda: backward(grad_means=FEATURES.double())),
        ("hidden" + implied, lambda: backward(hidden=hidden[:-1])),
        ("hidden" + implied, lambda: backward(hidden=hidden.double())),
        ("up must have shape (2, 5, 3), got another", lambda: backward(down=DOWN[:, :3])),
    ]
    for message, call in refused:
        with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
            call()
