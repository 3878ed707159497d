"""SMILE, Twin-Merging and WEMoE on tiny checkpoints of the digits."""

from __future__ import annotations

from pathlib import Path

import pytest

from surgery_kernels.reproduce.digits import routed
from surgery_kernels.reproduce.digits.experts import load_experts
from surgery_kernels.reproduce.digits.tasks import TASKS
from tests.tiny_digits import TINY

pytestmark = pytest.mark.any_isa


def test_every_method_has_an_accuracy_for_every_task(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = routed.accuracies(load_experts(TINY, tiny_folder), router_steps=2, entropy_steps=1)
    names = ["pretrained", "task arithmetic", "SMILE, rank 16", "Twin-Merging, rank 20 %", "WEMoE, 1 steps"]
    assert list(found) == names
    assert all(
        len(of_tasks) == len(TASKS) and 0 <= min(of_tasks) <= max(of_tasks) <= 100 for of_tasks in found.values()
    )

    monkeypatch.setattr(routed, "Config", lambda: TINY)
    monkeypatch.setattr(routed, "accuracies", lambda _: found)
    (tmp_path / f"digits-{TINY.fingerprint()}").symlink_to(tiny_folder)
    routed.main(str(tmp_path))
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
