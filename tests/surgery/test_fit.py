"""fit against the method written out: one task after another, plain autograd and Adam, no hooks."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery_kernels import reference
from surgery_kernels.merging.progress import counting_bar
from surgery_kernels.surgery import SurgeryAdapters, attach, fit
from surgery_kernels.surgery.batches import sample_order
from tests.cases import assert_same
from tests.encoders import CASES, NUM_FEATURES, WIDTH, Case, Encoder, made, perturbed, samples
from tests.fits import BATCH, POOLS, RANK, TASKS, VARIANTS, Samples, fitted

pytestmark = pytest.mark.any_isa


def started(task: str, mode: str, dtype: torch.dtype = torch.float64) -> SurgeryAdapters:
    widths = (
        {"blocks.0": WIDTH, "blocks.1": WIDTH, "blocks.2": WIDTH, "": NUM_FEATURES}
        if mode == "v2"
        else {"": NUM_FEATURES}
    )
    return SurgeryAdapters(1, widths, RANK, tasks=[task], dtype=dtype, seed=5)


def representations(
    model: nn.Module, x: Tensor, adapters: SurgeryAdapters | None, detach: bool = False
) -> list[Tensor]:
    """The encoder's forward pass written out, with the adapters of SurgeryV2 or none."""

    def corrected(site: int, y: Tensor) -> Tensor:
        if adapters is None:
            return y
        return y - (y @ adapters.down[site][0].T).relu() @ adapters.up[site][0].T

    tokens, found = model.embed(x), []
    for site, block in enumerate(model.blocks):
        tokens = corrected(site, block(tokens))
        found.append(tokens.mean(dim=1))
        tokens = tokens.detach() if detach else tokens
    return [*found, corrected(len(found), model.head(tokens[:, 0]))]


def written_out(
    merged: nn.Module, expert: nn.Module, x: Tensor, task: str, mode: str, *, zero_steps: int = 0, detach: bool = False
) -> tuple[SurgeryAdapters, Tensor]:
    """Six steps of one task; the bias by step and site."""
    merged.eval(), expert.eval()
    adapters = started(task, mode)
    optimizer = torch.optim.Adam(adapters.parameters(), lr=0.01)
    log = []
    for numbers in sample_order(5, task, len(x), 6, BATCH):
        targets = [target.detach() for target in representations(expert, x[numbers], None)]
        if mode == "v1":
            h = representations(merged, x[numbers], None)[-1].detach()
            features = [h - (h @ adapters.down[0][0].T).relu() @ adapters.up[0][0].T]
        else:
            features = representations(merged, x[numbers], adapters, detach)
        targets = targets[-len(features) :]
        losses = torch.stack([(f - r).abs().mean() for f, r in zip(features, targets, strict=True)])
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        for _ in range(zero_steps):
            optimizer.zero_grad(set_to_none=False)
            optimizer.step()
        log.append(losses.detach())
    return adapters, torch.stack(log)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_method_written_out(
    merged: nn.Module, experts: dict[str, nn.Module], batches: dict[str, Tensor], variant: str
) -> None:
    """All tasks in one batch, through hooks and fused ops, are the tasks one after another."""
    mode, options, written = VARIANTS[variant]
    result = fitted(merged, experts, batches, mode, **options)
    assert result.log.tasks == tuple(TASKS)
    assert result.log.sites == (("blocks.0", "blocks.1", "blocks.2", "") if mode == "v2" else ("",))
    for t, task in enumerate(TASKS):
        expected, bias = written_out(merged, experts[task], batches[task], task, mode, **written)
        assert_same(result.log.bias[:, t], result.log.bias[:, t].float())
        torch.testing.assert_close(result.log.bias[:, t], bias.float())
        for actual, adapter in zip(result.adapters.parameters(), expected.parameters(), strict=True):
            assert_close(actual[t], adapter[0])
    assert all((up != 0).any() for up in result.adapters.up)
    assert result.log.bias[-1].mean() < result.log.bias[0].mean()


@pytest.mark.parametrize("mode", ["v1", "v2"])
def test_a_task_learns_the_same_alone(
    merged: nn.Module, experts: dict[str, nn.Module], batches: dict[str, Tensor], mode: str
) -> None:
    together = fitted(merged, experts, batches, mode)
    alone = fitted(merged, {"dtd": experts["dtd"]}, {"dtd": batches["dtd"]}, mode)
    for of_all, of_one in zip(together.adapters.parameters(), alone.adapters.parameters(), strict=True):
        assert_close(of_all[2], of_one[0])


def test_legacy_is_an_optimizer_that_tasks_take_turns_at(
    merged: nn.Module, experts: dict[str, nn.Module], batches: dict[str, Tensor]
) -> None:
    """One Adam for all tasks whose gradients are zeroed, not dropped, as torch < 2 did."""
    result = fitted(merged, experts, batches, "v1", legacy_zero_grad=True)
    adapters = {task: started(task, "v1") for task in TASKS}
    optimizer = torch.optim.Adam([p for task in TASKS for p in adapters[task].parameters()], lr=0.01)
    merged.eval()
    for step in range(6):
        for t, task in enumerate(TASKS):
            x = batches[task][sample_order(5, task, POOLS[task], 6, BATCH)[step]]
            target = representations(experts[task].eval(), x, None)[-1].detach()
            h = representations(merged, x, None)[-1].detach()
            loss = (reference.surgery_adapter(h[None], adapters[task].down[0], adapters[task].up[0])[0] - target).abs()
            torch.testing.assert_close(result.log.bias[step, t, 0], loss.mean().detach().float())
            optimizer.zero_grad(set_to_none=False)
            loss.mean().backward()
            optimizer.step()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("mode", ["v1", "v2"])
