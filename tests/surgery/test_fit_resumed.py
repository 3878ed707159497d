"""A fit stopped and resumed, and features kept on disk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery_kernels.surgery import Fit
from tests.cases import assert_same, bits
from tests.encoders import perturbed
from tests.fits import BATCH, TASKS, VARIANTS, Samples, fitted, refusal

pytestmark = pytest.mark.any_isa


@contextlib.contextmanager
def interrupted() -> Iterator[None]:
    with pytest.raises(KeyboardInterrupt):
        yield


@pytest.mark.parametrize("variant", VARIANTS)
def test_resume(
    merged: nn.Module, experts: dict[str, nn.Module], batches: dict[str, Tensor], tmp_path: Path, variant: str
) -> None:
    """Interrupted, or given more steps, the result has the same bits; the log too."""
    mode, options, _ = VARIANTS[variant]
    expected = fitted(merged, experts, batches, mode, steps=10, **options)
    options = {**options, "checkpoint": tmp_path / "runs" / "fit.pt", "checkpoint_every": 4}
    results = []
    if mode == "v2":
        # Targets take 3 samples, every one of the 10 steps 4: the sixth step fails, after a checkpoint at the fourth.
        failing = {**batches, "cars": Samples(batches["cars"], fails_at=1 + 3 + 5 * BATCH + 2)}
        with interrupted():
            fitted(merged, experts, failing, mode, steps=10, **options)
        assert torch.load(options["checkpoint"])["step"] == 4
        results.append(fitted(merged, experts, batches, mode, steps=10, **options))
    for steps in (7, 10, 10):
        results.append(fitted(merged, experts, batches, mode, steps=steps, resume=steps != 7, **options))
    assert_same(results.pop(-3).log.bias, expected.log.bias[:7])
    for result in results:
        assert_same(result.log.bias, expected.log.bias)
        for actual, adapter in zip(result.adapters.parameters(), expected.adapters.parameters(), strict=True):
            assert torch.equal(bits(actual.detach()), bits(adapter.detach()))
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["fit.pt"]
    with pytest.raises(ValueError, match=r"^steps must be 10 or greater, as in checkpoint, got 9$"):
        fitted(merged, experts, batches, mode, steps=9, **options)
    with pytest.raises(ValueError, match=r"^checkpoint must be of a fit with seed=6, got 5$"):
        fitted(merged, experts, batches, mode, steps=10, **{**options, "seed": 6})
    with pytest.raises(ValueError, match=r"^checkpoint must be of a fit with merged='\w+', got '\w+'$"):
        fitted(perturbed(merged, 9), experts, batches, mode, steps=10, **options)
    with pytest.raises(ValueError, match=r"^checkpoint must be of a fit with experts\['cars'\]='\w+', got '\w+'$"):
        fitted(merged, {**experts, "cars": experts["dtd"]}, batches, mode, steps=10, **options)
    reordered = {task: experts[task] for task in sorted(TASKS)}
    message = "checkpoint must be of a fit with tasks=['cars', 'dtd', 'mnist'], got ['mnist', 'cars', 'dtd']"
    assert refusal(lambda: fitted(merged, reordered, batches, mode, steps=10, **options)) == message


def test_a_checkpoint_that_is_none(
    merged: nn.Module, experts: dict[str, nn.Module], batches: dict[str, Tensor], tmp_path: Path
) -> None:
    (tmp_path / "text").write_text("text")
    (tmp_path / "empty").touch()
    torch.save([1], tmp_path / "list")
    torch.save({"step": 1}, tmp_path / "other")
    for path in (tmp_path, *tmp_path.iterdir()):
        message = refusal(lambda path=path: fitted(merged, experts, batches, "v1", checkpoint=path))
        assert message == f"checkpoint must be a file written by fit, got {str(path)!r}"


@pytest.mark.parametrize("mode", ["v1", "v2"])
def test_features_on_disk(
    merged: nn.Module, experts: dict[str, nn.Module], batches: dict[str, Tensor], tmp_path: Path, mode: str
) -> None:
    expected = fitted(merged, experts, batches, mode)
    runs: list[str] = []

    def result(**changed: Any) -> Fit:
        runs.clear()
        handles = [
            model.register_forward_pre_hook(lambda _, __, task=task: runs.append(task))
            for task, model in experts.items()
        ]
        made = fitted(merged, experts, changed.pop("batches", batches), mode, cache=tmp_path, **changed)
        for handle in handles:
            handle.remove()
        return made

    for ran in (TASKS, []):
        assert_same(result().log.bias, expected.log.bias)
        assert sorted(set(runs)) == sorted(ran)
    names = [
        f"{what} of {task}" for task in TASKS for what in (["features", "targets"] if mode == "v1" else ["targets"])
    ]
    assert sorted(path.stem for path in tmp_path.glob("*.npy")) == sorted(name.replace(" ", "%20") for name in names)

    experts["cars"].head.bias.data += 1
    assert not torch.equal(result().log.bias, expected.log.bias)
    assert set(runs) == {"cars"}
    result(batches={**batches, "dtd": batches["dtd"] + 1})
    assert set(runs) == {"dtd"}
    result(batches={**batches, "dtd": batches["dtd"] + 1}, steps=5)
    assert set(runs) == {"dtd"}  # of the others, five steps use the samples of six
    (tmp_path / "targets%20of%20mnist.json").unlink()  # as if interrupted while it was written
    result(batches={**batches, "dtd": batches["dtd"] + 1}, steps=5)
    assert set(runs) == {"mnist"}
