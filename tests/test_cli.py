"""The command `surgery-kernels`: what it prints, what it writes and with which code it exits."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result

from surgery_kernels import _C, cli
from surgery_kernels.checkpoint import estimate, open_checkpoint
from surgery_kernels.checkpoint.writing import writer
from surgery_kernels.cli import merge as command_merge
from surgery_kernels.cli.exits import MANUAL
from surgery_kernels.cli.options import Size
from surgery_kernels.merging import METHODS
from tests.checkpoints import files_in, save_lora, save_models, save_safetensors, state_dict, ties_recipe
from tests.failing import after, no_room

pytestmark = pytest.mark.any_isa


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    return save_models(tmp_path / "models", [state_dict(seed) for seed in range(3)])


@pytest.fixture
def recipe(tmp_path: Path, folders: list[str]) -> str:
    path = tmp_path / "recipe.yml"
    path.write_text(json.dumps(ties_recipe(folders)))
    return str(path)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "results").mkdir()
    return tmp_path / "results" / "out"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


def stopped(code: int, message: str, *arguments: object) -> None:
    """With one sentence on stderr, and the page of the manual where the input is to blame."""
    result = run(*arguments)
    assert result.exit_code == code, result.output
    manual = rf" \(manual: {MANUAL[str(arguments[0])]}\)" if code == 2 and arguments[0] in MANUAL else ""
    assert re.fullmatch(f"surgery-kernels: {message}{manual}\n", result.stderr), result.stderr


PLAN = """\
method   ties over {0}, scope tensor
models   {1}
         {2}
