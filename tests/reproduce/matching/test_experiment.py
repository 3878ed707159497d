"""Networks of different initialisation on the digits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from surgery_kernels.reproduce.__main__ import main
from surgery_kernels.reproduce.digits.tasks import load_splits
from surgery_kernels.reproduce.matching import experiment
from surgery_kernels.reproduce.matching.networks import NETWORKS, perceptron, trained

pytestmark = pytest.mark.any_isa


def test_matching_is_better_than_averaging_and_least_squares_than_matching() -> None:
    (images, labels), test = ((split.images[0], split.labels) for split in load_splits(seed=0, test_fraction=0.3))
    halves = [labels < 5, labels >= 5]
    pair = [trained(perceptron, images[rows], labels[rows], steps=150, seed=i) for i, rows in enumerate(halves)]
    found = {}
    for row, merged in experiment.merges(pair[0], pair[1], images, heads=("5",)):
        right = [
            experiment.accuracy(merged.use_heads(which), *(part[rows] for part in test))
            for which, rows in enumerate((test[1] < 5, test[1] >= 5))
        ]
        found[row] = sum(right) / 2
    alone = 95.0
    matched = found["Git Re-Basin, by weights"]
    assert found["average"] + 5 < matched < found["PLeaS, 1 x the parameters"]
    assert found["PLeaS, 2 x the parameters"] > alone


def test_the_command_prints_both_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment, "NETWORKS", {"perceptron": (lambda: perceptron(8), "5")})
    monkeypatch.setattr(experiment, "BUDGETS", (1.0, 2.0))
    main(["matching", "--steps", "3", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    written = (tmp_path / "matching.txt").read_text(encoding="utf-8")
    assert written.strip() in printed
    for row in ("average", "Git Re-Basin, by weights", "PLeaS, 2 x the parameters", "the networks alone"):
        assert written.count(f"\n{row} ") == 2
    assert written.count("mean of both outputs") == 1


def test_steps_are_a_number(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["matching", "--steps", "0", "--out", str(tmp_path)])
    assert "--steps must be a whole number from 1, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_have_a_classifier(name: str) -> None:
    make, head = NETWORKS[name]
    model = make()
    assert model(torch.randn(3, 8, 8)).shape == (3, 10)
    assert model.get_submodule(head).weight.shape[0] == 10  # type: ignore[union-attr, index]
