"""What surgery_train refuses, and how it says so."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from surgery_kernels import surgery_train
from tests.cases import generator
from tests.train_cases import Problem, problem

OPS = torch.ops.surgery_kernels
SMALL = problem(num_tasks=2, dim=5, rank=4, steps=3, batch=6, images=7)  # images: 7 and 10


def refusals() -> list[tuple[Problem, dict[str, Any], str]]:
    features, targets, down, up, down_moments, up_moments, indices = SMALL
    first, second = features
    change = SMALL._replace
    return [
        (change(down=[1.0]), {}, "down must be a tensor, got list"),
        (change(up_moments=None), {}, "up_moments must be a tensor, got NoneType"),
        (change(up=up.mT.contiguous().mT), {}, "up must be contiguous, got strides (20, 1, 5)"),
        (change(up=up.double()), {}, "up must have the dtype of down, torch.float32, got torch.float64"),
        (change(up=up.to("meta")), {}, "up must be on the device of down, cpu, got meta"),
        (change(down=down[0]), {}, "down must be [num_tasks, rank, dim] of at least one task, got (4, 5)"),
        (change(down=down[:0]), {}, "down must be [num_tasks, rank, dim] of at least one task, got (0, 4, 5)"),
        (change(up=up[:1]), {}, "up must have shape (2, 5, 4), got (1, 5, 4)"),
        (change(down_moments=down_moments[0]), {}, "down_moments must have shape (2, 2, 4, 5), got (2, 4, 5)"),
        (change(up_moments=up_moments[:1]), {}, "up_moments must have shape (2, 2, 5, 4), got (1, 2, 5, 4)"),
        (change(features=features[:1]), {}, "features must be one tensor per task, 2, got 1"),
        (change(targets=[*targets, first]), {}, "targets must be one tensor per task, 2, got 3"),
        (change(features=[first, 1.0]), {}, "features[1] must be a tensor, got float"),
        (change(features=[first[0], second]), {}, "features[0] must be [images, 5], got (5,)"),
        (change(features=[first, second[:, :4]]), {}, "features[1] must be [images, 5], got (10, 4)"),
        (
            change(features=[first.long(), second]),
            {},
            "features[0] must have one floating dtype with the others, got torch.int64",
        ),
        (
            change(features=[first, second.half()]),
            {},
            "features[1] must have one floating dtype with the others, got torch.float16",
        ),
        (
            change(features=[first, second.to("meta")]),
            {},
            "features[1] must be on the device of down, cpu, got meta",
        ),
        (
            change(targets=[targets[0], second[:9]]),
            {},
            "targets[1] must have the shape of features[1], (10, 5), got (9, 5)",
        ),
        (
            change(targets=[targets[0], second.half()]),
            {},
            "targets[1] must have the dtype of features[1], torch.float32, got torch.float16",
        ),
        (
            change(features=[x.double() for x in features], targets=[x.double() for x in targets]),
            {},
            "down must be float32, or float64 for float64 features, got torch.float32",
        ),
        (change(indices=indices.tolist()), {}, "indices must be a tensor, got list"),
        (change(indices=indices.to("meta")), {}, "indices must be on the device of down, cpu, got meta"),
        (change(indices=indices.int()), {}, "indices must be int64 [steps, 2, batch], got torch.int32 [3, 2, 6]"),
        (change(indices=indices[:, :1]), {}, "indices must be int64 [steps, 2, batch], got torch.int64 [3, 1, 6]"),
        (change(indices=indices[0]), {}, "indices must be int64 [steps, 2, batch], got torch.int64 [2, 6]"),
        (change(indices=indices[..., :0]), {}, "indices must be int64 [steps, 2, batch], got torch.int64 [3, 2, 0]"),
        (SMALL, {"lr": 0}, "lr must be finite and positive, got 0"),
        (SMALL, {"lr": math.inf}, "lr must be finite and positive, got inf"),
        (SMALL, {"lr": "1"}, "lr must be a number, got '1'"),
        (SMALL, {"eps": math.nan}, "eps must be finite and positive, got nan"),
        (SMALL, {"betas": (0.9, 1.0)}, "betas must be two numbers in [0, 1), got (0.9, 1.0)"),
        (SMALL, {"betas": (-0.1, 0.9)}, "betas must be two numbers in [0, 1), got (-0.1, 0.9)"),
        (SMALL, {"betas": (0.9,)}, "betas must be two numbers in [0, 1), got (0.9,)"),
        (SMALL, {"betas": (0.9, "0.99")}, "betas must be two numbers, got '0.99'"),
        (SMALL, {"step": -1}, "step must be 0 or more, got -1"),
        (SMALL, {"step": 1.0}, "step must be an integer, got 1.0"),
        (SMALL, {"zero_grad_steps": -1}, "zero_grad_steps must be 0 or more, got -1"),
    ]


@pytest.mark.any_isa
@pytest.mark.parametrize(("given", "options", "message"), refusals(), ids=lambda x: x if isinstance(x, str) else "")
def test_refused(given: Problem, options: dict[str, Any], message: str) -> None:
    before = [x.clone() for x in SMALL.moved]
    with pytest.raises((ValueError, TypeError), match=f"^{re.escape(message)}$"):
        surgery_train(*given, **options)
    assert all(torch.equal(x, y) for x, y in zip(SMALL.moved, before, strict=True))


@pytest.mark.any_isa
@pytest.mark.parametrize(("place", "number", "count"), [((2, 0, 5), 7, 7), ((0, 1, 0), 10, 10), ((1, 1, 3), -1, 10)])
def test_an_image_that_is_not_there(place: tuple[int, int, int], number: int, count: int) -> None:
    indices = SMALL.indices.clone()
    indices[place] = number
    given = SMALL._replace(indices=indices).clone()
    message = f"indices must be in [0, {count}) for task {place[1]}, got {number}"
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        surgery_train(*given)
    assert all(torch.equal(x, y) for x, y in zip(given.moved, SMALL.moved, strict=True))


@pytest.mark.any_isa
def test_memory_that_overlaps() -> None:
    memory = torch.randn(200, generator=generator(0))
    before = memory.clone()
    down, up = memory[:40].view(2, 4, 5), memory[39:79].view(2, 5, 4)
    for given, name in (
        (SMALL._replace(down=down, up=up), "up"),
        (SMALL._replace(down=down, down_moments=memory[:80].view(2, 2, 4, 5)), "down_moments"),
        (SMALL._replace(down=down, features=[memory[5:40].view(7, 5), SMALL.features[1]]), "down"),
        (SMALL._replace(up_moments=memory[:80].view(2, 2, 5, 4), targets=[memory[:35].view(7, 5)] * 2), "targets"),
    ):
        given = given._replace(targets=[given.targets[0], SMALL.targets[1]])
        message = "up_moments" if name == "targets" else name
        with pytest.raises(
            RuntimeError, match=f"^{message} must be apart from every other tensor, got memory that over"
        ):
            surgery_train(*given)
    assert torch.equal(memory, before)
    neighbours = SMALL._replace(down=down, up=memory[40:80].view(2, 5, 4))
    surgery_train(*neighbours)
    assert (memory[:80] != before[:80]).any()
    assert torch.equal(memory[80:], before[80:])


@pytest.mark.any_isa
def test_ops_refuse_what_would_corrupt_memory() -> None:
    features, targets, down, up, down_moments, up_moments, indices = SMALL
    change = SMALL._replace
    shape = "features must be [images, 5] on the CPU, got another shape or device"
    implied = " must have the shape that down implies, got another"
    moving = " must be contiguous on the CPU in the dtype of down, got another tensor"
    refused: list[tuple[Problem, dict[str, Any], str]] = [
        (change(down=down[0]), {}, "down must be [num_tasks, rank, dim], got 2 dimensions"),
        (change(down=down.mT.contiguous().mT), {}, "down" + moving),
        (change(up=up.double()), {}, "up" + moving),
        (change(up=up[:1]), {}, "up" + implied),
        (change(down_moments=down_moments[0]), {}, "down_moments" + implied),
        (change(up_moments=up_moments[:1]), {}, "up_moments" + implied),
        (change(features=features[:1]), {}, "features must be one tensor per task, 2, got 1"),
        (change(targets=targets * 2), {}, "targets must be one tensor per task, 2, got 4"),
        (change(features=[features[0][0], features[1]]), {}, shape),
        (change(features=[features[0][:, :4], features[1]]), {}, shape),
        (change(features=[features[0].half(), features[1]]), {}, "features must have one dtype, got several"),
        (change(targets=[x.half() for x in targets]), {}, "targets must have the dtype of features, got another"),
        (
            change(features=[features[0].long(), features[1]]),
            {},
            "features must be float64, float32, float16 or bfloat16, got another dtype",
        ),
        (
            change(targets=[targets[0][:6], targets[1]]),
            {},
            "targets[0] must have the images of features[0], 7, got 6",
        ),
        (
            change(features=[x.double() for x in features], targets=[x.double() for x in targets]),
            {},
            "down must be float32, or float64 for float64 features, got another dtype",
        ),
        *(
            (change(indices=wrong), {}, "indices must be int64 [steps, 2, batch] on the CPU, got another tensor")
            for wrong in (indices.int(), indices[0], indices[:, :1], indices[..., :0])
        ),
        (change(indices=indices + 7), {}, "indices must be in [0, 7) for task 0, got "),
        (SMALL, {"zero_grad_steps": -1}, "zero_grad_steps must be in [0, 1048576], got -1"),
        (SMALL, {"zero_grad_steps": 2**62}, f"zero_grad_steps must be in [0, 1048576], got {2**62}"),
    ]
    for given, options, message in refused:
        with pytest.raises(RuntimeError, match=f"^{re.escape(message)}"):
            OPS.surgery_train(*given, **options)
