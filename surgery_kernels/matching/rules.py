"""What ops do to axes: which of them meet, which pass, and whose entries an op knows by their places.

An op that no rule knows pins every axis of what it takes and gives: units that it sees keep their order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .factors import Axis, Factors

Place = tuple[str, int]  # a dimension of a parameter or buffer


@dataclass(frozen=True)
class Traced:
    """A tensor of the graph."""

    axes: tuple[Axis, ...]
    places: tuple[Place | None, ...] = ()  # which dimension of a parameter an axis is, if it is one


@dataclass
class Call:
    """One op, what it is given by name, and the shapes of what it makes."""

    op: str
    given: dict[str, Any]
    shapes: list[tuple[int, ...]]
    factors: Factors
    read: set[Place] = field(default_factory=set)  # dimensions of parameters that sums run over

    @property
    def shape(self) -> tuple[int, ...]:
        return self.shapes[0]

    @property
    def tensors(self) -> list[Traced]:
        return _tensors_in(list(self.given.values()))

    def tensor(self, *names: str) -> Traced:
        return next(self.given[name] for name in names if isinstance(self.given.get(name), Traced))

    def unify(self, a: Axis, b: Axis) -> None:
        self.factors.unify(a, b, self.op)

    def contract(self, a: Traced, i: int, b: Traced, j: int) -> None:
        """A sum runs over both axes at once."""
        self.unify(a.axes[i], b.axes[j])
        for tensor, axis in ((a, i), (b, j)):
            place = tensor.places[axis] if tensor.places else None
            if place is not None:
                self.read.add(place)

    def along(self, argument: str, axis: Axis) -> None:
        """An argument of one dimension, if it is given, has the axis."""
        if isinstance(given := self.given.get(argument), Traced):
            self.unify(given.axes[-1], axis)

    def pin(self, axis: Axis) -> None:
        self.factors.pin(axis, self.op)

    def placed(self, size: int) -> Axis:
        """A new axis whose entries the op has put in their order."""
        return self.factors.new(size, self.op)

    def broadcast(self, tensors: Sequence[tuple[Axis, ...]]) -> tuple[Axis, ...]:
        """The axes of what an op makes entry by entry."""
        axes: list[Axis] = []
        for i in range(max(map(len, tensors), default=0)):
            meeting = [tensor[-1 - i] for tensor in tensors if i < len(tensor) and tensor[-1 - i]]
            for other in meeting[1:]:
                self.unify(meeting[0], other)
            axes.append(meeting[0] if meeting else ())
        return tuple(reversed(axes))


Rule = Callable[[Call], Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def known(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return known


def opaque(call: Call) -> list[Traced]:
    for tensor in call.tensors:
        for axis in tensor.axes:
            call.pin(axis)
    return [Traced(tuple(call.placed(size) for size in shape)) for shape in call.shapes]


def entrywise(call: Call) -> Traced:
    return Traced(call.broadcast([tensor.axes for tensor in call.tensors]))


@rule("clone", "contiguous", "to", "_to_copy", "alias", "detach", "detach_", "lift_fresh_copy")
@rule("dropout", "native_dropout", "alpha_dropout", "feature_dropout")
def _same(call: Call) -> list[Traced]:
    return [call.tensor("self", "input")] * max(1, len(call.shapes))


# What torch does not tag as entry by entry.
rule(
    "relu6", "hardswish", "selu", "celu", "elu", "mish", "leaky_relu", "log_sigmoid", "softplus", "threshold", "rrelu",
    "copy", "logit", "silu", "gelu",
)(entrywise)  # fmt: skip


@rule("linear")
def _linear(call: Call) -> Traced:
    x, weight = call.tensor("input"), call.tensor("weight")
    call.contract(x, -1, weight, 1)
    call.along("bias", weight.axes[0])
    return Traced((*x.axes[:-1], weight.axes[0]))


@rule("matmul", "mm", "bmm", "mv", "dot")
def _matmul(call: Call) -> Traced:
    return _product(call, call.tensors[0], call.tensors[1])


@rule("addmm", "baddbmm", "addmv")
def _add_product(call: Call) -> Traced:
    added, a, b = call.tensors
    return Traced(call.broadcast([added.axes, _product(call, a, b).axes]))


def _product(call: Call, a: Traced, b: Traced) -> Traced:
    inner = -1 if len(b.axes) == 1 else -2
    call.contract(a, -1, b, inner)
    batch = call.broadcast([a.axes[:-2], b.axes[:-2]])
    rows = a.axes[-2:-1] if len(a.axes) > 1 else ()
    columns = b.axes[-1:] if len(b.axes) > 1 else ()
    return Traced((*batch, *rows, *columns))


@rule("conv1d", "conv2d", "conv3d", "convolution")
def _convolution(call: Call) -> Any:
    x, weight, groups = call.tensor("input"), call.tensor("weight"), call.given.get("groups", 1)
    if call.given.get("transposed", False):
        return opaque(call)
    channel = 1 - len(weight.axes)  # from behind
    if groups == 1:
        call.contract(x, channel, weight, 1)
    else:
        sizes = [call.factors.size(call.factors.atoms(axis)) for axis in (x.axes[channel], weight.axes[0])]
        of_x, of_weight = (
            call.factors.regroup([axis], [groups, size // groups], call.op)
            for axis, size in zip((x.axes[channel], weight.axes[0]), sizes, strict=True)
        )
        call.unify(of_x[0], of_weight[0])
        call.unify(of_x[1], weight.axes[1])
        if sizes[0] != groups:  # else each channel is a group, and a channel more is a group more
            call.factors.fix(of_x[0])
            call.factors.fix(of_x[1])
        if sizes[1] != groups:
            call.factors.fix(of_weight[0])
    call.along("bias", weight.axes[0])
    for axis in (*x.axes[channel + 1 :], *weight.axes[2:]):
        call.pin(axis)
    places = tuple(map(call.placed, call.shape[channel + 1 :]))
    return Traced((*x.axes[:channel], weight.axes[0], *places))


@rule("batch_norm", "_native_batch_norm_legit_no_training", "native_batch_norm", "cudnn_batch_norm", "prelu")
def _by_channel(call: Call) -> list[Traced]:
    x = call.tensor("input", "self")
    channel = x.axes[1] if len(x.axes) > 1 else ()
    for argument in ("weight", "bias", "running_mean", "running_var"):
        if isinstance(given := call.given.get(argument), Traced) and given.axes[-1]:  # prelu may have one for all
            call.unify(given.axes[-1], channel)
    return [x, *(Traced(tuple(map(call.placed, shape))) for shape in call.shapes[1:])]


@rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def _over_the_last(call: Call) -> list[Traced]:
    x = call.tensor("input")
    last = x.axes[len(x.axes) - len(call.given["normalized_shape"]) :]
    for argument in ("weight", "bias"):
        if isinstance(given := call.given.get(argument), Traced):
            for mine, its in zip(given.axes, last, strict=True):
                call.unify(mine, its)
    for axis in last:
        call.factors.fix(axis)
    return [x, *(Traced(tuple(map(call.placed, shape))) for shape in call.shapes[1:])]


@rule("_weight_norm", "_weight_norm_interface")
def _weight_norm(call: Call) -> list[Traced]:
    """Of a length for each unit, and a direction over all others."""
    direction, length = call.tensor("v"), call.tensor("g")
    for mine, its in zip(direction.axes, length.axes, strict=True):
        if its:
            call.unify(mine, its)
        else:
            call.factors.fix(mine)
    return [Traced(direction.axes), *(Traced(length.axes) for _ in call.shapes[1:])]


@rule("group_norm", "native_group_norm")
def _group_norm(call: Call) -> list[Traced]:
    x = call.tensor("input")
    groups = int(call.given.get("num_groups") or call.given["group"])
    channels = x.axes[1]
    for argument in ("weight", "bias"):
        call.along(argument, channels)
    size = call.factors.size(call.factors.atoms(channels))
    for axis in call.factors.regroup([channels], [groups, size // groups], call.op):
        call.factors.fix(axis)
    return [x, *(Traced(tuple(map(call.placed, shape))) for shape in call.shapes[1:])]


@rule("softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax")
def _softmax(call: Call) -> Traced:
    x = call.tensor("self", "input")
    call.factors.fix(x.axes[call.given["dim"]])
    return Traced(x.axes)


@rule("mean", "sum", "amax", "amin", "var", "std", "norm", "linalg_vector_norm", "logsumexp")
def _reduction(call: Call) -> Traced:
    """In any order, but not over any number."""
    x, dims = call.tensor("self", "input"), call.given.get("dim")
    dims = [dims] if isinstance(dims, int) else list(dims or range(len(x.axes)))
    reduced = {dim % len(x.axes) for dim in dims} if x.axes else set()
    for dim in reduced:
        call.factors.fix(x.axes[dim])
    if call.given.get("keepdim", False):
        return Traced(tuple(() if dim in reduced else axis for dim, axis in enumerate(x.axes)))
    return Traced(tuple(axis for dim, axis in enumerate(x.axes) if dim not in reduced))


def _spatial(dims: int) -> Rule:
    def over_positions(call: Call) -> list[Traced]:
        x = call.tensor("self", "input")
        for axis in x.axes[-dims:]:
            call.pin(axis)
        places = tuple(map(call.placed, call.shape[-dims:]))
        return [Traced((*x.axes[:-dims], *places))] * len(call.shapes)

    return over_positions


for _dims in (1, 2, 3):
    rule(
        *(f"{kind}_pool{_dims}d" for kind in ("max", "avg", "adaptive_avg", "_adaptive_avg")),
        *(f"upsample_{kind}{_dims}d" for kind in ("nearest", "_nearest_exact")),
        f"max_pool{_dims}d_with_indices",
    )(_spatial(_dims))
rule("upsample_linear1d")(_spatial(1))
rule("upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")(_spatial(2))


@rule("constant_pad_nd", "pad")
def _pad(call: Call) -> list[Traced]:
    return _spatial(len(call.given["pad"]) // 2)(call)


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze")
def _reshape(call: Call) -> Traced:
    return Traced(tuple(call.factors.regroup(call.tensor("self").axes, call.shape, call.op)))


@rule("permute", "transpose", "t", "movedim", "numpy_T", "mT", "swapaxes", "swapdims")
def _permute(call: Call) -> Traced:
    x, given = call.tensor("self"), call.given
    count = len(x.axes)
    order = list(range(count))
    if "dims" in given:
        order = [dim % count for dim in given["dims"]]
    elif "source" in given:
        order = _moved(count, *(_dims_of(given[name], count) for name in ("source", "destination")))
    elif call.op == "numpy_T":
        order.reverse()
    elif count > 1:
        pairs = (("dim0", "dim1"), ("axis0", "axis1"))
        i, j = next(((given[a], given[b]) for a, b in pairs if a in given), (-2, -1))
        order[i], order[j] = order[j], order[i]
    places = tuple(x.places[dim] for dim in order) if x.places else ()
    return Traced(tuple(x.axes[dim] for dim in order), places)


def _dims_of(dims: int | Sequence[int], count: int) -> list[int]:
    return [dim % count for dim in ([dims] if isinstance(dims, int) else dims)]


def _moved(count: int, source: list[int], destination: list[int]) -> list[int]:
    rest = iter([dim for dim in range(count) if dim not in source])
    at = dict(zip(destination, source, strict=True))
    return [at[dim] if dim in at else next(rest) for dim in range(count)]


@rule("expand", "expand_as", "broadcast_to")
def _expand(call: Call) -> Traced:
    x = call.tensor("self").axes
    axes = ((),) * (len(call.shape) - len(x)) + x
    return Traced(
        tuple(axis or call.factors.new(size) for axis, size in zip(axes, call.shape, strict=True)),
    )


@rule("select")
def _select(call: Call) -> Traced:
    x, dim = call.tensor("self").axes, call.given["dim"]
    dim %= len(x)
    call.pin(x[dim])
    return Traced(x[:dim] + x[dim + 1 :])


@rule("unbind")
def _unbind(call: Call) -> list[Traced]:
    x, dim = call.tensor("self").axes, call.given.get("dim", 0)
    dim %= len(x)
    call.pin(x[dim])
    return [Traced(x[:dim] + x[dim + 1 :])] * len(call.shapes)


@rule("slice")
def _slice(call: Call) -> Traced:
    x, dim = call.tensor("self").axes, call.given.get("dim", 0)
    dim %= len(x)
    if call.factors.size(call.factors.atoms(x[dim])) == call.shape[dim]:
        return call.tensor("self")
    call.pin(x[dim])
    return Traced((*x[:dim], call.placed(call.shape[dim]), *x[dim + 1 :]))


@rule("split", "chunk", "split_with_sizes", "tensor_split")
def _split(call: Call) -> list[Traced]:
    """Equal parts are an axis of their own: queries, keys and values."""
    x, dim = call.tensor("self").axes, call.given.get("dim", 0)
    dim %= len(x)
    sizes = [shape[dim] for shape in call.shapes]
    if len(set(sizes)) > 1:
        call.pin(x[dim])
        return [Traced((*x[:dim], call.placed(size), *x[dim + 1 :])) for size in sizes]
    parts, inner = call.factors.regroup([x[dim]], [len(sizes), sizes[0]], call.op)
    call.pin(parts)
    return [Traced((*x[:dim], inner, *x[dim + 1 :]))] * len(sizes)


@rule("cat", "concat", "concatenate")
def _cat(call: Call) -> Traced:
    tensors = [tensor.axes for tensor in call.tensors]
    dim = call.given.get("dim", 0) % len(call.shape)
    for tensor in tensors:
        call.pin(tensor[dim])
    others = call.broadcast([(*tensor[:dim], (), *tensor[dim + 1 :]) for tensor in tensors])
    return Traced((*others[:dim], call.placed(call.shape[dim]), *others[dim + 1 :]))


@rule("stack")
def _stack(call: Call) -> Traced:
    dim = call.given.get("dim", 0) % len(call.shape)
    others = call.broadcast([tensor.axes for tensor in call.tensors])
    return Traced((*others[:dim], call.placed(call.shape[dim]), *others[dim:]))


@rule("scaled_dot_product_attention")
def _attention(call: Call) -> Any:
    query, key, value = (call.tensor(name) for name in ("query", "key", "value"))
    if call.given.get("enable_gqa", False):
        return opaque(call)
    call.contract(query, -1, key, -1)
    call.unify(key.axes[-2], value.axes[-2])
    call.factors.fix(query.axes[-1])  # it says how products are scaled
    call.factors.fix(key.axes[-2])
    if call.given.get("is_causal", False):
        call.pin(query.axes[-2])
        call.pin(key.axes[-2])
    batch = call.broadcast([tensor.axes[:-2] for tensor in (query, key, value)])
    if isinstance(mask := call.given.get("attn_mask"), Traced):
        call.broadcast([mask.axes, (*batch, query.axes[-2], key.axes[-2])])
    return Traced((*batch, query.axes[-2], value.axes[-1]))


@rule("embedding")
def _embedding(call: Call) -> Traced:
    weight, numbers = call.tensor("weight"), call.tensor("indices")
    call.pin(weight.axes[0])
    return Traced((*numbers.axes, weight.axes[1]))


@rule("zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")
def _constant(call: Call) -> Traced:
    return Traced(tuple(map(call.factors.new, call.shape)))


def _tensors_in(values: list[Any]) -> list[Traced]:
    found: list[Traced] = []
    for value in values:
        if isinstance(value, Traced):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors_in(list(value))
    return found
