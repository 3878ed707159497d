"""WEMoE: feed-forward networks merged anew for every sample, with weights that routers give."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..merging import merge_state_dicts
from ..ops import arguments, combine, mix
from .feed_forward import find_feed_forward
from .layers import Route, RoutedLayer
from .model import Expert, RoutedModel, states_of
from .routers import TokenRouter

AT_ONCE = 1 << 26  # entries of merged layers that are held at a time where no gradient needs them


class MergedLinear(RoutedLayer):
    """A linear layer that is merged for every sample: ``W_b = base + sum_t weights[b, t] * task_vectors[t]``.

    Weight [out, in] and bias [out] lie flat, one after the other, in `base` [num_params] and `task_vectors` [num_tasks,
    num_params]. One layer of a network has the router; the others take what that found.
    """

    base: Tensor
    task_vectors: Tensor

    def __init__(
        self, linear: nn.Linear, num_tasks: int, router: TokenRouter | None, route: Route, token_major: bool
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.has_bias = linear.bias is not None
        num_params = self.out_features * (self.in_features + self.has_bias)
        self.register_buffer("base", linear.weight.new_empty(num_params))
        self.register_buffer("task_vectors", linear.weight.new_empty(num_tasks, num_params))
        self.router = router
        self.route, self.token_major = route, token_major
        self.is_last = False
        self.per_sample = True

    def fill(self, base: Sequence[Tensor], experts: Sequence[Sequence[Tensor]]) -> None:
        """From weight and bias of the base and of every expert."""
        torch.cat([tensor.flatten() for tensor in base], out=self.base)
        for task_vector, tensors in zip(self.task_vectors, experts, strict=True):
            torch.cat([tensor.flatten() for tensor in tensors], out=task_vector)
            task_vector -= self.base

    def forward(self, x: Tensor) -> Tensor:
        if self.router is not None:
            self.route.weights = None
        tokens, as_before = self.route.by_sample(x, self.token_major)
        if self.router is not None:
            weights = self.router(tokens)
            self.route.weights = weights if self.per_sample else weights.mean(dim=0, keepdim=True)
        assert self.route.weights is not None
        weights = self.route.weights
        if self.is_last:
            self.route.weights = None
        if len(weights) == 1:
            weight, bias = self._parts(self._merged(weights))
            return nn.functional.linear(x, weight[0], None if bias is None else bias[0])
        step = max(1, AT_ONCE // max(1, self.base.numel()))
        pairs = zip(tokens.split(step), weights.split(step), strict=True)
        outputs = torch.cat([self._of_samples(some, of_some) for some, of_some in pairs])
        return as_before(outputs)

    def _of_samples(self, tokens: Tensor, weights: Tensor) -> Tensor:
        weight, bias = self._parts(self._merged(weights))
        if bias is None:
            return torch.bmm(tokens, weight.mT)
        return torch.baddbmm(bias.unsqueeze(1), tokens, weight.mT)

    def _parts(self, merged: Tensor) -> tuple[Tensor, Tensor | None]:
        size = self.out_features * self.in_features
        weight = merged[:, :size].unflatten(1, (self.out_features, self.in_features))
        return weight, merged[:, size:] if self.has_bias else None

    def _merged(self, weights: Tensor) -> Tensor:
        """[batch, num_params]; both ways give the same bits."""
        weights = weights.to(torch.promote_types(self.base.dtype, torch.float32))
        if torch.is_grad_enabled() and weights.requires_grad:
            block = torch.tensor([0, self.base.numel()], device=weights.device)
            merged = (combine(self.base, self.task_vectors, of_one[:, None], block) for of_one in weights)
            return torch.stack(list(merged))
        out = self.base.new_empty(len(weights), self.base.numel())
        mix(  # reads the experts once for all samples
            self.base,
            self.task_vectors,
            weights,
            base_coefficients=[1.0] * len(weights),
            task_vectors=False,
            nonfinite="propagate",
            out=list(out),
        )
        return out

    def _of_the_shape(self) -> Tensor:
        return self._parts(self.base[None])[0][0]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, num_tasks={len(self.task_vectors)}"


class WEMoE(RoutedModel):
    """A model whose feed-forward networks are merged for every sample; made by `wemoe`."""

    kind = "wemoe"

    def _put_layers(self) -> None:
        """A file names the layers of all networks in a row, and how many each has."""
        options, num_tasks = self.configuration, len(self.tasks)
        names = iter(options["layers"])
        for count in options["networks"]:
            route = Route()
            self.routes.append(route)
            for i in range(count):
                name = next(names)
                linear = self.linear(name)
                router = None
                if i == 0:
                    dtype = torch.promote_types(linear.weight.dtype, torch.float32)
                    router = TokenRouter(linear.in_features, num_tasks, options["lam"], options["depth"], dtype)
                layer = MergedLinear(linear, num_tasks, router, route, self.token_major(name))
                layer.is_last = i == count - 1
                self._put(name, layer)

    @property
    def routers(self) -> list[TokenRouter]:
        """One for every network, in order of depth; all that is trained."""
        return [module for module in self.modules() if isinstance(module, TokenRouter)]

    @contextmanager
    def one_merge_a_batch(self) -> Iterator[None]:
        """While it lasts, weights are averaged over the batch: one merge for all samples, as FusionBench trains."""
        layers = [module for module in self.modules() if isinstance(module, MergedLinear)]
        for layer in layers:
            layer.per_sample = False
        try:
            yield
        finally:
            for layer in layers:
                layer.per_sample = True


@torch.inference_mode(False)  # what is made takes part in gradients
@torch.no_grad()
def wemoe(
    base: nn.Module,
    experts: Mapping[str, Expert],
    *,
    lam: float = 0.3,
    depth: int = 2,
    networks: Sequence[Sequence[str]] | None = None,
    token_major: bool | None = None,
    seed: int = 0,
) -> WEMoE:
    """``base + sum_t router(tokens)[t] * (expert_t - base)`` in feed-forward networks; elsewhere task arithmetic.

    Each network has a router that sees the tokens of a sample as they come in, and gives the weights of the experts as
    the mean over tokens; the network is then merged for that sample. Padding takes part in the mean. It begins as task
    arithmetic, nearly; `fit_by_entropy` trains the routers on unlabeled inputs.

    Args:
        base: The pretrained module; it stays as it is.
        experts: By name of the task: modules or state dicts with the tensors of `base`.
        lam: Scale of task arithmetic, and what routers' weights begin near.
        depth: Linear layers of a router: 0 (the same weights for all samples), 1 or 2.
        networks: Names of the linear layers of each network, the first of which sees its tokens and the last of which
            is the last to run. None: as `find_feed_forward` finds them.
        token_major: Whether tokens inside blocks are [tokens, batch, dim]; None: as ``nn.MultiheadAttention`` inside a
            block says, else False.
        seed: Of the routers' start.

    Returns:
        A copy of the model, with all its outputs, in the mode of `base`. Only routers take gradients; they are float32,
        or float64 for such models. What it holds is (num_tasks + 1) times the feed-forward networks, and the rest once.

    Raises:
        ValueError, TypeError: models differ in their tensors, an option is outside its range, or a named layer is none.

    Source: Merging Multi-Task Models via Weight-Ensembling Mixture of Experts (arXiv 2402.00433).
    """
    lam = arguments.number("lam", lam)
    if depth not in (0, 1, 2) or isinstance(depth, bool):
        raise ValueError(f"depth must be 0, 1 or 2, got {depth!r}")
    of_base, states = states_of(base, experts)
    if networks is None:
        networks = [found.layers for found in find_feed_forward(base)]
    names = [name for network in networks for name in network]
    modules = dict(base.named_modules())
    for name in names:
        if not isinstance(modules.get(name), nn.Linear):
            raise ValueError(f"networks must be names of linear layers of base, got {name!r}")
        if names.count(name) > 1:
            raise ValueError(f"networks must be different layers, got {name!r} twice")
    configuration: dict[str, Any] = {
        "tasks": list(states),
        "layers": names,
        "networks": [len(network) for network in networks],
        "lam": lam,
        "depth": depth,
        "token_major": token_major,
        "unrouted": [],
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = WEMoE(base, configuration)
    merged = merge_state_dicts(of_base, list(states.values()), method="task_arithmetic", lam=lam, progress=False)
    routed = {name: model.model.get_submodule(name) for name in names}
    for name, layer in routed.items():
        assert isinstance(layer, MergedLinear)
        parts = [f"{name}.weight", f"{name}.bias"][: 1 + layer.has_bias]
        layer.fill([of_base[part] for part in parts], [[state[part] for part in parts] for state in states.values()])
    for name, tensor in model.model.state_dict().items():
        if name in merged:
            tensor.copy_(merged[name])
    return model.train(base.training)
