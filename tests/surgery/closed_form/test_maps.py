"""Ridge regression of low rank against its formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from surgery_kernels.surgery.closed_form.maps import RIDGES, Map, Moments, of_few, solve
from tests.cases import generator
from tests.fits import ridge_map

pytestmark = pytest.mark.any_isa

DIM = 6


def rows(count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Features off their origin, distances that follow from them in part, and weights, some of them 0."""
    g = generator(count, seed)
    x = torch.randn(count, DIM, generator=g, dtype=torch.float64) @ torch.randn(DIM, DIM, generator=g).double() + 3
    y = x @ torch.randn(DIM, DIM, generator=g).double() / 4 + torch.randn(count, DIM, generator=g).double() - 1
    return x, y, torch.randint(0, 4, (count,), generator=g) / 2.0


def solved_alone(moments: Moments, rank: int, ridge: float) -> Map:
    (found,) = solve([moments.problem()], [ridge], rank)
    return found


def map_of_few(x: Tensor, y: Tensor, rank: int, ridge: float | None) -> Map:
    problem, chosen = of_few(x, y, ridge)
    (found,) = solve([problem], [chosen], rank)
    return found


def whole(solved: Map) -> Tensor:
    return solved.down.T @ (solved.up.T if solved.up.shape[1] else torch.eye(DIM, dtype=torch.float64))


@pytest.mark.parametrize("rank", [1, 3, DIM, 9])
@pytest.mark.parametrize("ridge", [1e-4, 1e-2, 1.0])
def test_the_solution_is_that_of_the_formula(rank: int, ridge: float) -> None:
    x, y, weights = rows(40)
    moments = Moments()
    for part in torch.arange(40).split(13):
        moments.add(x[part], y[part], weights[part])
    solved = solved_alone(moments, rank, ridge)
    matrix, shift = ridge_map(x, y, weights.double(), rank, ridge)
    assert solved.down.shape == (min(rank, DIM), DIM)
    assert solved.up.shape == (DIM, rank if rank < DIM else 0)
    torch.testing.assert_close(whole(solved), matrix)
    torch.testing.assert_close(solved.shift, shift)


def test_rows_without_weights_count_once() -> None:
    x, y, _ = rows(40)
    moments = Moments()
    moments.add(x, y)
    solved = solved_alone(moments, 2, 1e-2)
    torch.testing.assert_close(whole(solved), ridge_map(x, y, torch.ones(40).double(), 2, 1e-2)[0])
    few = map_of_few(x, y, 2, 1e-2)
    torch.testing.assert_close(whole(few), whole(solved))
    torch.testing.assert_close(few.shift, solved.shift)


def test_a_large_mean_costs_float32_nothing() -> None:
    x, y, _ = rows(400)
    moments = Moments()
    moments.add((x + 1_000).float(), y.float())
    matrix, _ = ridge_map(x, y, torch.ones(400).double(), DIM, 1e-4)
    torch.testing.assert_close(whole(solved_alone(moments, DIM, 1e-4)), matrix, rtol=0, atol=1e-3)


@pytest.mark.parametrize("count", [3, 5, 8, 60])
def test_the_final_ridge_predicts_what_was_left_out(count: int) -> None:
    x, y, _ = rows(count)
    mean = (x - x.mean(0)).square().mean()

    def left_out(ridge: float) -> float:
        total = 0.0
        for i in range(count):
            others = torch.arange(count) != i
            u, d = x[others] - x[others].mean(0), y[others] - y[others].mean(0)
            damped = u.T @ u + count * ridge * mean * torch.eye(DIM, dtype=torch.float64)
            predicted = y[others].mean(0) + (x[i] - x[others].mean(0)) @ torch.linalg.solve(damped, u.T @ d)
            total += float((y[i] - predicted).square().sum())
        return total

    best = min(RIDGES, key=left_out)
    torch.testing.assert_close(whole(map_of_few(x, y, DIM, None)), whole(map_of_few(x, y, DIM, best)))


def test_the_final_ridge_grows_as_rows_get_fewer() -> None:
    """Distances that have nothing to do with the features: what few rows seem to say is damped."""
    g = generator(7)
    x, y = (torch.randn(8, 40, generator=g, dtype=torch.float64) for _ in range(2))
    sizes = [float((x - x.mean(0)).matmul(map_of_few(x, y, 40, ridge).down.T).norm()) for ridge in (1e-2, None)]
    assert sizes[1] < 0.2 * sizes[0]


@pytest.mark.parametrize("count", [1, 2])
def test_one_row_and_two(count: int) -> None:
    x, y, _ = rows(count)
    solved = map_of_few(x, y, 3, None)
    torch.testing.assert_close(x.mean(0) @ whole(solved) + solved.shift, y.mean(0))
    moments = Moments()
    moments.add(x, y)
    solved = solved_alone(moments, 3, 1e-2)
    torch.testing.assert_close(x.mean(0) @ whole(solved) + solved.shift, y.mean(0))


def test_features_that_never_change_leave_the_shift() -> None:
    x, y, _ = rows(10)
    for solved in (map_of_few(x[:1].expand(10, -1), y, DIM, None), map_of_few(x * 0, y, 2, 1e-2)):
        assert not whole(solved).any()
        torch.testing.assert_close(solved.shift, y.mean(0))
    moments = Moments()
    moments.add(x[:1].expand(10, -1), y)
    solved = solved_alone(moments, 2, 1e-2)
    assert not whole(solved).any()
    torch.testing.assert_close(solved.shift, y.mean(0))


def test_some_features_that_never_change() -> None:
    x, y, _ = rows(40)
    x[:, 2] = 5
    solved = map_of_few(x, y, DIM, 1e-2)
    assert whole(solved)[2].abs().max() < 1e-12 and whole(solved).isfinite().all()


def test_calls_without_weight_say_nothing() -> None:
    x, y, weights = rows(10)
    moments = Moments()
    moments.add(x * torch.nan, y, weights * 0)
    assert moments.weight == 0
    moments.add(x, y, weights)
    alone = Moments()
    alone.add(x, y, weights)
    assert torch.equal(solved_alone(moments, 2, 0.1).down, solved_alone(alone, 2, 0.1).down)


@pytest.mark.parametrize("rank", [2, DIM])
def test_problems_solved_together_are_those_alone(rank: int) -> None:
    """One that never changes among them, and ridges of their own."""
    pairs = [rows(40, seed)[:2] for seed in range(3)]
    pairs[1] = (pairs[1][0][:1].expand(40, -1), pairs[1][1])
    problems = [of_few(x, y, 0.1)[0] for x, y in pairs]
    ridges = [1e-3, 0.1, 10.0]
    for problem, ridge, together in zip(problems, ridges, solve(problems, ridges, rank), strict=True):
        (alone,) = solve([problem], [ridge], rank)
        for name in ("down", "up", "shift"):
            assert torch.equal(getattr(together, name), getattr(alone, name)), name
