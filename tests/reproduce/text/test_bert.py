"""The encoder against that of transformers, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch

from surgery_kernels.reproduce.errors import InputError
from surgery_kernels.reproduce.text.bert import Shape, load_encoder
from surgery_kernels.surgery import find_sites
from tests.text_packages import tiny_encoder, tiny_shape

pytestmark = pytest.mark.any_isa


def test_it_is_the_mean_of_berts_hidden_states() -> None:
    from transformers import BertConfig, BertModel

    shape = tiny_shape()
    torch.manual_seed(1)
    theirs = BertModel(BertConfig(**vars(shape))).eval()
    ours = load_encoder(shape, theirs.state_dict())
    ids = torch.randint(shape.vocab_size, (3, 9))
    mask = torch.arange(9).expand(3, 9) < torch.tensor([[9], [4], [1]])
    with torch.no_grad():
        hidden = theirs(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        for row, length in enumerate((9, 4, 1)):
            torch.testing.assert_close(ours(ids, mask.long())[row], hidden[row, :length].mean(0))
    left_out = set(theirs.state_dict()) - set(ours.state_dict())
    assert left_out == {"pooler.dense.weight", "pooler.dense.bias"}


def test_surgery_finds_its_blocks() -> None:
    assert find_sites(tiny_encoder(), "v2").names == ("encoder.layer.0", "encoder.layer.1", "")


def test_parameters_must_be_there() -> None:
    state = tiny_encoder().state_dict()
    name = "encoder.layer.1.output.dense.bias"
    for changed, got in (({}, "no such tensor"), ({name: torch.zeros(3)}, "[3]")):
        without = {key: x for key, x in state.items() if key != name} | changed
        with pytest.raises(InputError) as raised:
            load_encoder(tiny_shape(), without)
        assert str(raised.value) == f"the encoder must have {name} of shape [16], got {got}"


def test_other_architectures_are_refused() -> None:
    config = {**vars(tiny_shape()), "model_type": "bert"}
    assert Shape.read(json.dumps(config).encode()) == tiny_shape()
    with pytest.raises(InputError) as raised:
        Shape.read(json.dumps({**config, "hidden_act": "relu"}).encode())
    assert str(raised.value) == "config.json must have hidden_act 'gelu', got 'relu'"
