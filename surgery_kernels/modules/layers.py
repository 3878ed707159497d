"""Layers that are linear maps or normalisations: where their parameters lie, and which rows go through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .visits import Visit

Tensors = Callable[[str], Tensor]  # by their names in a model
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _transposed(weight: Tensor) -> Tensor:
    return weight.T


def _as_matrix(weight: Tensor) -> Tensor:
    return weight.flatten(1)


@dataclass(frozen=True)
class Part:
    """A parameter, or rows of one, in the shape that is solved for."""

    name: str
    view: Callable[[Tensor], Tensor] = _as_it_is  # of the parameter's own memory

    def of(self, tensors: Tensors) -> Tensor:
        return self.view(tensors(self.name))


@dataclass(frozen=True)
class Layer:
    """A linear map of rows, or a normalisation."""

    name: str
    module: nn.Module
    weight: Part  # [out, in]; of a normalisation [dim]
    bias: Part | None
    is_norm: bool = False
    rows: Callable[[Tensor], Tensor] = _as_it_is  # of what goes in  # [..., in]
    outputs: Callable[[Tensor], Tensor] = _as_it_is  # of what comes out  # [..., out]

    @property
    def parts(self) -> tuple[Part, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


def known_layers(module: nn.Module, prefix: str) -> dict[str, Layer]:
    """Linear layers, attention, convolutions and normalisations below a module, by name."""
    found: dict[str, Layer] = {}
    inside: set[int] = set()  # layers whose weights their owner uses without calling them
    for name, below in module.named_modules():
        if id(below) in inside:
            continue
        if isinstance(below, nn.MultiheadAttention):
            inside.add(id(below.out_proj))
        for layer in _layers_of(below, f"{prefix}.{name}".strip(".")):
            found[layer.name] = layer
    return found


def projections(name: str) -> tuple[str, str, str]:
    """Of queries, keys and values in an nn.MultiheadAttention: names of layers."""
    return (f"{name}.q_proj", f"{name}.k_proj", f"{name}.v_proj")


def is_norm(layer: nn.Module) -> bool:
    weight = getattr(layer, "weight", None)
    named = isinstance(layer, nn.LayerNorm) or type(layer).__name__.endswith("RMSNorm")
    return named and isinstance(weight, Tensor) and weight.dim() == 1


def _layers_of(module: nn.Module, name: str) -> Iterator[Layer]:
    weight, bias = Part(f"{name}.weight"), None
    if getattr(module, "bias", None) is not None:
        bias = Part(f"{name}.bias")
    if isinstance(module, nn.MultiheadAttention):
        yield from _attention(module, name)
    elif isinstance(module, nn.Linear):
        yield Layer(name, module, weight, bias)
    elif type(module).__name__ == "Conv1D" and isinstance(getattr(module, "weight", None), Tensor):  # of transformers
        yield Layer(name, module, Part(weight.name, _transposed), bias)
    elif isinstance(module, CONVOLUTIONS) and module.groups == 1:
        unfolded = partial(_unfolded, module)
        last = partial(torch.movedim, source=1, destination=-1)
        yield Layer(name, module, Part(weight.name, _as_matrix), bias, rows=unfolded, outputs=last)
    elif is_norm(module):
        yield Layer(name, module, weight, bias, is_norm=True)


def _attention(module: nn.MultiheadAttention, name: str) -> Iterator[Layer]:
    """Queries, keys and values are three maps, of one input or of several; each has its rows of what is stored."""
    dim = module.embed_dim
    for i, (layer, letter) in enumerate(zip(projections(name), "qkv", strict=True)):
        rows = partial(torch.narrow, dim=0, start=i * dim, length=dim)
        packed = module.in_proj_weight is not None
        weight = Part(f"{name}.in_proj_weight", rows) if packed else Part(f"{name}.{letter}_proj_weight")
        bias = None if module.in_proj_bias is None else Part(f"{name}.in_proj_bias", rows)
        yield Layer(layer, module, weight, bias)
    out = f"{name}.out_proj"
    bias = None if module.out_proj.bias is None else Part(f"{out}.bias")
    yield Layer(out, module, Part(f"{out}.weight"), bias)


def _unfolded(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """What a convolution multiplies with its weights.  # [batch, *positions, channels * kernel]"""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = nn.functional.pad(x, module._reversed_padding_repeated_twice, mode)
    for axis, size in enumerate(module.kernel_size):
        reach = module.dilation[axis] * (size - 1) + 1
        x = x.unfold(2 + axis, reach, module.stride[axis])[..., :: module.dilation[axis]]
    dims = len(module.kernel_size)
    return x.movedim(1, 1 + dims).flatten(1 + dims)


def flat(rows: Tensor) -> Tensor:
    """[rows, dim], in float32 or wider."""
    rows = rows.detach().flatten(0, -2)
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def normalised(layer: nn.Module, x: Tensor) -> Tensor:
    """What a normalisation multiplies with its weight."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if isinstance(layer, nn.LayerNorm):
        return nn.functional.layer_norm(x, layer.normalized_shape, eps=layer.eps)
    eps = getattr(layer, "variance_epsilon", getattr(layer, "eps", None))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def gain_of(layer: Layer, visit: Visit, tensors: Tensors) -> float | None:
    """What a normalisation adds to its weight before it multiplies: 0, in some models 1; None where it computes
    something else than its class name says."""
    z, weight = normalised(layer.module, visit.inputs), layer.weight.of(tensors)
    bias = None if layer.bias is None else layer.bias.of(tensors)
    for gain in (0.0, 1.0):
        expected = z * (weight + gain) if bias is None else z * (weight + gain) + bias
        near = 1e-2 * float(expected.abs().max())
        if torch.allclose(visit.output.to(expected), expected, rtol=1e-2, atol=near):
            return gain
    return None
