"""V2's steps without the blocks whose output never changes: the same training, and those blocks at rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery_kernels.surgery import Fit, Sites
from surgery_kernels.surgery.gradient import early
from tests.encoders import CASES, Case, Encoder, made, perturbed, samples
from tests.fits import TASKS, Samples, fitted

pytestmark = pytest.mark.any_isa


def passes_of(block: nn.Module, run: Callable[[], Fit]) -> tuple[Fit, int]:
    """What it gives, and how often the block itself took part."""
    count = []
    handle = next(block.children()).register_forward_hook(lambda *_: count.append(1))
    result = run()
    handle.remove()
    return result, len(count)


def trained(it: Case, **options: Any) -> Fit:
    experts = {task: perturbed(it.model, seed, 0.05) for seed, task in enumerate(TASKS)}
    return fitted(it.model, experts, dict.fromkeys(TASKS, it.inputs), "v2", **options)


def doubled(it: Case) -> Case:
    """In float64, where roundings do not turn the sign of a small gradient."""
    it.model.double()
    return replace(it, inputs=it.inputs.double() if isinstance(it.inputs, Tensor) else it.inputs)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_every_model(case: Callable[[], Case], monkeypatch: pytest.MonkeyPatch) -> None:
    it = doubled(made(case))
    block = it.model.get_submodule(it.blocks[0])
    forward = vars(block).get("forward")
    (_, few), (kept, more) = (passes_of(block, lambda steps=steps: trained(it, steps=steps)) for steps in (4, 9))
    assert vars(block).get("forward") is forward
    # whose blocks give more than tokens, which nothing stands in for
    assert more - few == (5 if case.__name__ == "own_with_tuples" else 0)
    monkeypatch.setattr(early, "MEMORY", 0)
    plain, all_passes = passes_of(block, lambda: trained(it, steps=9))
    assert all_passes >= 9
    torch.testing.assert_close(kept.log.bias, plain.log.bias, rtol=1e-4, atol=1e-6)


class Counting(Encoder):
    def __init__(self, depth: int) -> None:
        super().__init__(depth=depth)
        self.seen = [0] * depth
        for i, block in enumerate(self.blocks):
            block.linear.register_forward_hook(lambda *_, i=i: self.seen.__setitem__(i, self.seen[i] + 1))


@pytest.mark.parametrize("data", [lambda x: x, Samples], ids=["tensor", "dataset"])
def test_blocks_before_the_first_site_rest(data: Callable[[Tensor], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = Counting(4).double()
    sites = Sites(blocks=("blocks.2", "blocks.3"))
    experts, batches = {"a": perturbed(model, 1)}, {"a": data(samples(9, 5, 3).double())}
    for expert in experts.values():
        expert.seen = [0] * 4

    def run(steps: int) -> Fit:
        model.seen = [0] * 4
        return fitted(model, experts, batches, "v2", steps=steps, sites=sites)

    run(4)
    few = list(model.seen)
    result = run(24)
    assert [more - less for more, less in zip(model.seen, few, strict=True)] == [0, 0, 0, 20]
    monkeypatch.setattr(early, "MEMORY", 0)
    torch.testing.assert_close(run(24).log.bias, result.log.bias, rtol=1e-4, atol=1e-6)
    assert min(model.seen) >= 24


class Told(nn.Module):
    """A block that is told by another module what the first block saw."""

    def __init__(self, memory: list[Tensor], writes: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.memory, self.writes = memory, writes

    def forward(self, tokens: Tensor) -> Tensor:
        if self.writes:
            self.memory[:] = [tokens]
        return tokens + self.linear(tokens) + self.memory[0].mean(1, keepdim=True)


class Behind(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        memory: list[Tensor] = []
        self.embed = nn.Linear(3, 8)
        self.blocks = nn.ModuleList(Told(memory, i == 0) for i in range(3))

    def forward(self, samples: Tensor) -> Tensor:
        tokens = self.embed(samples)
        for block in self.blocks:
            tokens = block(tokens)
        return tokens[:, 0]


def test_a_model_that_needs_its_first_block_runs_it() -> None:
    model = Behind()
    run = lambda: fitted(model, {"a": model.state_dict()}, {"a": samples(9, 5, 3)}, "v2", steps=20, lr=1e-12)  # noqa: E731
    result, count = passes_of(model.blocks[0], run)
    assert result.log.bias.max() < 1e-6  # were it told of another sample, it would not be its own expert
    assert count > 20


def test_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Encoder(depth=3)
    run = lambda: trained(Case(model, samples(6, 5, 3), (), 12), autocast=torch.bfloat16, steps=20, lr=1e-4)  # noqa: E731
    kept, few = passes_of(model.blocks[0], run)
    monkeypatch.setattr(early, "MEMORY", 0)
    plain, many = passes_of(model.blocks[0], run)
    torch.testing.assert_close(kept.log.bias, plain.log.bias, rtol=5e-2, atol=2e-3)
    assert few < 20 <= many
