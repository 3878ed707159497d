"""Residual targets against their formulas, and which layers write to a stream."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery_kernels.surgery import calibrate, representation_bias
from surgery_kernels.surgery.calibrate import calibration
from tests.encoders import CASES, Encoder, made, perturbed, samples
from tests.fits import refusal
from tests.surgery.calibrate import formulas
from tests.surgery.calibrate.models import TASKS, encoder_of, family

pytestmark = pytest.mark.any_isa

DEFAULTS = {"lam": 1e-3, "anchor": 1.0, "teacher": 1.0, "residual": True, "order": "layer"}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lam": 0.05, "anchor": 2.0, "teacher": 0.3},
        {"order": "block", "unread_weight": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("batch_size", [3, 16])
def test_the_formulas(models: Any, options: dict[str, Any], batch_size: int) -> None:
    merged, base, experts, batches = models
    expected = formulas.featcal(merged, base.state_dict(), experts, batches, **{**DEFAULTS, **options})
    result = calibrate(merged, base, experts, batches, residual=True, batch_size=batch_size, progress=False, **options)
    for name, value in expected.items():
        torch.testing.assert_close(result.state[name], value, rtol=1e-8, atol=1e-8, msg=name)


def test_it_comes_nearer_to_the_expert_than_the_published_targets(models: Any) -> None:
    merged, base, experts, batches = models
    biases = []
    for residual in (False, True):
        state = calibrate(
            merged, base, experts, batches, lam=1e-3, anchor=1.0, teacher=1.0, order="layer", residual=residual,
            progress=False,
        ).state  # fmt: skip
        calibrated = perturbed(merged, 0, 0.0)
        calibrated.load_state_dict(state)
        biases.append([representation_bias(calibrated, experts[task], batches[task])[""] for task in TASKS])
    assert sum(biases[1]) < sum(biases[0])


def writers_of(model: nn.Module, inputs: Any, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    found: list[dict[str, str]] = []
    look = calibration.find_writers

    def spy(*arguments: Any) -> Any:
        writers = look(*arguments)
        found.append({name: writer.after for name, writer in writers.items()})
        return writers

    monkeypatch.setattr(calibration, "find_writers", spy)
    calibrate(model, model, {"a": perturbed(model, 1, 0.01)}, {"a": inputs}, residual=True, progress=False)
    return found


WRITERS = {  # of the first block: what gets the sum
    "clip": {
        "vision_model.encoder.layers.0.self_attn.out_proj": "vision_model.encoder.layers.0.layer_norm2",
        "vision_model.encoder.layers.0.mlp.fc2": "",
    },
    "bert": {  # normalised behind each sum
        "encoder.layer.0.attention.output.dense": "encoder.layer.0.attention.output.LayerNorm",
        "encoder.layer.0.output.dense": "encoder.layer.0.output.LayerNorm",
    },
    "timm": {"blocks.0.attn.proj": "blocks.0.norm2", "blocks.0.mlp.fc2": ""},
    "open_clip_token_major": {
        "transformer.resblocks.0.attn.out_proj": "transformer.resblocks.0.ln_2",
        "transformer.resblocks.0.mlp.c_proj": "",
    },
}


@pytest.mark.parametrize("name", WRITERS)
def test_layers_that_add_to_the_stream_are_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    it = made(next(case for case in CASES if case.__name__ == name))
    found = writers_of(it.model, it.inputs, monkeypatch)
    assert len(found) == 2 and found[0] == WRITERS[name]


class Parallel(nn.Module):
    """Both branches start from the same tokens, and are added at once."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(x)
        return x + self.first(z) + self.second(torch.tanh(self.inner(z)))


def test_branches_in_parallel(monkeypatch: pytest.MonkeyPatch) -> None:
    found = writers_of(encoder_of(Parallel), samples(6, 5, 3).double(), monkeypatch)
    assert found[0] == {"blocks.0.first": "", "blocks.0.second": ""}


def test_a_model_whose_layers_add_nothing_is_refused() -> None:
    merged, base, experts = family(Encoder().double().eval())
    batches = {task: samples(4, 5, 3).double() for task in TASKS}
    message = "residual must be False where no layer adds to the stream, got True for 'blocks.0'"
    assert refusal(lambda: calibrate(merged, base, experts, batches, residual=True, progress=False)) == message
