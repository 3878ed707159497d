"""What goes through the layers of two models on the same inputs, and where a layer's rows and columns lie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..modules.device import device_of
from ..modules.frozen import frozen
from ..modules.inputs import run, to_device
from ..modules.layer_visits import LayerVisits
from ..modules.layers import CONVOLUTIONS, Layer, known_layers
from ..modules.pools import Pool
from ..modules.visits import Visit


@dataclass(frozen=True)
class Linear:
    """A layer that multiplies rows, with the place of its matrix [out, in] in the weight."""

    layer: Layer
    out_dim: int
    in_dim: int
    rows: slice | None  # the part of out_dim that is its, where queries, keys and values lie in one tensor

    @property
    def name(self) -> str:
        return self.layer.name

    @property
    def weight(self) -> str:
        return self.layer.weight.name

    def features(self, x: Tensor) -> Tensor:
        """What goes in, with the features last."""
        return x.movedim(1, -1) if isinstance(self.layer.module, CONVOLUTIONS) else x

    def columns(self, features: Tensor) -> Tensor:
        """What the matrix multiplies, of features [..., in].  # [..., in * kernel]"""
        if isinstance(self.layer.module, CONVOLUTIONS):
            features = features.movedim(-1, 1)
        return self.layer.rows(features)

    def answers(self, visit: Visit, model: nn.Module) -> Tensor:
        """What comes out, with the features last."""
        if visit.output is not visit.inputs:
            return self.layer.outputs(visit.output)
        tensors = [part.of(model.get_parameter) for part in self.layer.parts]  # a projection inside of attention
        return nn.functional.linear(visit.inputs, *tensors)


def linear_layers(model: nn.Module) -> dict[str, Linear]:
    """All that multiply rows by a matrix, by name."""
    found = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, layer in known_layers(model, "").items():
        if layer.is_norm or not all(part.name in parameters for part in layer.parts):  # a parametrised weight is none
            continue
        weight = parameters[layer.weight.name]
        # The number of each row of the weight, in the shape that is multiplied: the same along a row, or a column.
        places = torch.arange(len(weight)).view(-1, *[1] * (weight.dim() - 1)).expand(weight.shape)
        matrix = layer.weight.view(places)
        out_dim = 0 if bool((matrix == matrix[:, :1]).all()) else 1
        start = int(matrix[0, 0])
        rows = slice(start, start + len(matrix)) if len(matrix) < weight.shape[out_dim] else None
        found[name] = Linear(layer, out_dim, 1 - out_dim, rows)
    return found


Visits = tuple[Visit, ...]  # of one layer, by each of the models


class Flows(ExitStack):
    """Passes of some models on the same batches; its `with` freezes them."""

    def __init__(self, models: Sequence[nn.Module], layers: Mapping[str, Linear]) -> None:
        super().__init__()
        self._models = models
        watched = {name: linear.layer for name, linear in layers.items()}
        for model in self._models:
            self.enter_context(frozen(model))
        self._visits = [self.enter_context(LayerVisits(model, watched)) for model in self._models]

    def __call__(self, pool: Pool, batch_size: int) -> Iterator[list[Visits]]:
        """The visits of the models' layers, batch after batch.

        Raises:
            ValueError: a layer is called by some of the models only, or more often.
        """
        for inputs in batches(pool, batch_size):
            seen = []
            for model, visits in zip(self._models, self._visits, strict=True):
                with (
                    visits.recording() as recorded,
                    torch.no_grad(),
                ):  # not around a yield: it would be the caller's too
                    run(model, to_device(inputs, device_of(model)))
                seen.append(recorded)
            if any([visit.name for visit in of_one] != [visit.name for visit in seen[0]] for of_one in seen):
                raise ValueError("second must call the layers that first calls, in its order, got others")
            yield list(zip(*seen, strict=True))


def batches(pool: Pool, batch_size: int) -> Iterator:
    """All samples, in batches of nearly one size."""
    count = -(-len(pool) // batch_size)
    return pool.stream(torch.arange(len(pool)).tensor_split(count))
