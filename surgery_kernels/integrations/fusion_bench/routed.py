"""Models that keep their experts: SMILE upscaling, and WEMoE of CLIP's image encoder.

The result is a module of the pretrained model's class, as FusionBench's is, with our layers in the place of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from fusion_bench.method.smile_upscaling import SmileUpscalingAlgorithm
from fusion_bench.method.we_moe.clip_we_moe import CLIPWeightEnsemblingMoEAlgorithm
from fusion_bench.method.we_moe.we_moe import WeightEnsemblingMoEAlgorithm
from omegaconf import DictConfig
from torch import nn

from ...routed import smile, wemoe
from ...routed.wemoe import MergedLinear
from .states import models_of, state_of, takes
from .stock import stands_in, stock


@stands_in(SmileUpscalingAlgorithm, "merge")
@torch.no_grad()
def upscaled(self: Any, pretrained_model: nn.Module, finetuned_models: list[nn.Module], in_place: bool = True) -> Any:
    """With its `gate_k`, `k`, `top_k`, `routing_use_diff` and `average_experts`; all models stay as they are."""
    overridden = ("_upscale_linear_layer", "_upscale_submodules", "_average_experts")
    states = [state_of(model) for model in (pretrained_model, *finetuned_models)]
    is_theirs = all(getattr(type(self), name) is getattr(SmileUpscalingAlgorithm, name) for name in overridden)
    if not (is_theirs and self._linear_layer_cls == (nn.Linear,) and takes(states)):
        return stock(SmileUpscalingAlgorithm, "merge")(self, pretrained_model, finetuned_models, in_place)
    model = smile(
        pretrained_model,
        {str(t): expert for t, expert in enumerate(finetuned_models)},
        rank=self.k if self.k > 0 else None,
        gate_rank=self.gate_k,
        top_k=self.top_k,
        gate_of="change" if self.routing_use_diff else "weight",
        rest="average" if self.average_experts else "base",
    ).model
    if self.average_experts:  # of modules without modules: FusionBench leaves parameters beside others alone
        for name, module in pretrained_model.named_modules():
            if any(module.children()):
                own = dict(model.get_submodule(name).named_parameters(recurse=False))
                for key, parameter in module.named_parameters(recurse=False):
                    own[key].copy_(parameter)
    return model


@stands_in(CLIPWeightEnsemblingMoEAlgorithm, "construct_moe_model")
def mixture(self: Any) -> Any:
    """With its `init_lambda`, `router_hidden_layers` and `batch_reduce`."""
    pretrained, *experts = models_of(self.modelpool)
    depth = self.config.router_hidden_layers
    if depth not in (0, 1, 2) or not takes([state_of(model) for model in (pretrained, *experts)]):
        return stock(CLIPWeightEnsemblingMoEAlgorithm, "construct_moe_model")(self)
    if self._fabric is None:  # FusionBench makes one for a GPU alone, and fails without
        from lightning import Fabric

        self._fabric = Fabric(accelerator="cpu", devices=1)
    named = dict(zip(self.modelpool.model_names, experts, strict=True))
    model: Any = wemoe(pretrained, named, lam=self.config.init_lambda, depth=depth, seed=torch.initial_seed()).model
    model.batch_reduce = self.config.batch_reduce
    model.register_forward_pre_hook(_as_told)
    return model


def _as_told(model: Any, _: object) -> None:
    """FusionBench tells the model, when it has trained, that weights are each sample's; its own layers do not hear."""
    for layer in model.modules():
        if isinstance(layer, MergedLinear):
            layer.per_sample = not model.batch_reduce


def _configured(self: Any, algorithm_config: DictConfig | None = None, **options: Any) -> None:
    """From a configuration, as in FusionBench, or from its entries, as ``method._target_`` gives them."""
    WeightEnsemblingMoEAlgorithm.__init__(self, DictConfig(options) if algorithm_config is None else algorithm_config)


MEMBERS: dict[str, dict[str, Any]] = {"CLIPWeightEnsemblingMoE": {"__init__": _configured}}  # of classes named alone
