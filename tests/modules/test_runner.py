"""The block runner against the model itself, with adapters attached to it."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery_kernels.modules.inputs import select
from surgery_kernels.modules.outputs import open_output
from surgery_kernels.modules.runner import BlockRunner, row_weights
from surgery_kernels.surgery import Sites, attach
from tests.encoders import CASES, Case, Encoder, made, perturbed, samples
from tests.surgery.test_attach import adapters_for, called, state_of

pytestmark = pytest.mark.any_isa


def corrected(runner: BlockRunner, inputs: Any, correct: Callable[[int, Tensor], Tensor], depth: int) -> Tensor:
    """The final representation where every stream is corrected before the next block."""
    begun = runner.start(inputs)
    stream = begun.stream
    for i in range(depth):
        stream = runner.batch_first(correct(i, runner.batch_first(runner.run(begun, i, stream))))
    return runner.finish(begun, stream)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@torch.no_grad()
def test_replays_are_the_model_with_adapters(case: Callable[[], Case]) -> None:
    it = made(case)
    before = state_of(it.model)
    adapters = adapters_for(it)
    adapters.up[-1].zero_()  # the runner ends before the last adapter
    sites = Sites(blocks=it.blocks)
    parts = [select(it.inputs, numbers) for numbers in (torch.arange(6), torch.tensor([4, 1]))]
    with attach(it.model, adapters) as surgery:
        wanted = [it.representation(called(surgery, inputs, task=1)) for inputs in parts]
    with BlockRunner("merged", it.model, sites) as runner:
        for inputs, of_model in zip(parts, wanted, strict=True):
            got = corrected(runner, inputs, lambda i, x: adapters(i, x, slice(1, 2)), len(it.blocks))
            plain = corrected(runner, inputs, lambda _, x: x, len(it.blocks))
            torch.testing.assert_close(plain, it.representation(called(it.model, inputs)), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(got, of_model, rtol=1e-5, atol=1e-5)
            assert not torch.allclose(got, plain, rtol=1e-2)
    assert state_of(it.model) == before


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@torch.no_grad()
def test_replays_under_autocast(case: Callable[[], Case]) -> None:
    it = made(case)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = it.representation(called(it.model, it.inputs)).float()
    with BlockRunner("merged", it.model, Sites(blocks=it.blocks), torch.bfloat16) as runner:
        got = corrected(runner, it.inputs, lambda _, x: x, len(it.blocks)).float()
    torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2)
    plain = it.representation(called(it.model, it.inputs))
    assert not torch.allclose(got, plain, rtol=1e-5, atol=1e-6)


class Numbered(nn.Module):
    """Blocks that are told their number and a mask by keyword."""

    def __init__(self, same: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.blocks = nn.ModuleList(Shifted() for _ in range(3))
        self.same = same
        self.passes = 0

    def forward(self, samples: Tensor) -> Tensor:
        self.passes += 1
        tokens, mask = self.embed(samples), samples[..., :1] > 0
        for i, block in enumerate(self.blocks):
            tokens = block(mask=mask, number=0 if self.same else i, tokens=tokens)
        return tokens.mean(1)


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.calls = 0

    def forward(self, mask: Tensor, number: int, tokens: Tensor) -> Tensor:
        self.calls += 1
        return tokens + torch.where(mask, self.linear(tokens), float(number))


@pytest.mark.parametrize("same", [True, False], ids=["alike", "each-its-own"])
@torch.no_grad()
def test_arguments_are_those_of_every_batch(same: bool) -> None:
    model = Numbered(same).eval()
    with BlockRunner("merged", model, Sites(blocks=("blocks.0", "blocks.1", "blocks.2"))) as runner:
        runner.start(samples(2, 5, 3))
        for seed in (1, 2):
            inputs = samples(4, 5, 3, seed=seed)
            last, first = model.blocks[2].calls, model.blocks[0].calls
            got = corrected(runner, inputs, lambda _, x: x, 3)
            # the pass for the arguments ends before the blocks, or goes past them
            assert (model.blocks[0].calls - first, model.blocks[2].calls - last) == (1, 1)
            torch.testing.assert_close(got, model(inputs))


class Skipping(Encoder):
    """The second block is given what the first was, too."""

    def forward(self, samples: Tensor) -> Tensor:
        tokens = first = self.embed(samples)
        for block in self.blocks:
            tokens = block(tokens)
        return self.head((tokens + first * self.blocks[0].linear.bias.sum())[:, 0])


class Reading(nn.Module):
    """A block that is told what the stream was before the last."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, tokens: Tensor, memory: Tensor) -> Tensor:
        return tokens + self.linear(memory)


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.blocks = nn.ModuleList(Reading() for _ in range(3))

    def forward(self, samples: Tensor) -> Tensor:
        tokens = memory = self.embed(samples)
        for block in self.blocks:
            tokens, memory = block(tokens, memory), tokens
        return tokens[:, 0]


