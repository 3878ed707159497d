"""Twin-Merging: one shared model, what is left of every expert compressed, and a router that adds it by sample."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..merging import merge_state_dicts
from ..merging.state_dicts import owners_of
from ..modules.inputs import batch_size
from ..modules.outputs import open_output
from ..ops import arguments
from .layers import Route, RoutedLayer, weighed_experts
from .model import (
    Expert,
    RoutedModel,
    StateDict,
    check_finite,
    check_rank,
    differing,
    factors_of,
    layers_of,
    parameters_of,
    rank_of,
    states_of,
    wide,
)
from .routers import FeatureRouter

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class TwinLayer(RoutedLayer):
    """``shared(x) + sum_t weights[sample, t] * own_t(x)``: what experts have beside a layer that they share."""

    def __init__(self, shared: Any, num_tasks: int, route: Route) -> None:
        super().__init__()
        self.shared, self.route = shared, route
        self.shift = None if shared.bias is None else _empty(shared, num_tasks, *shared.bias.shape)

    def fill(self, changes: list[dict[str, Tensor]]) -> None:
        for t, change in enumerate(changes):
            self._keep(t, change["weight"])
            if self.shift is not None:
                self.shift[t] = change["bias"]

    def forward(self, x: Tensor) -> Tensor:
        out = self.shared(x)
        return out if self.route.weights is None else out + self._own(x, self.route.weights).to(out)

    @abstractmethod
    def _keep(self, task: int, change: Tensor) -> None:
        """Of the weight of an expert."""

    @abstractmethod
    def _own(self, x: Tensor, weights: Tensor) -> Tensor:
        """What is added for weights [batch or 1, num_tasks], in the order of `x`."""


class TwinLinear(TwinLayer):
    """``W x + b + sum_t weights[sample, t] (up_t down_t x + shift_t)``: W and b are shared."""

    def __init__(self, linear: nn.Linear, num_tasks: int, rank: int, route: Route, token_major: bool) -> None:
        super().__init__(linear, num_tasks, route)
        self.token_major = token_major
        self.in_features, self.out_features = linear.in_features, linear.out_features
        out, width = linear.weight.shape
        self.down, self.up = _empty(linear, num_tasks, rank, width), _empty(linear, num_tasks, out, rank)

    def _keep(self, task: int, change: Tensor) -> None:
        self.down[task], self.up[task] = factors_of(change, self.down.shape[1])

    def _own(self, x: Tensor, weights: Tensor) -> Tensor:
        tokens, as_before = self.route.by_sample(x, self.token_major)
        return as_before(weighed_experts(tokens, self.down, self.up, self.shift, weights[:, None]))


class TwinNorm(TwinLayer):
    """A layer normalisation with the weight and bias of each sample."""

    def __init__(self, norm: nn.LayerNorm, num_tasks: int, route: Route, token_major: bool) -> None:
        super().__init__(norm, num_tasks, route)
        self.token_major = token_major
        self.normalized_shape, self.eps = norm.normalized_shape, norm.eps
        self.scale = _empty(norm, num_tasks, *norm.weight.shape)

    def _keep(self, task: int, change: Tensor) -> None:
        self.scale[task] = change

    def _own(self, x: Tensor, weights: Tensor) -> Tensor:
        normalised = nn.functional.layer_norm(x, self.normalized_shape, eps=self.eps)
        tokens, as_before = self.route.by_sample(normalised, self.token_major)
        weights = weights.to(tokens.dtype)[:, None]
        added = tokens * (weights @ self.scale.to(tokens.dtype))
        if self.shift is not None:
            added = added + weights @ self.shift.to(tokens.dtype)
        return as_before(added)


class TwinConvolution(TwinLayer):
    """A convolution with the kernel and bias of each sample, by one convolution with the kernels of all experts."""

    def __init__(self, convolution: Any, num_tasks: int, route: Route) -> None:
        super().__init__(convolution, num_tasks, route)
        self.kernels = _empty(convolution, num_tasks, *convolution.weight.shape)

    def _keep(self, task: int, change: Tensor) -> None:
        self.kernels[task] = change

    def _own(self, x: Tensor, weights: Tensor) -> Tensor:
        bias = None if self.shift is None else self.shift.flatten()
        of_all = self.shared._conv_forward(x, self.kernels.flatten(0, 1), bias).unflatten(1, self.kernels.shape[:2])
        return torch.einsum("bt,bt...->b...", weights.to(of_all.dtype), of_all)


class TwinMerging(RoutedModel):
    """A shared model and compressed experts, weighed by sample; made by `twin_merging`.

    ``model(inputs)`` runs the shared model for the router's features, and then, with the weights that it gives, again;
    ``model(inputs, weights=w)`` takes weights [batch, num_tasks] of your own and runs once.
    """

    kind = "twin"

    def __init__(self, base: nn.Module, configuration: dict[str, Any]) -> None:
        super().__init__(base, configuration)
        self.router: FeatureRouter | None = None
        if configuration["router"] is not None:
            self.put_router(*configuration["router"])

    def put_router(self, dim: int, hidden: int) -> FeatureRouter:
        """A new router for features of width `dim`."""
        self.configuration["router"] = [dim, hidden]
        first = next(self.model.parameters())
        dtype = torch.promote_types(first.dtype, torch.float32)
        self.router = FeatureRouter(dim, len(self.tasks), hidden).to(first.device, dtype)
        return self.router

    def _put_layers(self) -> None:
        self.route = Route()
        self.routes.append(self.route)
        for name in self.configuration["layers"]:
            layer = self.model.get_submodule(name)
            if isinstance(layer, nn.Linear):
                rank = rank_of(self.configuration["rank"], *layer.weight.shape)
                routed: TwinLayer = TwinLinear(layer, len(self.tasks), rank, self.route, self.token_major(name))
            elif isinstance(layer, nn.LayerNorm):
                routed = TwinNorm(layer, len(self.tasks), self.route, self.token_major(name))
            else:
                routed = TwinConvolution(layer, len(self.tasks), self.route)
            self._put(name, routed)

    def features(self, *inputs: Any, **options: Any) -> Tensor:
        """What the router sees: the shared model's representation, of tokens [batch, tokens, dim] their mean.

        It is what `attach` takes for a model's representation: a tensor, the first item of a tuple, or of a mapping
        image_embeds, text_embeds, pooler_output or last_hidden_state.
        """
        self.route.weights = None
        found = open_output(super().forward(*inputs, **options), "").tensor
        return found.flatten(1, -2).mean(dim=1) if found.dim() > 2 else found

    def weigh(self, *inputs: Any, **options: Any) -> Tensor:
        """The weights of the experts for every sample, which sum to 1.  # [batch, num_tasks]"""
        if self.router is None:
            raise RuntimeError(
                "router must be fitted before inputs are routed, got none: call fit_router, or give weights"
            )
        features = self.features(*inputs, **options)
        return self.router(features.to(next(self.router.parameters()).dtype)).softmax(dim=-1)

    def forward(self, *inputs: Any, weights: Tensor | None = None, **options: Any) -> Any:
        if weights is None:
            weights = self.weigh(*inputs, **options)
        batch = batch_size((inputs, options))
        if weights.shape != (batch, len(self.tasks)):
            raise ValueError(f"weights must have shape {(batch, len(self.tasks))}, got {tuple(weights.shape)}")
        self.route.weights = weights
        try:
            return super().forward(*inputs, **options)
        finally:
            self.route.weights = None


