"""Sums over the rows of one task: of what goes into layers of the student, and of what those are to answer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...modules.layers import Layer, flat, gain_of, normalised
from ...modules.visits import Visit
from ...ops import GramCross, gram_cross


@dataclass(frozen=True)
class Rows:
    """One call of a layer in both models."""

    visit: Visit  # of the student
    answer: Visit  # of the expert
    weights: Tensor | None = None  # [rows], float64; None: all of them 1
    drift: Tensor | None = None  # [rows, out]: how far the stream that the layer adds to is from the expert's


class LinearMoments:
    """Of what goes into a linear layer of the student, x, with y: what goes into the expert's, or what comes out."""

    def __init__(self, *, of_outputs: bool) -> None:
        self.of_outputs = of_outputs
        self.rows = 0.0
        self.sums: list[Tensor] = []  # x^T x, x^T y, x, y

    def add(self, products: GramCross, rows: float) -> None:
        sums = [part[0].double() for part in products if part is not None]
        self.sums = [a + b for a, b in zip(self.sums, sums, strict=True)] if self.sums else sums
        self.rows += rows


class NormMoments:
    """Of normalised rows z, of their squares, and of what the expert's layer returned, with a drift if any, y."""

    def __init__(self, gain: float) -> None:
        self.gain = gain  # that is added to the weight
        self.rows = 0.0
        self.sums: list[Tensor] = []  # z, z^2, y, z y  # [dim] each

    def add(self, z: Tensor, y: Tensor, weights: Tensor | None) -> None:
        """z, y: [rows, dim]; weights: [rows], None for ones."""
        if weights is None:
            weights = torch.ones(len(z), dtype=torch.float64, device=z.device)
        z, y = (torch.where(weights[:, None] == 0, 0.0, x.double()) for x in (z, y))
        sums = [weights @ x for x in (z, z.square(), y, z * y)]
        self.sums = [a + b for a, b in zip(self.sums, sums, strict=True)] if self.sums else sums
        self.rows += float(weights.sum())


class TaskMoments:
    """Of some layers, for the rows of one task."""

    def __init__(
        self, layers: Mapping[str, Layer], tensors: Callable[[str], Tensor], writers: Collection[str] = ()
    ) -> None:
        """`tensors`: the student's; `writers`: layers that have a drift."""
        self._layers, self._tensors, self._writers = layers, tensors, writers
        self.of: dict[str, LinearMoments | NormMoments] = {}
        self._unknown: set[str] = set()  # normalisations that are not what they are called
        self._shared: dict[tuple[int, int, int], GramCross] = {}

    def add(self, calls: list[Rows]) -> None:
        """Those of one batch; layers with the same inputs and weights share their products."""
        self._shared.clear()
        for call in calls:
            layer = self._layers[call.visit.name]
            if layer.is_norm:
                self._add_norm(layer, call)
            else:
                self._add_linear(layer, call)

    def _add_linear(self, layer: Layer, call: Rows) -> None:
        rows, count = layer.rows(call.visit.inputs), call.weights
        x = flat(rows)
        wide, narrow = layer.weight.of(self._tensors).shape
        moments = self.of.setdefault(layer.name, LinearMoments(of_outputs=layer.name in self._writers or narrow > wide))
        assert isinstance(moments, LinearMoments)
        if moments.of_outputs:  # the smaller product, and the one that a drift can be added to
            y = flat(layer.outputs(call.answer.output))
            products = _products(x, y if call.drift is None else y + call.drift, count)
        else:
            key = (id(call.visit.inputs), id(call.answer.inputs), id(count))
            products = self._shared.get(key) or _products(x, flat(layer.rows(call.answer.inputs)), count)
            if rows is call.visit.inputs:
                self._shared[key] = products
        moments.add(products, float(len(x) if count is None else count.sum()))

    def _add_norm(self, layer: Layer, call: Rows) -> None:
        if layer.name in self._unknown:
            return
        if layer.name not in self.of:
            gain = gain_of(layer, call.visit, self._tensors)
            if gain is None:
                self._unknown.add(layer.name)
                return
            self.of[layer.name] = NormMoments(gain)
        moments = self.of[layer.name]
        assert isinstance(moments, NormMoments)
        y = flat(call.answer.output)
        z = normalised(layer.module, call.visit.inputs.detach().flatten(0, -2))
        moments.add(z, y if call.drift is None else y + call.drift, call.weights)


def _products(x: Tensor, y: Tensor, weights: Tensor | None) -> GramCross:
    dtype = torch.promote_types(x.dtype, y.dtype)
    weights = None if weights is None else weights.to(dtype)[None]
    return gram_cross(x.to(dtype)[None], y.to(dtype)[None], weights=weights)
