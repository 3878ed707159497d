"""Features, targets and adapters for the tests of surgery_train, on the CPU and in Triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from surgery_kernels import reference
from tests.cases import generator


class Problem(NamedTuple):
    features: list[Tensor]
    targets: list[Tensor]
    down: Tensor
    up: Tensor
    down_moments: Tensor
    up_moments: Tensor
    indices: Tensor

    @property
    def moved(self) -> tuple[Tensor, ...]:
        return self[2:6]

    def map(self, change: Callable[[Tensor], Tensor]) -> Problem:
        return Problem(*([change(x) for x in group] for group in self[:2]), *map(change, self[2:]))

    def clone(self) -> Problem:
        return self._replace(**{name: getattr(self, name).clone() for name in self._fields[2:6]})

    def double(self) -> Problem:
        return Problem(*([x.double() for x in group] for group in self[:2]), *(x.double() for x in self.moved), self[6])


def problem(
    num_tasks: int = 3,
    dim: int = 33,
    rank: int = 5,
    steps: int = 12,
    batch: int = 16,
    images: int = 40,
    dtype: torch.dtype = torch.float32,
    started: bool = False,
) -> Problem:
    """Targets a step away from the features; tasks differ in their number of images. `started`: not the first step."""
    g = generator(num_tasks, dim, rank, steps, batch, images)
    compute = torch.promote_types(dtype, torch.float32)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    features = [normal(images + 3 * t, dim) for t in range(num_tasks)]
    targets = [x + 0.3 * normal(*x.shape) + 0.2 for x in features]
    down = normal(num_tasks, rank, dim) / max(dim, 1) ** 0.5
    up = 0.1 * normal(num_tasks, dim, rank) if started else torch.zeros(num_tasks, dim, rank, dtype=torch.float64)
    moments = [torch.zeros(2, *x.shape, dtype=torch.float64) for x in (down, up)]
    for x in moments if started else []:
        x[0], x[1] = 1e-3 * normal(*x[0].shape), 1e-6 * normal(*x[0].shape).square()
    indices = torch.stack([torch.randint(0, len(x), (steps, batch), generator=g) for x in features], dim=1)
    stored = [[x.to(dtype) for x in group] for group in (features, targets)]
    return Problem(*stored, down.to(compute), up.to(compute), *(x.to(compute) for x in moments), indices)


def trained(train: Callable[..., Tensor], given: Problem, **options: Any) -> list[Tensor]:
    """The losses, and what has moved."""
    copy = given.clone()
    return [train(*copy, **options), *copy.moved]


def assert_close_to_reference(actual: list[Tensor], given: Problem, **options: Any) -> None:
    """Twice the error of the reference in the same dtype, both taken from float64, and a hundred roundings.

    Adam divides a gradient by its own size: where that is next to nothing, rounding decides the direction of a step.
    So errors are compared by their root mean square, and those of the reference are no bound by themselves.
    """
    exact = trained(reference.surgery_train, given.double(), **options)
    expected = trained(reference.surgery_train, given, **options)
    rounding = 100 * torch.finfo(given.down.dtype).eps
    for name, x, y, z in zip(["losses", *Problem._fields[2:6]], actual, expected, exact, strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape), name
        error, allowed, size = (float(a.norm()) for a in (x.double() - z, y.double() - z, z))
        assert error <= 2 * allowed + rounding * size, f"{name}: {error:.2e} of {size:.2e}, the reference {allowed:.2e}"