@torch.inference_mode(False)  # what is made takes part in gradients
@torch.no_grad()
def twin_merging(
    base: nn.Module,
    experts: Mapping[str, Expert],
    *,
    rank: int | float | None = 0.2,
    lam: float = 0.3,
    shared: StateDict | None = None,
    exclude: tuple[str, ...] = (),
    token_major: bool | None = None,
) -> TwinMerging:
    """``shared + sum_t weights[sample, t] * SVD_rank(expert_t - shared)``, with weights that a router gives samples.

    The shared model is task arithmetic. Linear layers keep the leading directions of what each expert has beyond it;
    layer normalisations and convolutions keep all of that. Embeddings, other normalisations, parameters of no layer,
    and what ``nn.MultiheadAttention`` holds are the shared model's for all samples: `unrouted` names them.

    Args:
        base: The pretrained module; it stays as it is.
        experts: By name of the task: modules or state dicts with the tensors of `base`.
        rank: Directions of a linear layer: a number, a share of them all, or None for all.
        lam: Scale of the task arithmetic.
        shared: State dict of another shared model, in place of task arithmetic.
        exclude: Patterns (``fnmatch``) of names of layers that are the shared model's alone.
        token_major: Whether tokens inside blocks are [tokens, batch, dim]; None: as ``nn.MultiheadAttention`` inside a
            block says, else False. Layers must see as many samples as the model is called with.

    Returns:
        A copy of the model, in the mode of `base`, whose router `fit_router` makes.

    Raises:
        ValueError, TypeError: models differ in their tensors or are not finite, or an option is outside its range.

    Source: Twin-Merging: Dynamic Integration of Modular Expertise in Model Merging (arXiv 2406.15479), algorithm 1.
    """
    check_rank("rank", rank)
    of_base, states = states_of(base, experts)
    if shared is None:
        lam = arguments.number("lam", lam)
        shared = merge_state_dicts(of_base, list(states.values()), method="task_arithmetic", lam=lam, progress=False)
    else:
        owners_of(of_base, [shared], "base")
    check_finite([name for name, x in of_base.items() if x.is_floating_point()], {"shared": shared} | states)
    changed = set(differing(list(of_base), shared, states))
    found = layers_of(base, exclude, (nn.Linear, nn.LayerNorm, *CONVOLUTIONS))
    names = [name for name, layer in found.items() if {f"{name}.weight", f"{name}.bias"} & changed and _is_known(layer)]
    routed = parameters_of(base, names)
    configuration: dict[str, Any] = {
        "tasks": list(states),
        "layers": names,
        "rank": rank,
        "token_major": token_major,
        "unrouted": sorted(changed - routed),
        "router": None,
    }
    model = TwinMerging(base, configuration)
    for name in names:
        layer = model.model.get_submodule(name)
        parts = [part for part in ("weight", "bias") if f"{name}.{part}" in of_base]
        changes = []
        for state in states.values():
            pairs = {part: (state[f"{name}.{part}"], shared[f"{name}.{part}"]) for part in parts}
            changes.append({part: wide(x) - wide(y) for part, (x, y) in pairs.items()})
        assert isinstance(layer, TwinLayer)
        layer.fill(changes)
        layer.shared.load_state_dict({part: shared[f"{name}.{part}"] for part in parts})
    for name, tensor in model.model.state_dict().items():
        if name in shared and name not in routed:
            tensor.copy_(shared[name])
    return model.train(base.training)


def _is_known(layer: nn.Module) -> bool:
    if isinstance(layer, nn.LayerNorm):
        return len(layer.normalized_shape) == 1
    return getattr(layer, "groups", 1) == 1


def _empty(like: Any, *shape: int) -> nn.Parameter:
    return nn.Parameter(like.weight.new_empty(shape), requires_grad=False)
