"""Which unit of one model goes with which of another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .symmetries import Family, Group, StateDict, Symmetries

SIMILARITIES = ("distance", "inner")


@dataclass
class Products:
    """What the units x of one model and the units y of another have in common."""

    cross: Tensor  # <x_i, y_j>, float64 [units, units]
    squares: Tensor  # |x_i|^2, float64 [units]
    other_squares: Tensor  # |y_j|^2

    def similarity(self, kind: str) -> Tensor:
        if kind == "inner":
            return self.cross
        return -(self.squares[:, None] + self.other_squares - 2 * self.cross).clamp(min=0).sqrt()


@dataclass(frozen=True)
class Matching:
    """Pairs of units, by the names of groups: unit i of the first model and unit permutations[name][i] of the second.

    Of a group within another [repeats, size]: in each pair of units of that, pairs of their units.
    """

    permutations: dict[str, Tensor] = field(default_factory=dict)  # int64; as `Symmetries.permuted` takes them
    similarity: dict[str, Tensor] = field(default_factory=dict)  # float64: what was made as large as it could
    distance: dict[str, Tensor] = field(default_factory=dict)  # float64: |x - y|^2 / (|x|^2 + |y|^2), in [0, 2]

    def add(self, family: Family, products: Mapping[str, Products], orders: Mapping[str, Tensor], kind: str) -> None:
        """The pairs of a family, which `orders` has made."""
        self.permutations.update({name: order.cpu() for name, order in orders.items()})
        # similarity, products and squares of the outer units
        total = torch.zeros(3, family.outer.size, dtype=torch.float64)
        for group in reversed(family.groups):
            of_group = torch.zeros(3, *group.shape, dtype=torch.float64)
            if group.name in products:
                known, order = products[group.name], joint(family, group, orders)
                found = (known.similarity(kind), known.cross)
                pairs = [table.gather(1, order[:, None])[:, 0] for table in found]
                squares = known.squares + known.other_squares[order]
                of_group = torch.stack([*pairs, squares]).cpu().view_as(of_group)
            if group.within:
                total += of_group.sum(-1)
            else:
                of_group += total
            similarity, cross, squares = of_group
            self.similarity[group.name] = similarity
            self.distance[group.name] = ((squares - 2 * cross) / squares.where(squares > 0, 1.0)).clamp(0, 2)


def assigned(similarity: Tensor) -> Tensor:
    """The permutation p with the largest sum of similarity[i, p[i]].  # [n, n] to int64 [n]

    Raises:
        ImportError: scipy is not installed.
        ValueError: NaN or infinity.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError(
            f"scipy must be installed for matching, got: {error}; run `pip install 'surgery-kernels[matching]'`"
        ) from error
    if not similarity.isfinite().all():
        raise ValueError("models must be finite where their units are matched, got NaN or infinity")
    _, columns = linear_sum_assignment(similarity.double().cpu().numpy(), maximize=True)
    return torch.from_numpy(columns).to(similarity.device, torch.int64)


def best(family: Family, similarity: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The permutations of all groups of a family that together have the largest sum of similarities.

    For every pair of outer units those within them are assigned first; what that reaches is how alike the pair is.
    """
    outer = family.outer
    total = similarity[outer.name].clone() if outer.name in similarity else None
    orders: dict[str, Tensor] = {}
    for group in family.inner:
        if group.name not in similarity:
            continue
        blocks = similarity[group.name].view(outer.size, group.size, outer.size, group.size).transpose(1, 2)
        found = torch.stack([assigned(block) for block in blocks.flatten(0, 1)]).view(*blocks.shape[:3])
        orders[group.name] = found
        reached = blocks.gather(3, found[..., None]).sum((2, 3))
        total = reached if total is None else total + reached
    if total is None:
        return {}
    order = assigned(total)
    each = torch.arange(outer.size, device=order.device)
    return {outer.name: order, **{name: found[each, order] for name, found in orders.items()}}


def value(family: Family, similarity: Mapping[str, Tensor], orders: Mapping[str, Tensor]) -> float:
    return sum(
        float(similarity[group.name].gather(1, joint(family, group, orders)[:, None]).sum())
        for group in family.groups
        if group.name in similarity
    )


def joint(family: Family, group: Group, orders: Mapping[str, Tensor]) -> Tensor:
    """The order of a group's units in all units of the group around it.  # [repeats * size]"""
    order = orders[group.name]
    return (orders[family.outer.name][:, None] * group.size + order).flatten() if group.within else order


def identity(symmetries: Symmetries) -> dict[str, Tensor]:
    return {group.name: torch.arange(group.size).expand(group.shape) for group in symmetries.groups}


def state_of(model: nn.Module | StateDict) -> dict[str, Tensor]:
    state = model.state_dict() if isinstance(model, nn.Module) else model
    return {name: tensor.detach() for name, tensor in state.items()}


def check_alike(symmetries: Symmetries, first: StateDict, second: StateDict) -> None:
    """What is no head's has the same names, shapes and dtypes in both, and what heads read is as wide."""
    shared = [[name for name in state if not symmetries.in_heads(name)] for state in (first, second)]
    for name in dict.fromkeys([*shared[0], *shared[1]]):
        if name not in first or name not in second:
            where = "second" if name in first else "first"
            raise ValueError(f"{where} must have the tensors of the other model outside of heads, got no {name!r}")
        a, b = first[name], second[name]
        if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
            raise ValueError(
                f"second must be like first in {name!r}, {a.dtype} {tuple(a.shape)} on {a.device}, "
                f"got {b.dtype} {tuple(b.shape)} on {b.device}"
            )
    for group in symmetries.groups:
        for member in group.members:
            if symmetries.in_heads(member.tensor):
                size = member.before * group.size * member.after
                for which, state in (("first", first), ("second", second)):
                    found = state[member.tensor].shape if member.tensor in state else ()
                    if found[member.dim : member.dim + 1] != (size,):
                        raise ValueError(
                            f"{which} must have {size} entries in dimension {member.dim} of {member.tensor!r}, "
                            f"got {tuple(found)}"
                        )