tensors  4 tensors to merge, 1 to copy, 0.0M parameters
read     1.36 KB
write    {nbytes} bytes in 1 file
"""
RESULT = r"wrote {out}: {nbytes} bytes in 1 file, \d+\.\d s, [\d.]+ ([KMG]B|bytes)/s read and written\n"


def test_merge(recipe: str, folders: list[str], out: Path) -> None:
    result = run("merge", recipe, out)
    nbytes = (out / "model.safetensors").stat().st_size
    expected = re.escape(PLAN.format(*folders, nbytes=nbytes)) + RESULT.format(out=out, nbytes=nbytes)
    assert (result.exit_code, result.stderr) == (0, "") and re.fullmatch(expected, result.stdout), result.stdout


def test_notices(recipe: str, out: Path) -> None:
    given = json.loads(Path(recipe).read_text())
    Path(recipe).write_text(json.dumps({**given, "out_dype": "float16"}))
    notice = "recipe.out_dype is ignored: did you mean 'out_dtype'?"
    stopped(2, re.escape(f"recipe must have no notices to be strict, got: {notice}"), "merge", recipe, out, "--strict")
    result = run("merge", recipe, out)
    assert (result.exit_code, result.stderr) == (0, "") and f"notice: {notice}\n" in result.stdout


def test_check(tmp_path: Path) -> None:
    """Without any of the models."""
    path = tmp_path / "recipe.yml"
    sources = [{"model": f"org/{name}", "layer_range": [0, 8]} for name in "ab"]
    given = {
        "merge_method": "slerp",
        "slices": [{"sources": sources}] * 2,
        "base_model": "org/a",
        "parameters": {"t": 1},
    }
    path.write_text(json.dumps(given))
    result = run("check", path)
    expected = "method  slerp over org/a, scope tensor\nmodels  org/b\nslices  2, 16 layers\n"
    assert (result.exit_code, result.stdout, result.stderr) == (0, expected, "")
    path.write_text(json.dumps({**given, "base_model": "org/c", "tokenizr": {}}))
    result = run("check", path)
    notices = [
        "notice: recipe.slices[0].sources are merged from org/a to org/b: org/c gives the files beside the weights",
        "notice: recipe.slices[1].sources are merged from org/a to org/b: org/c gives the files beside the weights",
        "notice: recipe.tokenizr is ignored: did you mean 'tokenizer'?",
    ]
    assert result.exit_code == 0 and sorted(result.stdout.splitlines()[3:]) == notices
    stopped(2, "recipe must have no notices to be strict, got: .*", "check", path, "--strict")
    path.write_text(json.dumps({**given, "parameters": {}}))
    stopped(2, "recipe.parameters.t must be given for every tensor, got none for any", "check", path)
    models = [{"model": "a", "parameters": {"weight": {"filter": "mlp", "value": 1}}}, {"model": "b"}]
    path.write_text(json.dumps({"merge_method": "linear", "models": models}))
    message = r"recipe.models\[1\].parameters.weight must be given for every tensor, got none for any of b"
    stopped(2, message, "check", path)
    path.write_text("merge_method: linear")
    stopped(2, "recipe must have one of models, slices and modules, got none", "check", path)
    listed = [{"model": f"org/{number}", "parameters": {"weight": 1}} for number in range(12)]
    document = f"merge_method: linear\nmodels: {json.dumps(listed)}\n"
    path.write_text(f"name: first\n{document}---\n{document.replace('org/0', 'first')}")
    lines = run("check", path).stdout.splitlines()
    assert (
        lines[:3] == ["first:", "method  linear, scope tensor", "models  org/0"] and lines[-1] == "        and 4 more"
    )


def test_quiet(recipe: str, out: Path) -> None:
    result = run("merge", recipe, out, "--quiet")
    assert (result.exit_code, result.output) == (0, "") and out.is_dir()


@pytest.mark.parametrize("seconds", [0.2, 99.6])
def test_dry_run(recipe: str, out: Path, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setattr(estimate, "_seconds_to_read", lambda *_: 0.0)
    monkeypatch.setattr(estimate, "_seconds_to_write", lambda *_: seconds)
    result = run("merge", recipe, out, "--dry-run")
    lines = result.stdout.splitlines()
    assert result.exit_code == 0 and [line.split()[0] for line in lines[-3:-1]] == ["read", "write"]
    assert lines[-1] == ("would take about a second" if seconds < 1 else "would take about 100 s")
    assert files_in(out.parent) == {}


def test_dry_run_measures_the_disks(recipe: str, out: Path) -> None:
    assert "would take about a" in run("merge", recipe, out, "--dry-run", "--quiet").stdout
    assert list(out.parent.iterdir()) == []


def test_allow(recipe: str, folders: list[str], out: Path) -> None:
    expert = state_dict(1)
    del expert["norm.scale"]
    save_safetensors(Path(folders[1]), {**expert, "more": torch.ones(1)})
    refused = "models must have .* got missing: .* has no 'norm.scale'; extra: .*; to go on allow missing, extra"
    stopped(2, refused, "merge", recipe, out)
    stopped(2, "models must have .*; to go on allow extra", "merge", recipe, out, "--allow", "missing")
    assert files_in(out.parent) == {}
    result = run("merge", recipe, out, "--allow", "missing", "--allow", "extra")
    assert result.exit_code == 0
    assert f"missing: {folders[1]} has no 'norm.scale': the tensors of {folders[0]} stand in\n" in result.stdout
    assert f"extra: {folders[1]} has 'more' besides: they are left out\n" in result.stdout


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_wrong_input(
    recipe: str, folders: list[str], out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dry_run: list[str]
) -> None:
    """Also of a merge that would not have been carried out."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    stopped(2, "recipe must be a YAML file, got none.yml", "merge", "none.yml", out, *dry_run)
    stopped(2, "device must be there, got 'cuda' with 0 CUDA.*", "merge", recipe, out, "--device", "cuda", *dry_run)
    stopped(2, "out must be in a folder that exists, got .*", "merge", recipe, out / "below", *dry_run)
    stopped(2, "out must not exist, got .*", "merge", recipe, out.parent, *dry_run)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
        stopped(2, "out must be on a disk with .*", "merge", recipe, out, *dry_run)
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
        stopped(2, "out must be in a folder that can be written to, got .*", "merge", recipe, out, *dry_run)
    path = Path(folders[1]) / "model.safetensors"
    os.truncate(path, 300)
    stopped(2, f"{path} must be complete, got 300 bytes of .*", "merge", recipe, out, *dry_run)
    path.unlink()
    path.mkdir()
    stopped(2, f"{path} must be a file, got a folder", "merge", recipe, out, *dry_run)
    assert files_in(out.parent) == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--allow", "all"], "'all' is not one of 'missing', 'extra', 'vocabulary', 'shape', 'buffer'"),
        (["--nonfinite", "skip"], "'skip' is not one of 'error', 'propagate', 'drop'"),
        (["--threads", "0"], "0 is not in the range x>=1"),
        (["--max-shard-size", "many"], "must be a number of bytes such as 500MB or 5GB, got 'many'"),
    ],
)
def test_wrong_options(recipe: str, out: Path, arguments: list[str], message: str) -> None:
    result = run("merge", recipe, out, *arguments)
    assert result.exit_code == 2 and message in result.stderr and files_in(out.parent) == {}


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("1", 1), ("500MB", 500 * 10**6), ("5GB", 5 * 10**9), ("1.5 kb", 1500), (" 2tb", 2 * 10**12), ("1e3", 1000)],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert Size().convert(text, None, None) == nbytes