def test_models_of_every_kind_come_closer_to_their_experts(case: Callable[[], Case], mode: str) -> None:
    it = made(case)
    names = ["a", "b"]
    expert_models = {name: perturbed(it.model, seed, 0.05) for seed, name in enumerate(names)}
    result = fit(
        it.model, expert_models, dict.fromkeys(names, it.inputs), mode,
        rank=8, steps=40, batch_size=6, lr=0.01, progress=False,
    )  # fmt: skip
    assert result.adapters.tasks == ("a", "b")
    first, last = result.log.bias[0, :, -1], result.log.bias[-1, :, -1]
    assert (last < 0.8 * first).all()

    def run(model: nn.Module, **options: Any) -> Tensor:
        with torch.no_grad():
            return it.representation(
                model(**it.inputs, **options) if case.__name__ == "bert" else model(it.inputs, **options)
            )

    with attach(it.model, result.adapters) as surgery:
        for task, expert in expert_models.items():
            target = run(expert.eval())
            assert (run(surgery, task=task) - target).abs().mean() < (run(it.model) - target).abs().mean()


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 12])
def test_token_major_models_learn_the_same(merged: nn.Module, experts: dict[str, nn.Module], num_tokens: int) -> None:
    """Also with batches as long as their samples have tokens: 12 in a step, 3 at the end of a pool."""
    batches = {task: samples(size, num_tokens, 3, seed=size).double() for task, size in POOLS.items()}

    def token_major(model: nn.Module) -> nn.Module:
        turned = Encoder(depth=3, token_major=True).double()
        turned.load_state_dict(model.state_dict())
        return turned

    turned = {task: token_major(expert) for task, expert in experts.items()}
    actual = fitted(token_major(merged), turned, batches, "v2")
    assert_close(actual.log.bias, fitted(merged, experts, batches, "v2").log.bias)


def test_v1_and_v2_see_the_same_samples() -> None:
    """A function of seed, task and step: shuffled per epoch, the same for more steps."""
    order = sample_order(5, "mnist", 11, 6, BATCH)
    assert order.shape == (6, BATCH)
    assert order.dtype == torch.int64
    flat = order.flatten()
    for epoch in (flat[:11], flat[11:22]):
        assert sorted(epoch.tolist()) == list(range(11))
    assert not torch.equal(flat[:11], flat[11:22])
    assert_same(sample_order(5, "mnist", 11, 60, BATCH)[:6], order)
    assert not torch.equal(sample_order(6, "mnist", 11, 6, BATCH), order)
    assert not torch.equal(sample_order(5, "cars", 11, 6, BATCH), order)
    assert sorted(sample_order(0, "a", 2, 1, 4).flatten().tolist()) == [0, 0, 1, 1]


@pytest.mark.parametrize("mode", ["v1", "v2"])
def test_the_models_are_as_before(
    merged: nn.Module, experts: dict[str, nn.Module], batches: dict[str, Tensor], mode: str
) -> None:
    merged.train()
    merged.blocks[1].eval()
    merged.head.bias.requires_grad_(False)
    experts["cars"].train()

    def state() -> list[object]:
        models = [merged, *experts.values()]
        return [
            [
                (module.training, dict(module._forward_hooks), dict(module._forward_pre_hooks))
                for module in model.modules()
            ]
            + [(p.requires_grad, p.grad) for p in model.parameters()]
            for model in models
        ]

    before = state()
    fitted(merged, experts, batches, mode)
    assert state() == before
    wrong = {**batches, "cars": torch.full((4, 5, 3), math.nan, dtype=torch.float64)}
    with pytest.raises(ValueError, match="NaN"):
        fitted(merged, experts, wrong, mode)
    assert state() == before
    with pytest.raises(KeyboardInterrupt):
        fitted(merged, experts, {**batches, "cars": Samples(batches["cars"], fails_at=4)}, mode)
    assert state() == before


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("mode", ["v1", "v2"])
def test_gradients_may_be_off_outside(
    merged: nn.Module, experts: dict[str, nn.Module], batches: dict[str, Tensor], mode: str, off: Callable[[], Any]
) -> None:
    expected = fitted(merged, experts, batches, mode).log.bias
    with off():
        result = fitted(merged, experts, {task: x.clone() for task, x in batches.items()}, mode)
    assert_same(result.log.bias, expected)
    assert not any(parameter.is_inference() for parameter in result.adapters.parameters())


@pytest.mark.parametrize("mode", ["v1", "v2"])
def test_autocast(merged: nn.Module, experts: dict[str, nn.Module], batches: dict[str, Tensor], mode: str) -> None:
    low = {task: x.float() for task, x in batches.items()}
    experts = {task: expert.float() for task, expert in experts.items()}
    expected = fitted(merged.float(), experts, low, mode)
    actual = fitted(merged, experts, low, mode, autocast=torch.bfloat16)
    assert actual.adapters.down[0].dtype == torch.float32
    assert not torch.equal(actual.log.bias, expected.log.bias)
    torch.testing.assert_close(actual.log.bias, expected.log.bias, rtol=0.1, atol=0.02)
    assert not torch.is_autocast_enabled("cpu")


def test_progress(
    merged: nn.Module, experts: dict[str, nn.Module], batches: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    fitted(merged, experts, batches, "v2", progress=False)
    assert capsys.readouterr().err == ""
    fitted(merged, experts, batches, "v2", progress=True)
    shown_text = capsys.readouterr().err
    assert re.search(r"surgery: 100%.* 6/6 .*loss=\d", shown_text)
    assert "features: 100%" in shown_text
    with counting_bar(6, "surgery", "step", shown=None) as bar:
        assert bar.delay == 2
