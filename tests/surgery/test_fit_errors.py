"""What fit refuses, and how it says so."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery_kernels.surgery import Sites, attach
from tests.encoders import Encoder, samples
from tests.fits import fitted, refusal

pytestmark = pytest.mark.any_isa

NAN = torch.full((4, 5, 3), math.nan, dtype=torch.float64)
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"mode": "v3"}, "mode must be one of 'v1', 'v2', got 'v3'"),
    ({"rank": 0}, "rank must be 1 or greater, got 0"),
    ({"steps": 0}, "steps must be 1 or greater, got 0"),
    ({"steps": 1.5}, "steps must be an integer, got 1.5"),
    ({"batch_size": 0}, "batch_size must be 1 or greater, got 0"),
    ({"checkpoint_every": 0}, "checkpoint_every must be 1 or greater, got 0"),
    ({"lr": 0.0}, "lr must be finite and greater than 0, got 0.0"),
    ({"lr": math.inf}, "lr must be finite and greater than 0, got inf"),
    ({"lr": math.nan}, "lr must be finite and greater than 0, got nan"),
    ({"num_workers": -1}, "num_workers must be 0 or greater, got -1"),
    ({"autocast": "bfloat16"}, "autocast must be bfloat16, float16 or None, got 'bfloat16'"),
    ({"autocast": torch.float32}, "autocast must be bfloat16, float16 or None, got torch.float32"),
    ({"mode": "v1", "detach_layers": True}, "detach_layers must be False with mode='v1', got True"),
    ({"experts": {}}, "experts must be of at least one task, got none"),
    ({"experts": [Encoder()]}, "experts must be a mapping from names of tasks, got list"),
    ({"experts": {1: Encoder(), 2: Encoder()}}, "experts must be a mapping from names of tasks, got [1, 2]"),
    ({"batches": [samples(4, 5, 3)]}, "batches must be a mapping from names of tasks, got list"),
    ({"without": "experts"}, "experts must have one for every task of batches, got none for 'cars'"),
    ({"without": "batches"}, "batches must have samples for every task of experts, got none for 'cars'"),
    ({"cars": torch.empty(0, 5, 3)}, "batches['cars'] must hold at least one sample, got none"),
    ({"cars": []}, "batches['cars'] must hold at least one sample, got none"),
    (
        {"cars": 3},
        "batches['cars'] must be a tensor, a mapping of tensors, a dataset or an iterable of batches, got int",
    ),
    (
        {"cars": ["x"]},
        "batches['cars'] must be tensors, tuples that start with one or mappings of tensors, got str",
    ),
    (
        {"cars": [samples(4, 5, 3), samples(4, 6, 3)]},
        "batches['cars'] must hold samples of one shape, got (5, 3) and (6, 3)",
    ),
    (
        {"cars": (samples(4, 5, 3), torch.zeros(4))},  # a pair of inputs and labels is no list of batches
        "batches['cars'] must hold samples of one shape, got (5, 3) and ()",
    ),
    (
        {"cars": {"samples": samples(4, 5, 3), "mask": torch.ones(3, 5)}},
        "batches['cars'] must be tensors with a row per sample each, got {'samples': (4, 5, 3), 'mask': (3, 5)}",
    ),
    ({"cars": samples(4, 6, 3)}, "batches['cars'] must hold samples like those of 'mnist', (5, 3), got (6, 3)"),
    ({"cars": NAN}, "targets of task 'cars' at site 'blocks.0' must be finite, got NaN"),
    ({"cars": NAN, "mode": "v1"}, "features of task 'cars' at site '' must be finite, got NaN"),
    (
        {"cars": torch.full((4, 5, 3), math.inf, dtype=torch.float64), "mode": "v1"},
        "features of task 'cars' at site '' must be finite, got NaN",
    ),
    ({"expert": 3}, "experts['cars'] must be a module or a state dict, got int"),
    (
        {"expert": Encoder(depth=3, width=8).double()},
        "targets of task 'cars' at site 'blocks.0' must have the width of the merged model, 16, got 8",
    ),
    (
        {"expert": Encoder(depth=3, num_features=7).double(), "mode": "v1"},
        "targets of task 'cars' at site '' must have the width of the merged model, 12, got 7",
    ),
    ({"sites": Sites()}, "sites must have at least one block with mode='v2', got 0"),
    ({"sites": Sites(blocks=("blocks.0",)), "mode": "v1"}, "sites must have no blocks with mode='v1', got 1"),
    ({"sites": Sites(blocks=("blocks.7",))}, "sites must be names of modules of merged, got 'blocks.7'"),
    ({"sites": Sites(blocks=("blocks.0", "blocks.0"))}, "sites must be different modules, got 'blocks.0' twice"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=[message for _, message in WRONG])
def test_refused(
    merged: nn.Module,
    experts: dict[str, Any],
    batches: dict[str, Any],
    wrong: dict[str, Any],
    message: str,
) -> None:
    options = {"mode": "v2", **wrong}
    if "cars" in options:
        batches["cars"] = options.pop("cars")
    if "expert" in options:
        experts["cars"] = options.pop("expert")
    missing = options.pop("without", None)
    if missing:
        del {"experts": experts, "batches": batches}[missing]["cars"]
    experts, batches = options.pop("experts", experts), options.pop("batches", batches)
    assert refusal(lambda: fitted(merged, experts, batches, **options)) == message


def test_an_expert_of_another_architecture(
    merged: nn.Module, experts: dict[str, Any], batches: dict[str, Tensor]
) -> None:
    experts["cars"] = Encoder(depth=2).state_dict()
    message = refusal(lambda: fitted(merged, experts, batches, "v2"))
    assert message.startswith("experts['cars'] must be a state dict of the merged model, got ")
    assert "blocks.2.linear.weight" in message
    experts["cars"] = Encoder(depth=2).double()
    message = refusal(lambda: fitted(merged, experts, batches, "v2"))
    assert message == "sites must be names of modules of experts['cars'], got 'blocks.2'"


def test_a_merged_model_with_adapters(merged: nn.Module, experts: dict[str, Any], batches: dict[str, Tensor]) -> None:
    result = fitted(merged, experts, batches, "v1")
    with attach(merged, result.adapters):
        message = refusal(lambda: fitted(merged, experts, batches, "v1"))
    assert message == "merged must be without adapters, got one with adapters attached: detach them first"


def test_a_block_that_is_skipped(merged: nn.Module, experts: dict[str, Any], batches: dict[str, Tensor]) -> None:
    for model in (merged, *experts.values()):
        model.unused = nn.Linear(2, 2)
    sites = Sites(blocks=("blocks.0", "unused"))
    message = refusal(lambda: fitted(merged, experts, batches, "v2", sites=sites))
    assert message == "site 'unused' must run once in a forward pass, got none"


def test_training_that_diverges(merged: nn.Module, experts: dict[str, Any], batches: dict[str, Tensor]) -> None:
    message = refusal(lambda: fitted(merged, experts, batches, "v2", lr=1e300))
    assert re.fullmatch(r"features of task '\w+' at site '[\w.]*' must be finite, got (NaN|infinity)", message)
