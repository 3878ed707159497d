"""surgery_train against the oracle: autograd and Adam, one task and one step after another."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels import _C, reference, surgery_train
from tests import train_cases
from tests.cases import DTYPES, bits, generator, option_id
from tests.train_cases import Problem, problem, trained

OPS = torch.ops.surgery_kernels
BLOCK = 96  # images that the kernel takes at a time


def assert_close_to_reference(given: Problem, **options: Any) -> None:
    train_cases.assert_close_to_reference(trained(surgery_train, given, **options), given, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("dim", [1, 5, 33, 64, 512])
def test_every_dim_and_rank(dim: int, dtype: torch.dtype) -> None:
    for rank in {33: (1, 3, 16, 33, 80), 512: (16,)}.get(dim, (5, 17)):
        assert_close_to_reference(problem(num_tasks=2, dim=dim, rank=rank, steps=3, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("batch", [1, 7, BLOCK, BLOCK + 1, 2 * BLOCK + 30])
def test_batches(batch: int, dtype: torch.dtype) -> None:
    """More images than there are, too: a batch may name one several times."""
    assert_close_to_reference(problem(num_tasks=2, batch=batch, steps=2, dtype=dtype))


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.05},
        {"betas": (0.5, 0.9)},
        {"betas": (0.0, 0.0)},
        {"eps": 1e-3},
        {"zero_grad_steps": 1},
        {"zero_grad_steps": 7},
        {"step": 1_000},
        {"step": 40, "zero_grad_steps": 3, "lr": 3e-3},
    ],
    ids=str,
)
def test_options(options: dict[str, Any]) -> None:
    assert_close_to_reference(problem(steps=5, dtype=torch.float64, started="step" in options), **options)


def test_decays_are_rounded_once() -> None:
    """1 - 0.999 taken in float32 would be off by 1e-5."""
    given = problem(steps=1).clone()
    given.up.normal_(generator=generator(0))
    surgery_train(*given)
    for moments in (given.down_moments, given.up_moments):
        first, second = moments.double()
        torch.testing.assert_close(second, (first / 0.1).square() * 0.001, rtol=1e-6, atol=1e-30)


def test_float32_steps() -> None:
    assert_close_to_reference(problem(started=True), step=40, zero_grad_steps=3, lr=3e-3)


def test_the_loss_falls() -> None:
    losses = surgery_train(*problem(steps=300, dim=32, rank=16), lr=1e-2)
    assert (losses[-20:].mean(dim=0) < 0.85 * losses[:20].mean(dim=0)).all()


@pytest.mark.parametrize("zero_grad_steps", [0, 2])
def test_cut_into_calls(zero_grad_steps: int) -> None:
    given = problem(steps=20)
    whole = trained(surgery_train, given, zero_grad_steps=zero_grad_steps)
    copy, losses, step = given.clone(), [], 0
    for part in given.indices.split([1, 7, 0, 12]):
        losses.append(surgery_train(*copy[:6], part, step=step, zero_grad_steps=zero_grad_steps))
        step += len(part) * (1 + zero_grad_steps)
    for x, y in zip([torch.cat(losses), *copy.moved], whole, strict=True):
        assert torch.equal(bits(x), bits(y))


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_threads(dtype: torch.dtype) -> None:
    given = problem(num_tasks=5, dim=64, rank=16, steps=20, dtype=dtype)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append([bits(x) for x in trained(surgery_train, given)])
    for other in results[1:]:
        for x, y in zip(other, results[0], strict=True):
            assert torch.equal(x, y)


def test_tasks_do_not_touch_each_other() -> None:
    given = problem(num_tasks=3)
    together = trained(surgery_train, given)
    for t in range(3):
        parameters = [given.down[t : t + 1], given.up[t : t + 1]]
        moments = [given.down_moments[:, t : t + 1], given.up_moments[:, t : t + 1]]
        alone = Problem(
            given.features[t : t + 1], given.targets[t : t + 1], *parameters, *moments, given.indices[:, t : t + 1]
        )
        losses, down, up, *_ = trained(surgery_train, alone)
        assert torch.equal(losses[:, 0], together[0][:, t])
        assert torch.equal(down[0], together[1][t])
        assert torch.equal(up[0], together[2][t])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_nonfinite_image_reaches_its_task_from_the_step_that_takes_it(value: float) -> None:
    given = problem(num_tasks=2, steps=6)
    expected = trained(surgery_train, given)
    features = [x.clone() for x in given.features]
    features[1][0, 32] = value
    indices = given.indices.clamp(min=1)
    indices[3, 1, 2] = 0
    spoilt = trained(surgery_train, given._replace(features=features, indices=indices))
    healthy = trained(surgery_train, given._replace(indices=given.indices.clamp(min=1)))
    assert torch.equal(spoilt[0][:, 0], healthy[0][:, 0])
    assert torch.equal(spoilt[0][:3, 1], healthy[0][:3, 1])
    assert not spoilt[0][3:, 1].isfinite().any()
    assert torch.equal(spoilt[1][0], healthy[1][0])
    assert torch.equal(spoilt[2][0], healthy[2][0])
    assert spoilt[1][1].isnan().any()
    assert all(x.isfinite().all() for x in expected)


def test_an_infinite_loss_is_no_nan() -> None:
    """Infinity times the zeros of the padding must not reach the sum."""
    given = problem(num_tasks=1, dim=5, rank=1, steps=1)
    given.down.fill_(torch.finfo(torch.float32).max)
    given.up.fill_(1)
    features = [torch.full_like(x, 2.0) for x in given.features]
    losses = [
        trained(train, given._replace(features=features))[0] for train in (surgery_train, reference.surgery_train)
    ]
    assert losses[0].item() == losses[1].item() == math.inf


def test_where_nothing_is_wrong_nothing_moves() -> None:
    given = problem(steps=5)
    losses, down, up, *moments = trained(surgery_train, given._replace(targets=given.features))
    assert losses.count_nonzero() == 0
    assert torch.equal(down, given.down)
    assert torch.equal(up, given.up)
    assert all(x.count_nonzero() == 0 for x in moments)


@pytest.mark.parametrize(
    "shape", [{"rank": 0}, {"dim": 0}, {"steps": 0}, {"steps": 0, "images": 0, "batch": 1, "num_tasks": 1}], ids=str
)
def test_empty(shape: dict[str, int]) -> None:
    given = problem(**{"steps": 2, **shape}) if shape.get("images") != 0 else problem(num_tasks=1, steps=0, images=1)
    if shape.get("images") == 0:
        given = given._replace(features=[given.features[0][:0]], targets=[given.targets[0][:0]])
    for x, y in zip(trained(surgery_train, given), trained(reference.surgery_train, given), strict=True):
        torch.testing.assert_close(x, y, equal_nan=True)


def test_layouts() -> None:
    """Features, targets and indices of any strides; features and targets that require gradients."""
    given = problem()
    expected = trained(surgery_train, given)
    features = [x.t().contiguous().t().requires_grad_() for x in given.features]
    targets = [torch.cat([x, x], dim=1)[:, :33].requires_grad_() for x in given.targets]
    indices = given.indices.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    moved = given._replace(features=features, targets=targets, indices=indices)
    for x, y in zip(trained(surgery_train, moved), expected, strict=True):
        assert torch.equal(x, y)
    one = torch.randn(33, generator=generator(0))
    expanded = given._replace(features=[one.expand(60, 33)] * 3, targets=[x[:60] for x in problem(images=60).targets])
    copied = expanded._replace(features=[x.contiguous() for x in expanded.features])
    for x, y in zip(trained(surgery_train, expanded), trained(surgery_train, copied), strict=True):
        assert torch.equal(x, y)


@pytest.mark.any_isa
def test_leaves_that_require_gradients_are_moved() -> None:
    given = problem().clone()
    expected = trained(surgery_train, given)
    down, up = given.down.requires_grad_(), given.up.requires_grad_()
    losses = surgery_train(*given)
    assert not losses.requires_grad
    assert down.is_leaf and up.is_leaf and down.requires_grad and up.requires_grad
    for x, y in zip([losses, *given.moved], expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.any_isa
def test_a_graph_notices_what_was_moved() -> None:
    given = problem()
    down = given.down.clone().requires_grad_()
    loss = down.square().sum()
    surgery_train(*given._replace(down=down))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.any_isa
@pytest.mark.usefixtures("restored_isa")
def test_instruction_sets_differ_by_rounding() -> None:
    given, results = problem(steps=10), []
    for isa in _C.isas():
        _C.set_isa(isa)
        results.append(trained(surgery_train, given))
    for other in results[1:]:
        for x, y in zip(other, results[0], strict=True):
            assert (x - y).norm() <= 1e-5 * y.norm()


@pytest.mark.any_isa
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=option_id)
def test_opcheck(dtype: torch.dtype) -> None:
    given = problem(steps=2, dtype=dtype)
    torch.library.opcheck(OPS.surgery_train, tuple(given), {"step": 3, "lr": 0.01, "zero_grad_steps": 1})
    torch.library.opcheck(OPS.surgery_train, tuple(given))


@pytest.mark.any_isa
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend: str) -> None:
    def run(given: Problem) -> Tensor:
        return surgery_train(*given, lr=0.01) * 2

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend=backend)
    given = problem(steps=3)
    first, second = given.clone(), given.clone()
    assert torch.equal(compiled(first), run(second))
    for x, y in zip(first.moved, second.moved, strict=True):
        assert torch.equal(x, y)
    assert not torch.equal(first.up, given.up)


@pytest.mark.any_isa
def test_fakes_have_the_shapes_and_dtypes_of_the_results() -> None:
    for dtype in DTYPES:
        given = problem(dtype=dtype)
        groups = [[x.to("meta") for x in group] for group in given[:2]]
        losses = surgery_train(*groups, *(x.to("meta") for x in given[2:]))
        expected = trained(surgery_train, given)[0]
        assert (losses.shape, losses.dtype) == (expected.shape, expected.dtype)
