"""What is refused, in which words, and that nothing is written before."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels import _C, ties_merge, ties_split, trim_thresholds

pytestmark = pytest.mark.any_isa

BASE = torch.zeros(4)
EXPERTS = [torch.ones(4), torch.full((4,), 2.0)]

# argument, requirement, value, and the call's arguments that differ from a good call's
REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("density must be in (0, 1], got 0.0", {"density": 0.0}),
    ("density must be in (0, 1], got -0.5", {"density": -0.5}),
    ("density must be in (0, 1], got 1.5", {"density": [0.5, 1.5]}),
    ("density must be finite, got nan", {"density": math.nan}),
    ("density must be one number or one per expert (2), got 3", {"density": [0.1, 0.2, 0.3]}),
    ("semantics must be one of 'paper', 'mergekit', 'peft', 'exact', got 'sd-mecha'", {"semantics": "sd-mecha"}),
    ("nonfinite must be one of 'error', 'propagate', 'drop', got 'ignore'", {"nonfinite": "ignore"}),
    ("experts must be at least one tensor, got none", {"experts": []}),
    ("experts must be at least one tensor, got none", {"experts": torch.zeros(0, 4)}),
    (
        "experts must be a list of tensors or one tensor [num_tasks, ...], got a 0-d tensor",
        {"experts": torch.tensor(1.0)},
    ),
    ("experts[1] must be a tensor, got list", {"experts": [torch.ones(4), [1.0]]}),
    ("experts[0] must be a tensor, got float", {"base": None, "experts": [1.0]}),
    ("base must be a tensor, got dict", {"base": {}}),
    ("experts[1] must have the shape of base, (4,), got (5,)", {"experts": [torch.ones(4), torch.ones(5)]}),
    ("experts[0] must have the shape of base, (4,), got (2, 2)", {"experts": [torch.ones(2, 2), torch.ones(4)]}),
    (
        "experts[1] must have the shape of experts[0], (4,), got ()",
        {"base": None, "experts": [BASE, torch.tensor(1.0)]},
    ),
    (
        "experts[1] must have the dtype of base, torch.float32, got torch.float16",
        {"experts": [torch.ones(4), torch.ones(4).half()]},
    ),
    ("experts[1] must be on the device of base, cpu, got meta", {"experts": [BASE, torch.ones(4, device="meta")]}),
    (
        "base must be float64, float32, float16 or bfloat16, got torch.int64",
        {"base": torch.zeros(4, dtype=torch.int64)},
    ),
    (
        "experts[0] must be float64, float32, float16 or bfloat16, got torch.complex64",
        {"base": None, "experts": [torch.zeros(4, dtype=torch.complex64)]},
    ),
]

REFUSED_BY_MERGE_AND_SPLIT: list[tuple[str, dict[str, Any]]] = [
    ("elect must be one of 'sum', 'count', 'none', got 'total'", {"elect": "total"}),
    ("elect must be 'sum' or 'count' with semantics='paper', got 'none'", {"elect": "none"}),
    ("elect must be 'sum' or 'count' with semantics='peft', got 'none'", {"elect": "none", "semantics": "peft"}),
    ("rescale must be False with semantics='paper', got True", {"rescale": True}),
    ("rescale must be False with semantics='peft', got True", {"rescale": True, "semantics": "peft"}),
    ("weights must be None with semantics='paper', got [1.0, 2.0]", {"weights": [1.0, 2.0]}),
    ("weights must be one number or one per expert (2), got 1", {"weights": [1.0], "semantics": "peft"}),
    ("weights must be finite, got inf", {"weights": [1.0, math.inf], "semantics": "mergekit"}),
    ("thresholds must have shape (2,), got (3,)", {"thresholds": torch.zeros(3)}),
    ("thresholds must be float32 or float64, got torch.int64", {"thresholds": torch.zeros(2, dtype=torch.int64)}),
    ("thresholds must be 0 or greater, got -1", {"thresholds": [-1.0, 0.5]}),
    ("thresholds must be 0 or greater, got nan", {"thresholds": [0.5, math.nan]}),
]

REFUSED_BY_MERGE: list[tuple[str, dict[str, Any]]] = [
    ("lam must be finite, got nan", {"lam": math.nan}),
    ("lam must be finite, got inf", {"lam": math.inf}),
    ("reduce must be one of 'mean', 'sum', 'max', 'magmax', 'unique', got 'median'", {"reduce": "median"}),
    ("reduce must be 'mean' or 'sum' with semantics='mergekit', got 'max'", {"reduce": "max", "semantics": "mergekit"}),
    ("reduce must be 'mean' or 'sum' with semantics='peft', got 'max'", {"reduce": "max", "semantics": "peft"}),
    ("normalize must be True with semantics='paper', got False: use reduce='sum'", {"normalize": False}),
    ("out must be a tensor, got list", {"out": [0.0]}),
    ("out must have the shape of experts[0], (4,), got (2, 2)", {"out": torch.zeros(2, 2)}),
    ("out must have the dtype of experts[0], torch.float32, got torch.float64", {"out": torch.zeros(4).double()}),
    ("out must be on the device of experts[0], cpu, got meta", {"out": torch.zeros(4, device="meta")}),
]


def exactly(message: str) -> str:
    return f"^{re.escape(message)}$"


def call(op: Callable[..., Tensor], changes: dict[str, Any]) -> Tensor:
    options = {"base": BASE, "experts": EXPERTS, "density": 0.5, **changes}
    return op(options.pop("base"), options.pop("experts"), **options)


@pytest.mark.parametrize(("message", "changes"), REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_every_op(message: str, changes: dict[str, Any]) -> None:
    for op in (trim_thresholds, ties_merge, ties_split):
        with pytest.raises((ValueError, TypeError), match=exactly(message)):
            call(op, changes)


@pytest.mark.parametrize(
    ("message", "changes"), REFUSED_BY_MERGE_AND_SPLIT, ids=lambda x: x if isinstance(x, str) else ""
)
def test_merge_and_split(message: str, changes: dict[str, Any]) -> None:
    for op in (ties_merge, ties_split):
        with pytest.raises((ValueError, RuntimeError), match=exactly(message)):
            call(op, changes)


@pytest.mark.parametrize(("message", "changes"), REFUSED_BY_MERGE, ids=lambda x: x if isinstance(x, str) else "")
def test_merge(message: str, changes: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError), match=exactly(message)):
        call(ties_merge, changes)


@pytest.mark.parametrize(
    "changes",
    [{"density": 2.0}, {"thresholds": [-1.0, 1.0]}, {"semantics": "peft", "reduce": "max"}, {"experts": []}],
    ids=str,
)
def test_refused_options_leave_out_untouched(changes: dict[str, Any]) -> None:
    out = torch.full((4,), 7.0)
    with pytest.raises((ValueError, RuntimeError)):
        call(ties_merge, {**changes, "out": out})
    assert (out == 7).all()


def nonfinite_problem(count: int, **places: Sequence[float]) -> tuple[Tensor, list[Tensor]]:
    """Zeros, with the given values in `base`, `expert0`, `expert1` from index 3 on."""
    named = {name: torch.zeros(count) for name in ("base", "expert0", "expert1")}
    for name, values in places.items():
        named[name][3 : 3 + len(values)] = torch.tensor(values)
    return named["base"], [named["expert0"], named["expert1"]]


@pytest.mark.parametrize("count", [10, 100_003])
@pytest.mark.parametrize("options", [{}, {"density": 1.0}, {"thresholds": [0.0, 0.1]}, {"semantics": "peft"}], ids=str)
@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"expert1": [math.nan]}, "experts[1] must be finite, got 1 NaN or infinite values"),
        ({"expert0": [math.inf, -math.inf, math.nan]}, "experts[0] must be finite, got 3 NaN or infinite values"),
        ({"expert1": [math.nan], "expert0": [math.inf] * 2}, "experts[0] must be finite, got 2 NaN or infinite values"),
        ({"base": [math.nan] * 2}, "base must be finite, got 2 NaN or infinite values"),
        ({"base": [-3e38], "expert1": [3e38]}, "experts[1] - base must be finite, got 1 overflows"),
    ],
    ids=str,
)
def test_nonfinite(places: dict[str, list[float]], message: str, options: dict[str, Any], count: int) -> None:
    base, experts = nonfinite_problem(count, **places)
    out = torch.full((count,), 7.0)
    with pytest.raises(RuntimeError, match=exactly(message)):
        ties_merge(base, experts, **options, out=out)
    assert (out == 7).all()
    with pytest.raises(RuntimeError, match=exactly(message)):
        ties_split(base, experts, **options)
    if "thresholds" not in options:
        with pytest.raises(RuntimeError, match=exactly(message)):
            trim_thresholds(base, experts, **{"density": 0.2, **options})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_nonfinite_in_every_dtype(dtype: torch.dtype) -> None:
    base, experts = nonfinite_problem(50, expert1=[math.nan, math.inf])
    with pytest.raises(RuntimeError, match=exactly("experts[1] must be finite, got 2 NaN or infinite values")):
        ties_merge(base.to(dtype), [expert.to(dtype) for expert in experts])


@pytest.mark.parametrize("shift", [0, 1, 5, -3])
@pytest.mark.parametrize("which", ["base", "expert"])
def test_out_that_overlaps_an_input(which: str, shift: int) -> None:
    storage = torch.arange(30, dtype=torch.float32)
    mine, out = storage[10:20], storage[10 + shift : 20 + shift]
    before = storage.clone()
    base, expert = (mine, torch.ones(10)) if which == "base" else (torch.ones(10), mine)
    message = "out must be apart from every input, got memory that overlaps one"
    with pytest.raises(RuntimeError, match=exactly(message)):
        ties_merge(base, [torch.zeros(10), expert], out=out)
    assert torch.equal(storage, before)


def test_out_that_overlaps_itself() -> None:
    out = torch.full((1,), 7.0).expand(4)
    with pytest.raises(RuntimeError):
        ties_merge(BASE, EXPERTS, out=out)
    assert (out == 7).all()


def test_ops_refuse_what_would_corrupt_memory() -> None:
    ops = torch.ops.surgery_kernels
    experts = [torch.ones(4), torch.ones(5)]
    refused: list[tuple[str, Callable[[], Any]]] = [
        (
            "experts[1] must have the shape of experts[0], got another",
            lambda: ops.ties_merge(None, experts, [0.5, 0.5]),
        ),
        (
            "base must have the dtype of experts[0], got another",
            lambda: ops.ties_split(BASE.half(), EXPERTS, [0.5, 0.5]),
        ),
        (
            "base must be one tensor for every merged tensor, got 2 for 1",
            lambda: ops.ties_merge_out([BASE, BASE], EXPERTS, [0.5, 0.5], out=[torch.zeros(4)]),
        ),
        (
            "density must be one number per expert (2), got 3",
            lambda: ops.ties_merge(None, EXPERTS, [0.5] * 3),
        ),
        (
            "density must be one number per expert (2), got 3",
            lambda: ops.ties_split(None, EXPERTS, [0.5] * 3),
        ),
        (
            "weights must be one per expert, got 3",
            lambda: ops.ties_merge(None, EXPERTS, [0.5] * 2, weights=[1.0] * 3, semantics="peft"),
        ),
        (
            "weights must be one per expert, got 1",
            lambda: ops.ties_split(None, EXPERTS, [0.5] * 2, weights=[1.0], semantics="peft"),
        ),
        (
            "thresholds must be one value per expert on the CPU, got 3",
            lambda: ops.ties_merge(None, EXPERTS, [0.5] * 2, thresholds=torch.zeros(3)),
        ),
        (
            "elect must be 'sum' or 'count' with semantics='peft', got 'none'",
            lambda: ops.ties_merge(None, EXPERTS, [0.5] * 2, semantics="peft", elect="none"),
        ),
        (
            "thresholds must be given where cuts are, got none",
            lambda: ops.ties_merge_out([], EXPERTS, [0.5] * 2, cuts=[0, 0], out=[torch.zeros(4)]),
        ),
        (
            "cuts must be one per expert, got 1",
            lambda: ops.ties_merge_out(
                [], EXPERTS, [0.5] * 2, thresholds=torch.zeros(2), cuts=[0], out=[torch.zeros(4)]
            ),
        ),
        (
            "thresholds must be 0 or greater, got -1",
            lambda: ops.ties_merge_out(
                [], EXPERTS, [0.5] * 2, thresholds=torch.tensor([0.0, -1.0]), cuts=[0, 0], out=[torch.zeros(4)]
            ),
        ),
        (
            "out must be one tensor for every merged tensor, got 2",
            lambda: ops.ties_merge_out([BASE], EXPERTS, [0.5] * 2, out=[torch.zeros(4), torch.zeros(4)]),
        ),
        (
            "out must be apart from every other out, got memory that overlaps one",
            lambda: ops.ties_merge_out([], [*EXPERTS, *EXPERTS], [0.5] * 2, out=[BASE, BASE]),
        ),
        (
            "experts must be all float64 or none within one scope, got both",
            lambda: ops.ties_merge_out([], [torch.ones(4), torch.ones(4).double()], [0.5], out=[BASE, BASE.double()]),
        ),
        (
            "semantics must be one of 'paper', 'mergekit', 'peft', 'exact', got 'x'",
            lambda: ops.trim_thresholds(None, EXPERTS, [0.5] * 2, semantics="x"),
        ),
        (
            "nonfinite must be one of 'error', 'propagate', 'drop', got 'x'",
            lambda: ops.trim_limits([], EXPERTS, [0.5] * 2, nonfinite="x"),
        ),
        (
            "experts must be one tensor for every expert and merged tensor, got 2 for 3 experts",
            lambda: ops.trim_limits([], EXPERTS, [0.5] * 3),
        ),
    ]
    for message, refused_call in refused:
        with pytest.raises(RuntimeError, match=re.escape(message)):
            refused_call()


def test_an_op_on_one_tensor_takes_one_expert_per_density() -> None:
    ops = torch.ops.surgery_kernels
    message = "density must be one number per expert (2), got 1"
    two_shapes = [torch.ones(4), torch.ones(3_000_000)]
    for op in (ops.ties_split, ops.ties_merge, ops.trim_thresholds):
        with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
            op(None, two_shapes, [0.2])
    with pytest.raises(RuntimeError, match=r"^experts must be at least one tensor, got none$"):
        ops.ties_merge_out([], [], [0.2], thresholds=torch.zeros(1), out=[])


def test_expanded_out() -> None:
    message = "out must have memory for every element, got an expanded tensor"
    with pytest.raises(RuntimeError, match=f"^{message}$"):
        ties_merge(None, [torch.ones(10)] * 2, out=torch.empty(1).expand(10))


@pytest.mark.parametrize(
    ("argument", "required"),
    [("density", "a number or a list of numbers"), ("lam", "a number"), ("thresholds", "a list of numbers")],
)
def test_what_is_no_number(argument: str, required: str) -> None:
    for value in ("0.2", torch.ones(1)):
        if argument == "thresholds" and isinstance(value, torch.Tensor):
            continue
        with pytest.raises(TypeError, match=rf"^{argument} must be {required}, got "):
            ties_merge(None, [torch.ones(3)], **{argument: value})


def test_a_graph_notices_what_was_written() -> None:
    buffer, weight = torch.ones(3), torch.ones(3, requires_grad=True)
    loss = (weight * buffer).sum()
    ties_merge(None, [torch.ones(3)], out=buffer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_unknown_instruction_set() -> None:
    before = _C.isa()
    with pytest.raises(ValueError, match=r"^name must be one of base.* on this machine, got 'sse9'$"):
        _C.set_isa("sse9")
    assert _C.isa() == before