@pytest.mark.parametrize("text", ["", "0", "0.5", "-1GB", "GB", "5GiB", "nan", "inf"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(click.BadParameter, match="must be a number of bytes such as 500MB or 5GB, got"):
        Size().convert(text, None, None)


def test_dtype_of_adapters(tmp_path: Path, folders: list[str], out: Path) -> None:
    adapter = save_lora(tmp_path / "adapter", {"layers.0": (torch.ones(2, 6), torch.ones(6, 2))})
    path = tmp_path / "adapters.yml"
    path.write_text(json.dumps({"merge_method": "passthrough", "models": [{"model": f"{folders[0]}+{adapter}"}]}))
    assert run("merge", path, out, "--lora-merge-dtype", "float64").exit_code == 0
    assert open_checkpoint(out).tensors["layers.0.weight"].dtype == torch.float64


def test_shards_and_threads(recipe: str, out: Path, restored_threads: None) -> None:
    result = run("merge", recipe, out, "--max-shard-size", "0.1KB", "--threads", "1")
    num_files = len(list(out.glob("*.safetensors")))
    assert result.exit_code == 0 and num_files > 1 and f"in {num_files} files\n" in result.stdout


def test_disk_full_and_resume(
    recipe: str, folders: list[str], out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "SYNC_BYTES", 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", after(2, os.pwrite, no_room))  # one tensor is on disk already
        stopped(1, r".*No space left on device: make room and run it again with --resume", "merge", recipe, out)
    assert not out.exists()
    stopped(2, "out must have no unfinished merge beside it, got .*: resume it, or remove it", "merge", recipe, out)
    refused = "resume must be of the same recipe, checkpoints and options, got .*: remove it to start over"
    stopped(2, refused, "merge", recipe, out, "--resume", "--nonfinite", "drop")
    assert run("merge", recipe, out, "--resume").exit_code == 0
    assert run("merge", recipe, tmp_path / "out").exit_code == 0
    assert files_in(out) == files_in(tmp_path / "out")


def test_an_input_that_goes_away(recipe: str, folders: list[str], out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the writing has begun it is a failure on the way, although no file is there."""
    check = command_merge.check_run

    def and_remove(*arguments: Any, **options: Any) -> None:
        check(*arguments, **options)
        (Path(folders[2]) / "model.safetensors").unlink()

    monkeypatch.setattr(command_merge, "check_run", and_remove)
    stopped(1, ".*No such file.*", "merge", recipe, out)
    assert not out.exists()


def test_nan(recipe: str, folders: list[str], out: Path) -> None:
    save_safetensors(Path(folders[2]), {**state_dict(2), "norm.scale": torch.tensor(torch.nan)})
    message = r"experts\[1\] must be finite, got 1 NaN or infinite values in tensor 'norm.scale' \(.*expert1\)"
    stopped(1, message, "merge", recipe, out)
    assert not out.exists()
    shutil.rmtree(f"{out}.partial", ignore_errors=True)
    assert run("merge", recipe, out, "--nonfinite", "drop").exit_code == 0


def test_interrupted(recipe: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command_merge, "run", interrupt)
    stopped(130, "interrupted: run it again with --resume to go on", "merge", recipe, out)
    monkeypatch.setattr(command_merge, "plan_merge", interrupt)
    stopped(130, "interrupted", "merge", recipe, out)


def test_nobody_reads_on(folders: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    echo = click.echo

    def refuse(message: str, err: bool = False) -> None:
        if not err:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        echo(message, err=err)

    monkeypatch.setattr(click, "echo", refuse)
    result = run("diff", *folders[:2])
    assert (result.exit_code, result.output) == (1, "")


def test_diff(folders: list[str]) -> None:
    result = run("diff", folders[0], folders[0])
    assert (result.exit_code, result.output) == (0, "no difference\n")
    first = {"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(2), "d": torch.ones(2), "f": torch.ones(3)}
    second = {"a": torch.ones(3), "b": torch.tensor([1.0, 1.25]), "c": torch.ones(2).half(), "e": torch.ones(1)}
    save_safetensors(Path(folders[0]), first)
    save_safetensors(Path(folders[1]), {**second, "f": torch.ones(3)})
    result = run("diff", folders[0], folders[1])
    assert (result.exit_code, result.stderr) == (1, "")
    assert sorted(result.stdout.splitlines()) == [
        "a: shape [2] and [3]",
        "b: 1 of 2 elements, at most 0.25 absolute, 0.25 relative",
        "c: torch.float32 and torch.float16; 0 of 2 elements, at most 0 absolute, 0 relative",
        "d: only in the first",
        "e: only in the second",
    ]


def test_diff_of_what_is_not_there(folders: list[str], tmp_path: Path) -> None:
    stopped(2, "reference must be a path or a model of the Hub.*", "diff", folders[0], tmp_path / "none")
    path = Path(folders[1]) / "model.safetensors"
    path.unlink()
    path.mkdir()
    stopped(2, f"{path} must be a file, got a folder", "diff", *folders[:2])


def test_info() -> None:
    result = run("info")
    names = ["surgery_kernels", "torch", "compiler", "instruction set", "threads", "CUDA kernels", "CUDA devices"]
    lines = result.stdout.splitlines()
    assert result.exit_code == 0 and [line[:16].rstrip() for line in lines] == names
    values = [line[17:] for line in lines]
    assert values[0] == _C.build_info()["version"] and torch.__version__ in values[1]
    assert values[3] == f"{_C.isa()} of {', '.join(_C.isas())}" and values[4] == str(torch.get_num_threads())


def test_help() -> None:
    assert "130  interrupted; --resume goes on from there" in run("merge", "--help").stdout
    assert "2    wrong arguments" in run("--help").stdout
    assert run("--version").stdout == f"surgery-kernels, version {_C.build_info()['version']}\n"


def test_silent_where_nobody_watches(recipe: str, out: Path) -> None:
    command = [sys.executable, "-m", "surgery_kernels", "merge", recipe, str(out)]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "") and f"\nwrote {out}: " in result.stdout


def test_a_bar_on_a_terminal(recipe: str, out: Path) -> None:
    terminal, stderr = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    command = [sys.executable, "-m", "surgery_kernels", "merge", recipe, str(out)]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=stderr) as process:
        os.close(stderr)
        shown = b""
        try:
            while data := os.read(terminal, 4096):
                shown += data
        except OSError:  # how Linux says that the other end is closed
            pass
    os.close(terminal)
    assert process.returncode == 0
    assert re.search(rb"merging: 100%\|.*\[\d\d:\d\d<\d\d:\d\d, .*B/s\]", shown), shown


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}


def test_methods() -> None:
    listed = CliRunner().invoke(cli.main, ["methods"])
    assert listed.exit_code == 0 and [line.split()[0] for line in listed.output.splitlines()] == list(METHODS)
    for name, method in METHODS.items():
        explained = CliRunner().invoke(cli.main, ["methods", name])
        assert explained.exit_code == 0 and method.formula in explained.output and method.source in explained.output
        assert all(parameter.meaning in explained.output for parameter in method.parameters())
    wrong = CliRunner().invoke(cli.main, ["methods", "sleep"])
    assert wrong.exit_code == 2 and "name must be one of 'linear', " in wrong.stderr and "got 'sleep'" in wrong.stderr


def facts(*arguments: object, code: int = 0) -> Any:
    """What a command prints as JSON: that and nothing else."""
    result = run(*arguments, "--json")
    assert (result.exit_code, result.stderr) == (code, "")
    return json.loads(result.stdout)


def test_json_of_a_merge(recipe: str, folders: list[str], out: Path) -> None:
    planned = facts("merge", recipe, out, "--dry-run")["merges"]
    merged = facts("merge", recipe, out)["merges"]
    of_both = {
        "name": None,
        "method": "ties",
        "scope": "tensor",
        "base": folders[0],
        "models": folders[1:],
        "slices": 1,
        "notices": [],
        "tensors_merged": 4,
        "tensors_copied": 1,
        "parameters_merged": 109,
        "bytes_read": 1356,
        "bytes_written": (out / "model.safetensors").stat().st_size,
        "files": 1,
        "differences": [],
        "out": str(out),
    }
    assert planned[0].pop("estimated_seconds") >= 0 and planned == [{**of_both, "written": False}]
    assert merged[0].pop("seconds") >= 0 and merged == [{**of_both, "written": True}]
    assert facts("check", recipe)["documents"][0]["models"] == folders[1:]


def test_json_of_what_reports(folders: list[str], tmp_path: Path) -> None:
    assert facts("diff", folders[0], folders[0]) == {"differences": []}
    save_safetensors(tmp_path / "one", {"a": torch.zeros(2), "b": torch.zeros(1), "c": torch.zeros(2)})
    save_safetensors(tmp_path / "two", {"a": torch.ones(2), "c": torch.zeros(3).half()})
    found = {each["tensor"]: each for each in facts("diff", tmp_path / "one", tmp_path / "two", code=1)["differences"]}
    a = {"shape": [2], "dtype": "float32"}
    different = {"elements": 2, "largest_absolute": 1.0, "largest_relative": None}
    assert found["a"] == {"tensor": "a", "first": a, "second": a, **different}
    assert found["b"]["second"] is None and found["c"]["second"] == {"shape": [3], "dtype": "float16"}
    assert found["b"]["elements"] is found["c"]["elements"] is None
    assert [method["name"] for method in facts("methods")["methods"]] == list(METHODS)
    (ties,) = facts("methods", "ties")["methods"]
    density = {parameter["name"]: parameter for parameter in ties["parameters"]}["density"]
    assert (density["default"], density["default_in_recipes"], density["of_each_model"]) == (0.2, 1.0, True)
    assert facts("info")["isa"] == _C.isa()
    stopped(2, "name must be .*, got 'sleep'", "methods", "sleep", "--json")


def test_pages_of_the_manual() -> None:
    assert set(MANUAL) <= set(cli.COMMANDS)
    assert all((Path(__file__).parents[1] / "docs" / f"{page}.md").is_file() for page in MANUAL.values())


def test_no_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Merging says what it wants, by an example that works as it is typed."""
    monkeypatch.chdir(tmp_path)
    shown = run("merge").output
    typed = [line.split()[1:] for line in shown.splitlines() if line.startswith("    surgery-kernels ")]
    assert [words[0] for words in typed] == ["example", "merge"]
    results = [run(*words) for words in typed]
    assert [result.exit_code for result in results] == [0, 0], results[-1].output
    assert typed[1] == results[0].stdout.split()[-3:]
    merged = open_checkpoint(tmp_path / typed[1][-1])
    assert len(merged.tensors) == 8 and "ties over example/base" in results[1].stdout
    stopped(2, "folder must be new, got example, which exists", *typed[0])


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    """As the manual says to ask for it."""
    variable = "_SURGERY_KERNELS_COMPLETE"
    script = CliRunner().invoke(cli.main, env={variable: f"{shell}_source"}, prog_name="surgery-kernels")
    assert script.exit_code == 0 and f"{variable}={shell}_complete" in script.stdout
    typed = {"COMP_WORDS": "surgery-kernels ca", "COMP_CWORD": "1"}
    completed = CliRunner().invoke(
        cli.main, env={variable: "bash_complete", **typed}, prog_name="surgery-kernels", complete_var=variable
    )
    assert completed.stdout == "plain,calibrate\n"
