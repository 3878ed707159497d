"""The page, the pictures and the tables of an inspection, and the command that makes them."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from surgery_kernels.cli import main
from surgery_kernels.inspect import Inspection, inspect_models
from surgery_kernels.inspect.findings import findings
from surgery_kernels.inspect.numbers import total
from surgery_kernels.inspect.page import page
from surgery_kernels.inspect.pictures import write_pictures
from surgery_kernels.inspect.svg import bars, heat_map
from surgery_kernels.inspect.terminal import in_few, show
from tests.fighting_models import EXPERTS, SHAPES

pytestmark = pytest.mark.any_isa

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["inspect", *map(str, arguments)])


class _Tags(HTMLParser):
    """Which are open, and that they close in order."""

    VOID = ("meta", "rect", "circle", "line", "polyline", "!doctype")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_page(inspection: Inspection) -> None:
    """One file: nothing is fetched or run, every tag is closed, and every sentence is there."""
    text = page(inspection)
    assert not re.search(r"<script|https?://|<link|@import|url\(", text)
    tags = _Tags()
    tags.feed(text)
    assert not tags.open and tags.seen.count("svg") == 4 and tags.seen.count("table") == 4
    assert all(found.sentence in text for found in findings(inspection))
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    assert text.count('class="down bar"') == 2  # the two layers that fight


def test_names_are_escaped(tmp_path: Path, folders: dict[str, str]) -> None:
    odd = tmp_path / "<b>&co"
    shutil.copytree(folders["code"], odd)
    text = page(inspect_models([str(odd)], folders["base"]))
    assert "<b>&co" not in text and "&lt;b&gt;&amp;co" in text


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize(("width", "dark"), [(1000, False), (390, True)], ids=["desk", "phone"])
def test_in_a_browser(tmp_path: Path, inspection: Inspection, width: int, dark: bool) -> None:
    """Rendered in full: as wide as the window, and in the colours that the reader prefers."""
    from matplotlib.image import imread

    path, shot = tmp_path / "page.html", tmp_path / "shot.png"
    probe = "<script>document.title = document.documentElement.scrollWidth</script>"
    path.write_text(page(inspection).replace("</body>", f"{probe}</body>"), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={width},2400"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", *(["--force-dark-mode"] if dark else [])]
    dumped = subprocess.run(
        [CHROMIUM, *options, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120
    )
    title = re.search(r"<title>(\d+)</title>", dumped.stdout)
    assert title and int(title[1]) <= max(width, 500)  # Chromium makes no window narrower than 500
    subprocess.run(
        [CHROMIUM, *options, f"--screenshot={shot}", path.as_uri()], capture_output=True, timeout=120, check=True
    )
    pixels = imread(shot)[..., :3]
    assert pixels.shape[1] == width and (pixels[0, 0].mean() < 0.2) == dark
    assert pixels.reshape(-1, 3).std(0).min() > 0.02  # not blank


def test_pictures(tmp_path: Path, inspection: Inspection) -> None:
    written = write_pictures(inspection, tmp_path / "pictures")
    assert [path.name for path in written] == ["cosines.png", "change.png", "conflict.png"]
    for path in written:
        width, height = struct.unpack(">II", path.read_bytes()[16:24])
        assert width > 300 and height > 300


def test_terminal(inspection: Inspection) -> None:
    lines = show(inspection, 160).splitlines()
    assert lines[:2] == [f"base      {inspection.base}", f"expert 1  {inspection.experts[0]}"]
    assert any(line.startswith("head ") for line in lines) and any(line.startswith("6 ") for line in lines)
    assert [line[2:] for line in lines if line.startswith("- ")] == [found.sentence for found in findings(inspection)]
    assert all(line == line.rstrip() and len(line) <= 160 for line in lines[7:])


def test_many_layers_in_few_rows(inspection: Inspection) -> None:
    rows = in_few(inspection.by_layer, 3)
    assert [name for name, _ in rows] == ["0-2", "3-5", "6-7"]
    assert total(numbers for _, numbers in rows).numel == total(inspection.by_layer.values()).numel
    assert [name for name, _ in in_few(inspection.by_layer, 40)] == [str(layer) for layer in range(8)]


def test_the_edges_of_pictures() -> None:
    assert heat_map([], []).count("<rect") == 0 and "-</text>" in heat_map(["a"], [[float("nan")]])
    assert bars("title", "layer", [3.0], [0.0]).count("<rect") == 1


def test_command(tmp_path: Path, folders: dict[str, str]) -> None:
    experts = [folders[name] for name in EXPERTS]
    result = run(*experts, "--base", folders["base"], "--html", tmp_path / "page.html", "--png", tmp_path / "png")
    assert (result.exit_code, result.stderr) == (0, "") and "- experts 3 and 4 are nearly the same" in result.stdout
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>") and len(list(tmp_path.glob("png/*"))) == 3
    facts = json.loads(run(*experts, "--base", folders["base"], "--json", "--spectra").stdout)
    assert len(facts["tensors"]) == len(SHAPES) and facts["model"]["nonfinite"][1] == 1
    spectra = {tensor["name"]: tensor["spectra"] for tensor in facts["tensors"]}
    assert len(spectra["lm_head.weight"]) == 4 and spectra["model.norm.weight"] == []
    assert run(*experts, "--quiet").stdout == ""


def test_errors_of_the_command(tmp_path: Path, folders: dict[str, str]) -> None:
    result = run(folders["code"])
    sentence = "models must be two at least without a base, got 1"
    assert (result.exit_code, result.stderr) == (2, f"surgery-kernels: {sentence} (manual: inspect)\n")
    result = run(folders["code"], folders["chat"], "--html", tmp_path / "none" / "page.html")
    assert result.exit_code == 2 and "No such file" in result.stderr