class Between(Encoder):
    def forward(self, samples: Tensor) -> Tensor:
        tokens = self.embed(samples)
        for block in self.blocks:
            tokens = block(torch.relu(tokens))
        return self.head(tokens[:, 0])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            Remembering(),
            "merged must give the same when its blocks are called one by one, got other features: what a block is "
            "called with may depend on the tokens, or a block may remember",
        ),
        (
            Between(),
            "blocks of merged must be called with what the block before returned, got something else at 'blocks.1'",
        ),
    ],
    ids=["arguments-of-tokens", "between-blocks"],
)
def test_models_that_cannot_be_replayed(model: nn.Module, message: str) -> None:
    sites = Sites(blocks=tuple(f"blocks.{i}" for i in range(len(model.get_submodule("blocks")._modules))))
    before = state_of(model)
    with (
        pytest.raises(ValueError, match=f"^{re.escape(message)}$"),
        BlockRunner("merged", model, sites) as runner,
    ):
        runner.start(samples(4, 5, 3))
    assert state_of(model) == before


@torch.no_grad()
def test_what_is_around_the_blocks_may_use_what_was_before_them() -> None:
    model = Skipping().eval()
    inputs = samples(4, 5, 3)
    with BlockRunner("merged", model, Sites(blocks=("blocks.0", "blocks.1"))) as runner:
        torch.testing.assert_close(corrected(runner, inputs, lambda _, x: x, 2), model(inputs))


@torch.no_grad()
def test_a_decoder_with_a_cache() -> None:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
                         num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    model = LlamaModel(config).eval()
    assert config.use_cache
    ids = torch.arange(20).view(4, 5)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["attention_mask"][1, 3:] = 0
    with BlockRunner("merged", model, Sites(blocks=("layers.0", "layers.1", "layers.2"))) as runner:
        for _ in range(2):
            got = corrected(runner, inputs, lambda _, x: x, 3)
            torch.testing.assert_close(got, model(**inputs).last_hidden_state[:, 0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_calls_do_not_keep_the_tokens_of_their_pass() -> None:
    """Whoever replaces the stream may let the first go."""
    for case in CASES:
        it = made(case)
        with BlockRunner("merged", it.model, Sites(blocks=it.blocks)) as runner:
            begun = runner.start(it.inputs)
            kept = [value for call in begun.calls for value in (*call.args, *call.options.values())]
            assert not any(isinstance(x, Tensor) and x.shape == begun.stream.shape for x in kept), case.__name__


@torch.no_grad()
def test_what_it_found_out_keeps_no_tokens() -> None:
    """Neither those of the sample that it looked at, of every block."""
    for case in CASES:
        it = made(case)
        seen: list[weakref.ref[Tensor]] = []

        def see(_: nn.Module, __: Any, output: Any, seen: list[weakref.ref[Tensor]] = seen) -> None:
            seen.append(weakref.ref(open_output(output, "").tensor))

        for name in it.blocks:
            it.model.get_submodule(name).register_forward_hook(see)
        with BlockRunner("merged", it.model, Sites(blocks=it.blocks)) as runner:
            runner.start(it.inputs)
            found_out = seen[: 3 * len(it.blocks)]
            assert not any(tokens() is not None for tokens in found_out), case.__name__


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@torch.no_grad()
def test_what_is_known_of_one_model_does_for_another(case: Callable[[], Case]) -> None:
    it = made(case)
    expert = perturbed(it.model, 1)
    runs: list[Any] = []
    for name in it.blocks:
        expert.get_submodule(name).register_forward_pre_hook(lambda *_: runs.append(1))
    sites = Sites(blocks=it.blocks)
    with BlockRunner("merged", it.model, sites) as runner, BlockRunner("expert", expert, sites) as other:
        runner.start(it.inputs)
        other.knows(runner)
        got = corrected(other, it.inputs, lambda _, x: x, len(it.blocks))
    # the calls that start and those that finish go past the blocks; to find things out takes three more of each
    assert sum(runs) <= 3 * len(it.blocks)
    torch.testing.assert_close(got, it.representation(called(expert, it.inputs)), rtol=1e-5, atol=1e-5)


def test_row_weights_are_the_attention_mask() -> None:
    features, mask = torch.zeros(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]])
    weights = row_weights({"input_ids": mask, "attention_mask": mask}, features)
    assert weights is not None and torch.equal(weights, mask.float())
    assert row_weights({"input_ids": mask}, features) is None
    assert row_weights(features, features) is None
    message = r"^attention_mask must be \[batch, tokens\] of the blocks, \[2, 3\], got \[2, 2\]$"
    with pytest.raises(ValueError, match=message):
        row_weights({"attention_mask": mask[:, :2]}, features)
