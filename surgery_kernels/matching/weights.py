"""Matching by weights: Git Re-Basin's coordinate ascent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..ops import arguments
from .assignment import Matching, Products, best, check_alike, identity, state_of, value
from .symmetries import Family, Group, Member, StateDict, Symmetries

LEAST_GAIN = 1e-12  # of a sum of products, as a share of it: what rounding makes


def match_weights(
    symmetries: Symmetries,
    first: nn.Module | StateDict,
    second: nn.Module | StateDict,
    *,
    seed: int = 0,
    max_sweeps: int = 100,
) -> Matching:
    """Permutations of the second model's units that bring its parameters near the first's: ``max sum <W_1, P(W_2)>``.

    First every group is matched by those of its tensors whose other units are matched already, from the inputs and
    outputs inwards, those first of which most is known. A model that was only permuted is found by that. Then group
    after group, in random order, is matched with all others held, until nothing gains any more.

    Args:
        symmetries: Of the first model, and of the second.
        first, second: Modules, or state dicts. Parameters of heads, buffers and tensors that no group is in are not
            compared.
        seed: Of the order.
        max_sweeps: Through all groups; 0 or greater.

    Returns:
        The matching; float64 products. The similarity of a pair is the sum of the products of its weights.

    Raises:
        ValueError, TypeError: the models differ in a tensor's shape, dtype or device, an argument is outside its range,
            or a weight is not finite.
        ImportError: scipy is not installed.

    Source: Git Re-Basin (arXiv 2209.04836), algorithm 1. The paper starts from the order that the models have.
    """
    arguments.check_count("max_sweeps", max_sweeps, least=0)
    arguments.check_count("seed", seed, least=0)
    a, b = state_of(first), state_of(second)
    check_alike(symmetries, a, b)
    ascent = _Ascent(symmetries, a, b)
    ascent.start()
    generator = torch.Generator().manual_seed(seed)
    families = symmetries.families
    for _ in range(max_sweeps):
        order = torch.randperm(len(families), generator=generator).tolist()
        changed = [ascent.step(families[i]) for i in order]
        if not any(changed):
            break
    return ascent.matching()


class _Ascent:
    def __init__(self, symmetries: Symmetries, first: StateDict, second: StateDict) -> None:
        self._families = symmetries.families
        self._a, self._b = first, second
        self._places = {name: symmetries.of_tensor(name) for name in first}
        self._family_of = {group.name: family for family in self._families for group in family.groups}
        self._compared = {
            family.outer.name: [
                (group, member)
                for group, member in family.members()
                if member.is_parameter and not symmetries.in_heads(member.tensor)
            ]
            for family in self._families
        }
        devices = {tensor.device for tensor in first.values()}
        device = devices.pop() if len(devices) == 1 else torch.device("cpu")
        self._orders = {name: order.to(device) for name, order in identity(symmetries).items()}

    def start(self) -> None:
        """From what is known inwards."""
        waiting = {family.outer.name: family for family in self._families}
        while waiting:
            evidence = {
                name: [(g, m) for g, m in self._compared[name] if not self._others(m, family) & waiting.keys()]
                for name, family in waiting.items()
            }
            name = max(waiting, key=lambda name: self._numbers(waiting[name], evidence[name]))
            family = waiting.pop(name)
            similarity = self._cross(family, evidence[name] or self._compared[name])
            self._orders |= best(family, similarity)

    def step(self, family: Family) -> bool:
        """Whether the units of the family are in another order now, for the better."""
        similarity = self._cross(family, self._compared[family.outer.name])
        new = best(family, similarity)
        if not new:
            return False
        held = {name: self._orders[name] for name in new}
        if not _gains(*(value(family, similarity, {**self._orders, **orders}) for orders in (held, new))):
            return False
        meets_itself = any(
            family.outer.name in self._others(member, family) for _, member in self._compared[family.outer.name]
        )
        before = self._agreement(family) if meets_itself else 0.0
        self._orders |= new
        if meets_itself and not _gains(before, self._agreement(family)):  # the sums were of a step that both sides take
            self._orders |= held
            return False
        return True

    def matching(self) -> Matching:
        result = Matching()
        for family in self._families:
            compared = self._compared[family.outer.name]
            products = {group.name: products for group, products in self._products(family, compared)}
            result.add(family, products, {group.name: self._orders[group.name] for group in family.groups}, "inner")
        return result

    def _others(self, member: Member, family: Family) -> set[str]:
        """Families with units elsewhere in the member's tensor."""
        places = self._places[member.tensor]
        return {
            self._family_of[group.name].outer.name
            for group, place in places
            if group not in family.groups or not _same_place(place, member)
        }

    def _numbers(self, family: Family, members: Sequence[tuple[Group, Member]]) -> int:
        return sum(self._a[member.tensor].numel() for _, member in members) // family.outer.size

    def _cross(self, family: Family, members: Sequence[tuple[Group, Member]]) -> dict[str, Tensor]:
        """What unit i of the first and unit j of the second have in common, by the names of groups."""
        found: dict[str, Tensor] = {}
        for group, member in members:
            x, y = self._units(family, group, member)
            found[group.name] = found[group.name].addmm_(x, y.T) if group.name in found else x @ y.T
        return found

    def _products(self, family: Family, members: Sequence[tuple[Group, Member]]) -> Iterator[tuple[Group, Products]]:
        for group in family.groups:
            mine = [place for place in members if place[0] == group]
            if not mine:
                continue
            units = [self._units(family, *place) for place in mine]
            squares, others = (
                torch.stack([part.square().sum(1) for part in parts]).sum(0) for parts in zip(*units, strict=True)
            )
            yield group, Products(self._cross(family, mine)[group.name], squares, others)

    def _units(self, family: Family, group: Group, member: Member) -> tuple[Tensor, Tensor]:
        """[units, rest] of both, float64; what else is in the second's tensor in the order of the first."""
        b = self._b[member.tensor]
        for other, place in self._places[member.tensor]:
            if other not in family.groups or not _same_place(place, member):
                b = other.reordered(place, b, self._orders[other.name].to(b.device))
        x, y = (group.units_first(member, tensor).double() for tensor in (self._a[member.tensor], b))
        return x, y

    def _agreement(self, family: Family) -> float:
        """The sum of products that the family has a part in."""
        total = 0.0
        for name in dict.fromkeys(member.tensor for _, member in self._compared[family.outer.name]):
            b = self._b[name]
            for other, place in self._places[name]:
                b = other.reordered(place, b, self._orders[other.name].to(b.device))
            total += float((self._a[name].double() * b.double()).sum())
        return total


def _same_place(a: Member, b: Member) -> bool:
    return (a.tensor, a.dim) == (b.tensor, b.dim)


def _gains(before: float, after: float) -> bool:
    return after - before > LEAST_GAIN * max(1.0, abs(before))
