"""The report of a merge: against the numbers of its files, the same after a resume, and no byte of the merge other."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from surgery_kernels.checkpoint.writing import writer
from surgery_kernels.cli import main
from tests.checkpoints import files_in
from tests.failing import after, no_room
from tests.fighting_models import fighting_models

pytestmark = pytest.mark.any_isa


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, str]:
    return fighting_models(tmp_path / "models")


@pytest.fixture
def recipe(tmp_path: Path, folders: dict[str, str]) -> Path:
    experts = [{"model": folders[name], "parameters": {"density": 0.5, "weight": 1}} for name in ("code", "chat")]
    path = tmp_path / "recipe.yml"
    whole = {"merge_method": "ties", "base_model": folders["base"], "models": experts, "out_dtype": "bfloat16"}
    path.write_text(json.dumps(whole))
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["merge", *map(str, arguments)])


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def test_report(tmp_path: Path, recipe: Path, folders: dict[str, str]) -> None:
    result = run(recipe, tmp_path / "out", "--report", tmp_path / "report")
    assert result.exit_code == 0 and f"report   {tmp_path / 'report' / 'report.html'}\n" in result.stdout
    (tmp_path / "plain").mkdir()
    assert run(recipe, tmp_path / "plain" / "out").exit_code == 0
    assert files_in(tmp_path / "out") == files_in(tmp_path / "plain" / "out")
    facts = report(tmp_path / "report")
    assert facts["density"] == 0.5 and len(facts["experts"]) == 2
    base, code, merged = (
        torch.cat([x.double().flatten() for _, x in sorted(load_file(path / "model.safetensors").items())])
        for path in (Path(folders["base"]), Path(folders["code"]), tmp_path / "out")
    )
    assert facts["result"]["distances"][0] == pytest.approx((merged - code).norm().item(), rel=1e-6)
    assert facts["result"]["length"] == pytest.approx((merged - base).norm().item(), rel=1e-6)
    cosine = torch.cosine_similarity(merged - base, code - base, dim=0).item()
    assert facts["result"]["cosines"][0] == pytest.approx(cosine, rel=1e-6)
    assert 0.001 < facts["result"]["rounded"] < 0.5  # bfloat16 has eight bits
    page = (tmp_path / "report" / "report.html").read_text()
    assert "<h2>Result</h2>" in page and "distance to the result" in page


def test_report_of_a_resumed_merge(tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tells of the tensors of before too."""
    assert run(recipe, tmp_path / "out", "--report", tmp_path / "whole").exit_code == 0
    monkeypatch.setattr(writer, "SYNC_BYTES", 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", after(8, os.pwrite, no_room))
        assert run(recipe, tmp_path / "again", "--report", tmp_path / "resumed").exit_code == 1
    assert not (tmp_path / "resumed").exists()
    assert run(recipe, tmp_path / "again", "--report", tmp_path / "resumed", "--resume").exit_code == 0
    whole, resumed = report(tmp_path / "whole"), report(tmp_path / "resumed")
    by_name = [sorted(facts.pop("tensors"), key=lambda tensor: tensor["name"]) for facts in (whole, resumed)]
    assert by_name[0] == by_name[1] and resumed["result"]["distances"] == pytest.approx(whole["result"]["distances"])


def test_refused(tmp_path: Path, recipe: Path, folders: dict[str, str]) -> None:
    """Before anything is written."""
    result = run(recipe, tmp_path / "out", "--report", tmp_path)
    assert (result.exit_code, result.stderr) == (
        2,
        f"surgery-kernels: report must be a new folder, got {tmp_path}, which exists (manual: checkpoints)\n",
    )
    models = [{"model": folders[name], "parameters": {"weight": 1}} for name in ("code", "chat")]
    recipe.write_text(json.dumps({"merge_method": "linear", "models": models}))
    result = run(recipe, tmp_path / "out", "--report", tmp_path / "report")
    assert result.exit_code == 2 and "report must be of a merge with a base, got linear" in result.stderr
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
