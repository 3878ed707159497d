"""Calibrations that are stopped, and go on behind the last block that was done."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from surgery_kernels.surgery.calibrate.calibration import Calibration
from surgery_kernels.surgery.checkpoints import calibrate_checkpoint
from tests.checkpoints import files_in
from tests.fits import refusal

pytest.importorskip("transformers", reason="transformers is not installed", exc_type=ImportError)

from tests.surgery.checkpoints.language import family, llama, texts_of, write_data

pytestmark = pytest.mark.any_isa

Given = tuple[dict[str, Any], Path]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    folder = tmp_path_factory.mktemp("models")
    recipe = family(folder, llama())
    return recipe, write_data(folder / "data.jsonl", recipe, [texts_of(number, 2) for number in range(2)])


def test_killed_anywhere(given: Given, tmp_path: Path) -> None:
    recipe, data = given
    recipe_file = tmp_path / "recipe.yml"
    recipe_file.write_text(json.dumps(recipe))  # JSON is YAML
    places = [recipe_file, data, tmp_path / "out"]
    calls = [2, 9]  # while it is merged, and behind a block
    command = [sys.executable, "-m", "tests.surgery.checkpoints.killed_calibrations", *places, *calls]
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found == {"killed": 2, "behind_a_block": 1, "different": 0}


def test_done_blocks_are_not_solved_again(given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, data = given
    calibrate_checkpoint(recipe, data, tmp_path / "expected", progress=False)
    solve, solved, stops = Calibration.block, [], True

    def counted(self: Calibration, block: int, *arguments: Any) -> Any:
        if stops and block == 2:
            raise KeyboardInterrupt
        solved.append(block)
        return solve(self, block, *arguments)

    monkeypatch.setattr(Calibration, "block", counted)
    with pytest.raises(KeyboardInterrupt):
        calibrate_checkpoint(recipe, data, tmp_path / "out", progress=False)
    message = (
        f"out must have no unfinished merge beside it, got {str(tmp_path / 'out.partial')!r}: resume it, or remove it"
    )
    assert refusal(lambda: calibrate_checkpoint(recipe, data, tmp_path / "out", progress=False)) == message
    message = "resume must be of the same recipe, checkpoints and options"
    other = {"resume": True, "progress": False, "lam": 1.0}
    assert refusal(lambda: calibrate_checkpoint(recipe, data, tmp_path / "out", **other)).startswith(message)
    stops = False
    found = calibrate_checkpoint(recipe, data, tmp_path / "out", resume=True, progress=False)
    assert solved == [0, 1, 2] and set(found) == {"before", "after", "expert"}
    expected, got = (files_in(tmp_path / name) for name in ("expected", "out"))
    card = {name: files.pop("README.md").replace(name, b"") for name, files in ((b"expected", expected), (b"out", got))}
    assert got == expected and card[b"out"] == card[b"expected"]
