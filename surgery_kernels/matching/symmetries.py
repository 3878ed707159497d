"""Which units of a model may change places, all its tensors with them, without a change of what it computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..modules.calling import call_with
from ..modules.device import device_of
from ..modules.frozen import frozen
from ..modules.inputs import Inputs, batch_size, run, select, to_device, without_labels
from .trace import Axes, read_axes

StateDict = Mapping[str, Tensor]
SAMPLES = 2  # that a model is traced with
NEAR = 1e-3  # of the largest output: as far as an order of additions may move one
NEAR_IN_16_BITS = 0.1


@dataclass(frozen=True)
class Member:
    """A dimension of a tensor, seen as [before, units, after]."""

    tensor: str
    dim: int
    before: int
    after: int
    is_read: bool  # sums run over it: it is the input of a layer
    is_parameter: bool = True  # not a buffer


@dataclass(frozen=True)
class Group:
    """Units that exist in several tensors: channels, hidden units, heads; or features of each unit of another group."""

    name: str  # the first of its tensors, and the dimension of that
    size: int
    members: tuple[Member, ...]
    can_grow: (
        bool  # whether a model may have more of them: nothing normalises over them or has their number in its code
    )
    within: str = ""  # the group, if any, each of whose units has such units of its own, in an order of its own
    repeats: int = 1  # how many units that group has

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a permutation of the group."""
        return (self.repeats, self.size) if self.within else (self.size,)

    def units_first(self, member: Member, tensor: Tensor) -> Tensor:
        """[repeats * size, everything else]"""
        dim, before = member.dim, member.before // self.repeats
        apart = tensor.unflatten(dim, (before, self.repeats * self.size, member.after))
        return apart.movedim(dim + 1, 0).flatten(1)

    def reordered(self, member: Member, tensor: Tensor, order: Tensor) -> Tensor:
        """Unit i, of each unit of the other group, is what its unit order[i] was."""
        if self.within:  # as units of both groups at once
            order = (order + self.size * torch.arange(self.repeats, device=order.device)[:, None]).flatten()
        dim, before = member.dim, member.before // self.repeats
        apart = tensor.unflatten(dim, (before, len(order), member.after))
        return apart.index_select(dim + 1, order).flatten(dim, dim + 2)


@dataclass(frozen=True)
class Family:
    """A group, and those whose units each of its units has; they change places together."""

    outer: Group
    inner: tuple[Group, ...]

    @property
    def groups(self) -> tuple[Group, ...]:
        return (self.outer, *self.inner)

    def members(self) -> list[tuple[Group, Member]]:
        """Every dimension once, by the group that knows most about it."""
        within = {(member.tensor, member.dim) for group in self.inner for member in group.members}
        own = [(self.outer, m) for m in self.outer.members if (m.tensor, m.dim) not in within]
        return [*own, *((group, member) for group in self.inner for member in group.members)]


