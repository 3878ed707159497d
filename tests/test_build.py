"""The build: what the library says of itself, the choice of the instruction set, and the errors of setup.py."""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import venv
from pathlib import Path

import pytest
import torch

import surgery_kernels
from surgery_kernels import _C

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.any_isa


@pytest.fixture(scope="module")
def objects() -> list[Path]:
    """The object files of the last build of this checkout."""
    builds = sorted((ROOT / "build").glob("*-torch-*/CMakeFiles"), key=lambda folder: folder.stat().st_mtime)
    if not builds:
        pytest.skip("no build folder: the library was not compiled in this checkout")
    return sorted(builds[-1].rglob("*.o"))


def tool(*command: str) -> str:
    if not shutil.which(command[0]):
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_build_info() -> None:
    info = _C.build_info()
    assert info["version"] == surgery_kernels.__version__
    assert re.match(r"(gcc|clang) \d+", info["compiler"])
    assert re.match(r"2\.\d+", info["torch"])
    assert info["isas"][0] == "base"
    assert all(re.match(r"\d+", architecture) for architecture in info["cuda"])


def test_isas_of_this_machine() -> None:
    assert _C.isas()[0] == "base"
    assert set(_C.isas()) <= set(_C.build_info()["isas"])
    assert _C.isa() == os.environ.get("SURGERY_KERNELS_ISA") or _C.isas()[-1]


@pytest.mark.usefixtures("restored_isa")
def test_set_isa() -> None:
    for name in _C.isas():
        _C.set_isa(name)
        assert _C.isa() == name
    message = f"name must be one of {', '.join(_C.isas())} on this machine, got 'sse9'"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        _C.set_isa("sse9")
    assert _C.isa() == _C.isas()[-1]


@pytest.mark.usefixtures("restored_isa")
def test_set_isa_while_ops_run() -> None:
    experts = [torch.arange(20_001) % (7 + task) / 64 - 0.05 for task in range(3)]
    expected = surgery_kernels.ties_merge(None, experts)
    done = threading.Event()

    def switch() -> None:
        while not done.is_set():
            for name in _C.isas():
                _C.set_isa(name)

    switcher = threading.Thread(target=switch)
    switcher.start()
    try:
        for _ in range(50):
            assert torch.equal(surgery_kernels.ties_merge(None, experts), expected)
    finally:
        done.set()
        switcher.join()


def imported_with(isa: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", "from surgery_kernels import _C; print(_C.isa())"],
        cwd=ROOT,
        env={**os.environ, "SURGERY_KERNELS_ISA": isa},
        capture_output=True,
        text=True,
    )


def test_isa_from_the_environment() -> None:
    assert imported_with("base").stdout == "base\n"
    answer = imported_with("sse9")
    assert answer.returncode != 0
    message = f"SURGERY_KERNELS_ISA must be one of {', '.join(_C.isas())} on this machine, got 'sse9'"
    assert message in answer.stderr.splitlines()[-1]


def test_objects_share_no_symbols(objects: list[Path]) -> None:
    """A weak symbol compiled for one instruction set could be the copy the linker keeps for all of them."""
    kernels = [path for path in objects if path.name.endswith("_kernel.cpp.o")]
    assert {path.name for path in kernels} and len(kernels) % len(_C.build_info()["isas"]) == 0
    for path in kernels:
        assert re.findall(r"^\S* *[uVW] .*$", tool("nm", "-C", str(path)), re.MULTILINE) == [], path


@pytest.mark.skipif(platform.machine() != "x86_64", reason="looks for AVX registers")
def test_baseline_holds_no_avx(objects: list[Path]) -> None:
    for path in objects:
        if not {"sk_avx2.dir", "sk_avx512.dir"} & set(path.parts):
            assert not re.search(r"%[yz]mm|\sv[a-z]+ps\s", tool("objdump", "-d", "--no-show-raw-insn", str(path))), path


def test_only_the_stable_abi_is_linked() -> None:
    """No C++ symbol of torch: one build runs on every torch from 2.10 on."""
    undefined = tool("nm", "-D", "--undefined-only", _C.__file__)
    assert re.search(r" U (torch|aoti_torch)_", undefined)
    assert not re.search(r" U _ZNK?(2at|3c10|5torch)", undefined)


def setup_fails_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, torch_version: str | None, path: str
) -> tuple[int, str]:
    """Runs setup.py in a Python that has setuptools and, unless None, a torch of that version and nothing else."""
    venv.create(tmp_path / "venv", symlinks=True)
    packages = tmp_path / "packages"
    packages.mkdir()
    for name in ("setuptools", "_distutils_hack"):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            pytest.skip(f"{name} is not installed")
        (packages / name).symlink_to(Path(spec.origin).parent)
    if torch_version:
        (packages / "torch").mkdir()
        (packages / "torch/__init__.py").touch()
        (packages / "torch/version.py").write_text(f"__version__ = '{torch_version}'\n")
    monkeypatch.setenv("PYTHONPATH", str(packages))
    monkeypatch.setenv("PATH", path)
    monkeypatch.delenv("CXX", raising=False)
    answer = subprocess.run(
        [tmp_path / "venv/bin/python", "-W", "ignore", "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return answer.returncode, answer.stderr


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ("1", "nvcc must be on PATH for SK_CUDA=1, found none: install the CUDA toolkit"),
        ("yes", "SK_CUDA must be auto, 0 or 1, got 'yes'"),
    ],
)
def test_setup_says_what_cuda_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str, sentence: str
) -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        pytest.skip("no C++ compiler is installed")
    (tmp_path / "programs").mkdir()
    (tmp_path / "programs/c++").symlink_to(compiler)
    monkeypatch.setenv("SK_CUDA", wanted)
    monkeypatch.delenv("CUDACXX", raising=False)
    answer = setup_fails_with(tmp_path, monkeypatch, torch_version="2.13.0", path=str(tmp_path / "programs"))
    assert answer == (1, f"surgery_kernels: {sentence}\n")


@pytest.mark.parametrize(
    ("torch_version", "path", "sentence"),
    [
        (None, os.environ["PATH"], "PyTorch 2.10 or newer must be installed before the build: pip install torch"),
        ("2.9.1+cpu", os.environ["PATH"], "PyTorch must be 2.10 or newer, got 2.9.1+cpu: pip install torch"),
        ("2.13.0", "", "a C++17 compiler must be installed before the build, found no c++ or g++ or clang++"),
    ],
    ids=["no torch", "old torch", "no compiler"],
)
def test_setup_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch_version: str | None, path: str, sentence: str
) -> None:
    status, said = setup_fails_with(tmp_path, monkeypatch, torch_version=torch_version, path=path)
    assert status == 1
    assert said.startswith(f"surgery_kernels: {sentence}")
    assert said.count("\n") == 1
