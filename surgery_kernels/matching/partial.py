"""Which pairs of units become one, and which units stay apart."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import arguments
from .assignment import Matching, joint
from .symmetries import Group, StateDict, Symmetries

Ratio = float | Mapping[str, float]


@dataclass(frozen=True)
class Units:
    """Entries of an axis of the merged model, and which entries of the two models' axes they come from."""

    first: Tensor  # int64 [width]; -1: from none
    second: Tensor  # int64 [width]

    @property
    def of_first(self) -> Tensor:
        return self.first >= 0

    @property
    def of_second(self) -> Tensor:
        return self.second >= 0

    @property
    def shares(self) -> tuple[Tensor, Tensor]:
        """How much of an entry is the first model's, and the second's: a half of each where it is both's.  # float64"""
        both = self.of_first & self.of_second
        a, b = (of.double() / (1 + both.double()) for of in (self.of_first, self.of_second))
        return a, b

    def narrow(self, rows: slice) -> Units:
        """A part of an axis that takes its entries from this part of either model's."""
        a, b = (torch.where(places >= 0, places - rows.start, -1)[rows] for places in (self.first, self.second))
        return Units(a, b)

    def of_one(self, which: int) -> Units:
        """Where the other model has no part in any entry."""
        none = torch.full_like(self.first, -1)
        return Units(self.first, none) if which == 0 else Units(none, self.second)


@dataclass(frozen=True)
class Plan:
    """How the units of two models make those of one."""

    symmetries: Symmetries
    units: dict[str, Units]  # by the names of groups; of a group within another, of all its repeats one after the other
    widths: dict[str, int]

    def axis(self, name: str, dim: int, size: int) -> Units:
        """Of a dimension with `size` entries in either model."""
        units = Units(torch.arange(size), torch.arange(size))
        places = [(group, member) for group, member in self.symmetries.of_tensor(name) if member.dim == dim]
        done: set[str] = set()  # around what is done already
        for group, member in sorted(places, key=lambda place: -place[1].before):
            if group.name in done:
                continue
            if group.within:
                done.add(group.within)
            inside = self.units[group.name]
            before, count = member.before // group.repeats, group.repeats * group.size
            units = Units(
                _taken(units.first, before, count, inside.first), _taken(units.second, before, count, inside.second)
            )
        return units

    def num_parameters(self, parameters: StateDict) -> int:
        """Of the merged model, by those of the first."""
        return sum(
            math.prod(
                len(self.axis(name, dim, size).first)
                if any(member.dim == dim for _, member in self.symmetries.of_tensor(name))
                else size
                for dim, size in enumerate(tensor.shape)
            )
            for name, tensor in parameters.items()
        )


def plan_of(
    symmetries: Symmetries,
    matching: Matching,
    *,
    ratio: Ratio = 0.0,
    budget: float | None = None,
    parameters: StateDict | None = None,
) -> Plan:
    """The pairs that are least alike stay apart.

    Args:
        ratio: In [0, 1]; a share of pairs, as of `pleas`.
        budget: 1 or greater; a number of parameters, as of `pleas`, which are `parameters` in one model.
    """
    growing = {group.name: group for group in symmetries.groups if group.can_grow}
    if budget is None:
        return _planned(symmetries, matching, _by_ratio(growing, matching, ratio))
    if ratio != 0.0:
        raise ValueError(f"ratio must be 0 where a budget is given, got {ratio}")
    budget = arguments.number("budget", budget)
    if not 1 <= budget < math.inf:
        raise ValueError(f"budget must be finite and 1 or greater, got {budget}")
    assert parameters is not None
    return _by_budget(symmetries, matching, growing, budget, parameters)


def _by_ratio(growing: Mapping[str, Group], matching: Matching, ratio: Ratio) -> dict[str, Tensor]:
    """Whether each pair of a group is merged."""
    ratios = dict(ratio) if isinstance(ratio, Mapping) else dict.fromkeys(growing, ratio)
    merged = {}
    for name, value in ratios.items():
        if name not in growing:
            raise ValueError(f"ratio must have names of groups that can grow, got {name!r}")
        value = arguments.number("ratio", value, "a number, or one for each group")
        if not 0 <= value <= 1:
            raise ValueError(f"ratio must be in [0, 1], got {value}")
        if value in (0, 1):
            merged[name] = torch.full((growing[name].size,), value == 0)
            continue
        similarity = _known(matching.similarity, name)
        merged[name] = similarity >= similarity.quantile(value)
    if not growing and not isinstance(ratio, Mapping) and ratio != 0:
        raise ValueError(f"ratio must be 0 for a model none of whose groups can grow, got {ratio}")
    return merged


def _by_budget(
    symmetries: Symmetries,
    matching: Matching,
    growing: Mapping[str, Group],
    budget: float,
    parameters: StateDict,
) -> Plan:
    """One list of all pairs, the most unlike first: as many stay apart as there is room for."""
    names = [name for name, group in growing.items() for _ in range(group.size)]
    pairs = [pair for group in growing.values() for pair in range(group.size)]
    unlike = torch.cat([_known(matching.distance, name) for name in growing]) if growing else torch.empty(0)
    order = unlike.argsort(descending=True, stable=True).tolist()
    room = budget * sum(tensor.numel() for tensor in parameters.values())

    def plan(apart: int) -> Plan:
        merged = {name: torch.ones(group.size, dtype=torch.bool) for name, group in growing.items()}
        for place in order[:apart]:
            merged[names[place]][pairs[place]] = False
        return _planned(symmetries, matching, merged)

    low, high = 0, len(order)  # the largest number that fits lies between
    while low < high:
        middle = (low + high + 1) // 2
        if plan(middle).num_parameters(parameters) <= room:
            low = middle
        else:
            high = middle - 1
    return plan(low)


def _known(of_pairs: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in of_pairs:
        raise ValueError(f"match must say how alike pairs are where some stay apart, got nothing of {name!r}")
    return of_pairs[name]


def _planned(symmetries: Symmetries, matching: Matching, merged: Mapping[str, Tensor]) -> Plan:
    units: dict[str, Units] = {}
    for family in symmetries.families:
        for group in family.groups:
            order = joint(family, group, matching.permutations)
            first = torch.arange(len(order))
            both = merged.get(group.name, torch.ones(len(order), dtype=torch.bool))
            none = torch.full((int((~both).sum()),), -1)
            units[group.name] = Units(
                torch.cat([first[both], first[~both], none]), torch.cat([order[both], none, order[~both]])
            )
    widths = {group.name: len(units[group.name].first) // group.repeats for group in symmetries.groups}
    return Plan(symmetries, units, widths)


def _taken(entries: Tensor, before: int, count: int, take: Tensor) -> Tensor:
    """Entries [before, count, after] of an axis, those of the middle taken; -1 where either is from none."""
    apart = entries.view(before, count, -1)
    return torch.where(take[:, None] >= 0, apart[:, take.clamp(min=0)], -1).flatten()
