"""Matching by activations: units that answer alike on the same inputs go together."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from ..modules.layers import flat
from ..modules.pools import Batches, pool_of
from ..modules.visits import Visit
from ..ops import arguments, gram_cross
from .assignment import SIMILARITIES, Matching, Products, best, check_alike, state_of
from .flows import Flows, Linear, Visits, linear_layers
from .symmetries import Family, Group, Member, Symmetries


def match_activations(
    symmetries: Symmetries,
    first: nn.Module,
    second: nn.Module,
    batches: Batches,
    *,
    similarity: str = "distance",
    batch_size: int = 64,
    num_workers: int = 0,
) -> Matching:
    """Permutations of the second model's units that make them answer as the first's do, on the same inputs.

    A unit's activations are what the layers that read it get, or where no layer reads it (features of queries and keys)
    what the layers that make it give: all samples, tokens and positions. Both models are run once, or twice where some
    units lie within others in one order for all of these.

    Args:
        symmetries: Of the first model, and of the second.
        first, second: Modules; run in evaluation mode.
        batches: Unlabeled inputs in any form that `fit` takes.
        similarity: "distance": minus the Euclidean distance of two units' activations; "inner": their dot product.
        batch_size: Samples in one pass.
        num_workers: Processes that read a dataset.

    Returns:
        The matching; sums in float64 of products in float32 (float64 for float64 activations).

    Raises:
        ValueError, TypeError: the models differ in a tensor's shape, dtype or device, an argument is outside its range,
            an activation is not finite, or a group's units go through no linear layer or convolution.
        ImportError: scipy is not installed.

    Source: PLeaS (arXiv 2407.02447), section 3.1; Git Re-Basin (arXiv 2209.04836), section 3.1, for "inner". The
        paper's code adds up the distances of batches: with one batch the same.
    """
    arguments.check_one_of("similarity", similarity, SIMILARITIES)
    arguments.check_count("batch_size", batch_size)
    check_alike(symmetries, state_of(first), state_of(second))
    pool = pool_of("batches", batches, num_workers)
    layers = linear_layers(first)
    result = Matching()
    for families in _rounds(symmetries):
        sums = {group.name: sum_ for family in families for group, sum_ in _sums(family, layers)}
        used = {name: layers[name] for of_group in sums.values() for name in of_group.places}
        with Flows((first, second), used) as flows:
            for visits in flows(pool, batch_size):
                for of_group in sums.values():
                    of_group.add(visits, used, (first, second))
        for family in families:
            products = {group.name: sums[group.name].products() for group in family.groups if group.name in sums}
            orders = best(family, {name: part.similarity(similarity) for name, part in products.items()})
            result.add(family, products, orders, similarity)
        found = {group.name: result.permutations[group.name] for family in families for group in family.groups}
        second = copy.deepcopy(second)  # in the order found so far
        second.load_state_dict(symmetries.permuted(state_of(second), found))
    return result


def _rounds(symmetries: Symmetries) -> list[list[Family]]:
    """Those within units of others that have no orders of their own there are seen only when these are in order."""
    families = symmetries.families
    dims = {(m.tensor, m.dim, m.before): family for family in families for g in family.groups for m in g.members}

    def is_inside(family: Family) -> bool:
        return any(
            (member.tensor, member.dim) == (tensor, dim) and before < member.before and other is not family
            for _, member in family.members()
            for (tensor, dim, before), other in dims.items()
        )

    inside = [family for family in families if is_inside(family)]
    return [chosen for chosen in ([f for f in families if f not in inside], inside) if chosen]


def _sums(family: Family, layers: dict[str, Linear]) -> Iterator[tuple[Group, _Sums]]:
    """Of the groups within it, or of the family's only group.

    Raises:
        ValueError: no layer sees the units.
    """
    for group in family.inner or (family.outer,):
        places, is_read = _seen_at(group, layers)
        yield group, _Sums(group, places, is_read)


def _seen_at(group: Group, layers: dict[str, Linear]) -> tuple[dict[str, Member], bool]:
    """The layers that read the units, or else those that make them; and whether it is the former."""
    for is_read in (True, False):
        members = {(m.tensor, m.dim): m for m in group.members}
        dims = {name: (linear.weight, linear.in_dim if is_read else linear.out_dim) for name, linear in layers.items()}
        places = {name: members[at] for name, at in dims.items() if at in members}
        if places:
            return places, is_read
    raise ValueError(
        f"model must have a linear layer or a convolution at the units of {group.name!r} for matching by activations, "
        "got none"
    )


@dataclass
class _Sums:
    """Over everything that units of a group, within each unit around them, were seen to be."""

    group: Group
    places: dict[str, Member]
    is_read: bool
    _totals: list[Tensor] = field(default_factory=list)

    def add(self, visits: list[Visits], layers: dict[str, Linear], models: tuple[nn.Module, nn.Module]) -> None:
        seen: set[tuple[int, int]] = set()
        for pair in visits:
            name = pair[0].name
            at = (pair[0].inputs.data_ptr(), pair[1].inputs.data_ptr())
            if name not in self.places or (self.is_read and at in seen):
                continue  # where several layers read the same, once
            seen.add(at)
            x, y = (self._units(layers[name], visit, model) for visit, model in zip(pair, models, strict=True))
            products = gram_cross(x[None], y[None])
            assert products.cross is not None
            parts = [products.cross[0], products.gram[0].diagonal(), y.square().sum(0)]
            parts = [part.double() for part in parts]
            self._totals = [a + b for a, b in zip(self._totals, parts, strict=True)] if self._totals else parts

    def products(self) -> Products:
        if not self._totals:
            raise ValueError(f"model must call the layers at the units of {self.group.name!r}, got no call")
        return Products(*self._totals)

    def _units(self, linear: Linear, visit: Visit, model: nn.Module) -> Tensor:
        """[rows, units]"""
        features = linear.features(visit.inputs) if self.is_read else linear.answers(visit, model)
        after, units = self.places[linear.name].after, self.group.repeats * self.group.size
        apart = features.unflatten(-1, (-1, units, after))
        return flat(apart.movedim(-2, -1))
