"""The experiment in half a minute, and the command for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from surgery_kernels.cli import demo as command
from surgery_kernels.cli import main
from surgery_kernels.reproduce.digits import quick

pytestmark = pytest.mark.any_isa


def test_quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(quick, "STEPS", {"pretrain_steps": 2, "expert_steps": 2, "multi_task_steps": 1})
    result = CliRunner().invoke(main, ["demo", "--quick", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    (folder,) = tmp_path.glob("digits-*")
    rows = (folder / "results.txt").read_text().splitlines()
    names = [name for name in ("pretrained", *quick.CHOSEN, "individual") if any(row.startswith(name) for row in rows)]
    assert len(names) == 5 and sum("+ closed form" in row for row in rows) == 3
    assert (folder / "average_accuracy.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ([], ["--seed", "0", "--out", ".cache"]),
        (["--quick", "--seed", "3"], ["--seed", "3", "--out", ".cache", "--quick"]),
        (["--full", "--out", "there"], ["--seed", "0", "--out", "there", "--full"]),
    ],
    ids=str,
)
def test_what_the_command_asks_for(typed: list[str], told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(command, "reproduce", asked.append)
    assert CliRunner().invoke(main, ["demo", *typed]).exit_code == 0
    assert asked == [["digits", *told]]


def test_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["demo", "--quick", "--full", "--out", str(tmp_path)])
    assert result.exit_code == 2 and "--quick must be alone, got --full" in result.output