@dataclass(frozen=True)
class Symmetries:
    """All groups of a model, in the order in which a pass reaches their tensors; outer ones before those within."""

    groups: tuple[Group, ...]
    owner: Mapping[str, str]  # every name of a tensor to the first of the same tensor
    heads: tuple[str, ...] = ()  # modules that each model keeps for itself

    @property
    def families(self) -> list[Family]:
        return [
            Family(outer, tuple(group for group in self.groups if group.within == outer.name))
            for outer in self.groups
            if not outer.within
        ]

    def of_tensor(self, name: str) -> list[tuple[Group, Member]]:
        return self._by_tensor().get(self.owner.get(name, name), [])

    @property
    def owner_outside_heads(self) -> dict[str, str]:
        return {name: owner for name, owner in self.owner.items() if not self.in_heads(name)}

    def in_heads(self, name: str) -> bool:
        return any(name == head or name.startswith(f"{head}.") for head in self.heads)

    def permuted(self, state: StateDict, permutations: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same model with its units in another order.

        Args:
            state: Of a model with these symmetries.
            permutations: int64 [size] by the names of groups: unit i becomes what unit permutations[name][i] was. For
                a group within another [repeats, size]: a row for each unit of that, as it is after its own permutation.
                A group that is not named keeps its order.

        Returns:
            New tensors where anything moves, the given ones elsewhere, by their names in `state`.

        Raises:
            ValueError: a name is no group's, or a permutation is not one of its size.
        """
        named = {group.name: group for group in self.groups}
        for name, order in permutations.items():
            if name not in named:
                raise ValueError(f"permutations must have names of groups, got {name!r}")
            size, shape = named[name].size, named[name].shape
            in_order = torch.arange(size, device=order.device).expand(shape)
            if order.dtype != torch.int64 or order.shape != shape or not torch.equal(order.sort().values, in_order):
                raise ValueError(
                    f"permutations[{name!r}] must be int64 {list(shape)} with the numbers from 0 to {size - 1} in any "
                    f"order, got {order.dtype} {list(order.shape)}"
                )
        by_tensor = self._by_tensor()
        moved = {}
        for name, tensor in state.items():
            for group, member in by_tensor.get(self.owner.get(name, name), []):
                if group.name in permutations:
                    tensor = group.reordered(member, tensor, permutations[group.name].to(tensor.device))
            moved[name] = tensor
        return moved

    def _by_tensor(self) -> dict[str, list[tuple[Group, Member]]]:
        found: dict[str, list[tuple[Group, Member]]] = {}
        for group in self.groups:
            for member in group.members:
                found.setdefault(member.tensor, []).append((group, member))
        return found


def find_symmetries(model: nn.Module, inputs: Inputs, *, heads: Sequence[str] = ()) -> Symmetries:
    """Groups of units that may be permuted, found from a graph of one pass, and tried out.

    torch.export traces the model in evaluation mode. From op to op it is followed which axes of which tensors are the
    same: all that a residual stream runs through; hidden units; channels, with their batch norms; attention heads, and
    within each the features of queries and keys, and of values. What an op without a rule sees keeps its order, and so
    do inputs and outputs. At last all units are put in a random order, which must leave the outputs as they are.

    Args:
        model: Any module that torch.export can trace.
        inputs: A batch in any form that `fit` takes batches in; two samples of it are used.
        heads: Names of modules that are not to be matched: other models may have others there. Units that exist inside
            of them only belong to no group.

    Returns:
        The groups. Units inside nn.MultiheadAttention are found as well as those of a module's own reshapes.

    Raises:
        ValueError: the model cannot be traced, has nothing that can be permuted, or computes something else with its
            units in another order; a head is not one of its modules.

    Source: Git Re-Basin (arXiv 2209.04836), section 3, whose groups are written by hand for every architecture.
    """
    for head in heads:
        if head not in dict(model.named_modules()) or not head:
            raise ValueError(f"heads must be names of modules of the model, got {head!r}")
    inputs = without_labels(inputs, "inputs")
    few = to_device(select(inputs, torch.arange(min(SAMPLES, batch_size(inputs)))), device_of(model))
    with frozen(model), torch.no_grad():
        axes = read_axes(model, few)
        symmetries = _grouped(model, axes, tuple(heads))
        _try_out(model, few, symmetries)
    return symmetries


def _grouped(model: nn.Module, axes: Axes, heads: tuple[str, ...]) -> Symmetries:
    first: dict[int, str] = {}
    owner = {name: first.setdefault(id(x), name) for name, x in model.state_dict(keep_vars=True).items()}
    symmetries = Symmetries((), owner, heads)
    members: dict[int, list[Member]] = {}
    names: dict[int, str] = {}
    blame: dict[str, None] = {}
    factors = axes.factors
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, dims in axes.of.items():
        for dim, axis in enumerate(dims):
            atoms = factors.atoms(axis)
            before = 1
            for place, atom in enumerate(atoms):
                size = factors.size((atom,))
                if by := factors.pinned_by(atom):
                    blame[by] = None
                else:
                    after = factors.size(atoms[place + 1 :])
                    member = Member(name, dim, before, after, (name, dim) in axes.read, name in parameters)
                    members.setdefault(atom, []).append(member)
                    names.setdefault(atom, f"{name}[{dim}]" + (f"[{place}]" if len(atoms) > 1 else ""))
                before *= size
    groups = tuple(
        Group(names[atom], factors.size((atom,)), tuple(found), not factors.is_fixed(atom))
        for atom, found in members.items()
        if not all(symmetries.in_heads(member.tensor) for member in found)
    )
    if not groups:
        by = ", ".join(blame) or "no parameters"
        raise ValueError(f"model must have units that can change places, got none: all are in an order because of {by}")
    return Symmetries(tuple(_nested(groups)), owner, heads)


def _nested(groups: Sequence[Group]) -> Iterator[Group]:
    """With those told that lie within another wherever they are: each head has features in an order of its own."""
    for group in groups:
        around = [
            [outer for outer in groups if outer.name != group.name and _is_around(outer, member)]
            for member in group.members
        ]
        outer = around[0][0] if around[0] else None
        if outer is not None and all(outer in found for found in around):
            group = replace(group, within=outer.name, repeats=outer.size)
        yield group


def _is_around(outer: Group, member: Member) -> bool:
    """Whether the units of the member's group lie directly within those of the other."""
    return any(
        (m.tensor, m.dim, m.before * outer.size) == (member.tensor, member.dim, member.before) for m in outer.members
    )


def _try_out(model: nn.Module, inputs: Inputs, symmetries: Symmetries) -> None:
    generator = torch.Generator().manual_seed(0)
    orders = {group.name: torch.rand(group.shape, generator=generator).argsort() for group in symmetries.groups}
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    expected = outputs_of(run(model, inputs))
    if not all(x.isfinite().all() for x in expected):
        raise ValueError("model must give finite outputs, got NaN or infinity")

    def differs(chosen: Mapping[str, Tensor]) -> bool:
        found = outputs_of(call_with(model, symmetries.permuted(state, chosen), inputs))
        return any(_far(a, b) for a, b in zip(expected, found, strict=True))

    if differs(orders):
        wrong = [name for name, order in orders.items() if differs({name: order})] or list(orders)
        raise ValueError(
            f"model must compute the same with its units in another order, got something else for those of {wrong[0]!r}"
        )


def outputs_of(output: object) -> list[Tensor]:
    return [x for x in tree_leaves(output) if isinstance(x, Tensor)]


def _far(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not a.is_floating_point() or not a.numel():
        return a.shape != b.shape
    near = NEAR_IN_16_BITS if a.dtype.itemsize == 2 else NEAR
    return not bool((a - b).abs().max() <= near * a.abs().max())
