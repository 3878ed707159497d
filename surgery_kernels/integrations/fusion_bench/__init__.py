"""FusionBench's algorithms with our ops. Needs the extra `fusion-bench`.

    python -m surgery_kernels.integrations.fusion_bench method=linear/simple_average ...    # fusion_bench's arguments

is `install()` followed by FusionBench's own command; in Python, `install()` is all it takes, or `accelerated()` for a
block. Every algorithm of FusionBench that merges by a method of ours then runs on our ops, on modules and lazy state
dicts, on CPU and CUDA tensors, and so does what FusionBench builds on them. Each can also be named alone, by
FusionBench's name without "Algorithm":

    fusion_bench method=ties_merging method._target_=surgery_kernels.integrations.fusion_bench.TiesMerging ...

`NAMES` lists them. Methods that FusionBench does not have are classes by the name of their declaration, with its
parameters as options: ``method._target_=surgery_kernels.integrations.fusion_bench.Pcb method.density=0.2``.

Options, configuration and result are theirs, tensor by tensor, buffers included: from five models on sums may differ in
the last bit, since torch adds them in another order, dot products are exact, and in bfloat16 and float16 everything but
TIES rounds once, where FusionBench rounds after every operation. What differs on purpose:

- EMRMerging adds up its norms in float64, and keeps parameters alone, since FusionBench's modulators know no buffers.
- TallMaskTaskArithmetic has the paper's masks, and LinearInterpolation interpolates: both always fail in 0.2.33.
- DareTaskArithmetic draws masks of FusionBench's distribution from a counter, whose seed is torch's next number;
  ``install(exact_draws=True)`` draws FusionBench's own. Where it drops everything the result is the pretrained model,
  not NaN.
- TaskSingularVectorMerging keeps one direction of each model at least, where FusionBench keeps none of matrices with
  fewer rows or columns than models; WUDIMerging of one model is that model.
- SmileUpscaling keeps layers in which biases alone differ, gives an expert that changed nothing the gate 0, leaves the
  models of the pool as they are, and leaves alone what ``nn.MultiheadAttention`` would not call; `average_experts`
  works for models with activations too, where 0.2.33 fails.
- CLIPWeightEnsemblingMoE weighs every sample after its training, as FusionBench means to, and runs without a GPU too.
- The Concrete algorithms mask the sum of the task vectors once, where FusionBench masks each of them; masks are its own
  draws. Our methods `concrete_task_arithmetic` and `concrete_adamerging` draw theirs from a counter and store none.
- RegMean and RegMean++ are solved in float64 and have a solution where the inputs are few; FusionBench inverts.

All models of the pool are in memory at once, of lazy ones a tensor of each where the method allows it. What the ops do
not take (models that differ in their tensors, other devices) goes to FusionBench.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from inspect import signature
from typing import Any

from ..extras import missing

try:
    from omegaconf import DictConfig

    from . import inputs, linear, masks, routed, spherical  # noqa: F401  # they register what stands in
    from .declared import class_of, lacking
    from .drawn import draw_exactly
    from .stock import restored, swap
except ImportError as error:
    raise missing("fusion_bench", "fusion-bench", error) from error

NAMES: dict[str, str] = {  # of our classes -> module and class of FusionBench's
    "SimpleAverage": "simple_average.SimpleAverageAlgorithm",
    "SimpleAverageForCausalLM": "linear.SimpleAverageForCausalLM",
    "WeightedAverage": "weighted_average.WeightedAverageAlgorithm",
    "LinearInterpolation": "linear.LinearInterpolationAlgorithm",
    "ExPO": "linear.ExPOAlgorithm",
    "TaskArithmetic": "task_arithmetic.TaskArithmeticAlgorithm",
    "TaskArithmeticForCausalLM": "linear.TaskArithmeticForCausalLM",
    "TiesMerging": "ties_merging.TiesMergingAlgorithm",
    "TiesMergingForCausalLM": "linear.TiesMergingForCausalLM",
    "DareSimpleAverage": "dare.DareSimpleAverage",
    "DareTaskArithmetic": "dare.DareTaskArithmetic",
    "DareTiesMerging": "dare.DareTiesMerging",
    "MagMax": "magmax.MagMaxAlgorithm",
    "SlerpMerge": "slerp.SlerpMergeAlgorithm",
    "SlerpForCausalLM": "slerp.SlerpForCausalLM",
    "ModelStock": "model_stock.ModelStock",
    "EMRMerging": "emr_merging.EMRMerging",
    "TallMaskTaskArithmetic": "tall_mask.TallMaskTaskArithmeticAlgorithm",
    "IsotropicMergingInCommonSubspace": "isotropic_merging.IsotropicMergingInCommonSubspace",
    "IsotropicMergingInCommonAndTaskSubspace": "isotropic_merging.IsotropicMergingInCommonAndTaskSubspace",
    "TaskSingularVectorMerging": "task_singular_vector.TaskSingularVectorMerging",
    "WUDIMerging": "wudi.WUDIMerging",
    "FisherMergingForCLIPVisionModel": "fisher_merging.FisherMergingForCLIPVisionModel",
    "FisherMergingForGPT2": "fisher_merging.FisherMergingAlgorithmForGPT2",
    "RegMeanForCLIP": "regmean.RegMeanAlgorithmForCLIP",
    "RegMeanForGPT2": "regmean.RegMeanAlgorithmForGPT2",
    "RegMeanForCLIPPlusPlus": "regmean_plusplus.RegMeanAlgorithmForCLIPPlusPlus",
    "CLIPTaskWiseAdaMerging": "adamerging.CLIPTaskWiseAdaMergingAlgorithm",
    "CLIPLayerWiseAdaMerging": "adamerging.CLIPLayerWiseAdaMergingAlgorithm",
    "GPT2LayerWiseAdaMerging": "adamerging.GPT2LayerWiseAdaMergingAlgorithm",
    "FlanT5LayerWiseAdaMerging": "adamerging.FlanT5LayerWiseAdaMergingAlgorithm",
    "LayerWiseAdaMergingForLlamaSFT": "adamerging.LayerWiseAdaMergingForLlamaSFT",
    "ResNetTaskWiseAdamerging": "adamerging.ResNetTaskWiseAdamerging",
    "ResNetLayerWiseAdamerging": "adamerging.ResNetLayerWiseAdamerging",
    "ConcreteTaskArithmeticForCLIP": "concrete_subspace.ConcreteTaskArithmeticAlgorithmForCLIP",
    "ConcreteTaskWiseAdaMergingForCLIP": "concrete_subspace.ConcreteTaskWiseAdaMergingForCLIP",
    "ConcreteLayerWiseAdaMergingForCLIP": "concrete_subspace.ConcreteLayerWiseAdaMergingForCLIP",
    "SmileUpscaling": "smile_upscaling.SmileUpscalingAlgorithm",
    "CLIPWeightEnsemblingMoE": "we_moe.clip_we_moe.CLIPWeightEnsemblingMoEAlgorithm",
}
ALIASES = {
    "ISO_C_Merge": "IsotropicMergingInCommonSubspace",
    "ISO_CTS_Merge": "IsotropicMergingInCommonAndTaskSubspace",
}


def install(*, exact_draws: bool = False) -> None:
    """From here on FusionBench's algorithms run on our ops, in this process; twice is as once.

    Args:
        exact_draws: The random masks of DareTaskArithmetic and DareSimpleAverage are FusionBench's.
    """
    swap()
    if exact_draws:
        draw_exactly()


@contextmanager
def accelerated(*, exact_draws: bool = False) -> Iterator[None]:
    """`install` inside the block; afterwards FusionBench is as it was before it."""
    with restored():
        install(exact_draws=exact_draws)
        yield


def __getattr__(name: str) -> Any:
    """The classes, each made when it is asked for: FusionBench's modules take seconds to import."""
    if name in ALIASES:
        found = globals()[name] = __getattr__(ALIASES[name])
    elif name in NAMES:
        found = globals()[name] = _named(name)
    elif method := lacking().get(name):
        found = globals()[name] = class_of(method, __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found


def _named(name: str) -> Any:
    """A class of FusionBench's that runs on our ops, installed or not."""
    module, _, of_theirs = NAMES[name].rpartition(".")
    theirs = getattr(import_module(f"fusion_bench.method.{module}"), of_theirs)

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with accelerated():
            return theirs.run(self, *args, **kwargs)

    members = {"__module__": __name__, "__doc__": theirs.__doc__, "run": run, **routed.MEMBERS.get(name, {})}
    if "algorithm_config" in signature(theirs.__init__).parameters:
        members["__init__"] = _from_options(theirs)
    return type(name, (theirs,), members)


def _from_options(theirs: Any) -> Any:
    """FusionBench's older algorithms take a configuration, from `method.name`; by `_target_` there are options."""

    def __init__(self: Any, algorithm_config: Any = None, **options: Any) -> None:
        theirs.__init__(self, DictConfig(options) if algorithm_config is None else algorithm_config)

    return __init__


def main() -> None:
    """FusionBench's command with our ops."""
    from fusion_bench.scripts.cli import _hydra_main

    install()
    _hydra_main()
