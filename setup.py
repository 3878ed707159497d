"""Compiles csrc/ with CMake into surgery_kernels/_C. MAX_JOBS limits how many compilers run at once.

The CUDA kernels are compiled where nvcc is; SK_CUDA=1 or 0 decides otherwise.
SK_CUDA_ARCHS="90-real" limits the architectures.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 10)
CUDA_ARCHITECTURES = "80-real;90-real;100-real;120"  # the last one as PTX too, for what comes later

FIND_TORCH = """
import importlib.util, json, pathlib
folder = pathlib.Path(importlib.util.find_spec("torch").origin).parent
version = {}
exec((folder / "version.py").read_text(), version)
print(json.dumps([str(folder), version["__version__"], version.get("cuda")]))
"""


def stop(sentence: str) -> NoReturn:
    sys.exit(f"surgery_kernels: {sentence}")


def find_tool(name: str) -> str | None:
    """Path of a program, also of one that pip put beside a Python that is not activated."""
    return shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))


def find_torch() -> tuple[str, str, bool]:
    """Folder and version of the torch of this interpreter, and whether it has CUDA."""
    # pip's build isolation hides the installed packages through PYTHONPATH: ask without it second
    for hidden in ((), ("PYTHONPATH", "PYTHONNOUSERSITE")):
        environment = {key: value for key, value in os.environ.items() if key not in hidden}
        answer = subprocess.run(
            [sys.executable, "-c", FIND_TORCH], capture_output=True, text=True, env=environment, cwd="/"
        )
        if answer.returncode == 0:
            folder, version, cuda = json.loads(answer.stdout)
            break
    else:
        stop("PyTorch 2.10 or newer must be installed before the build: pip install torch==2.13.0")
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
        stop(f"PyTorch must be 2.10 or newer, got {version}: pip install torch==2.13.0")
    return folder, version, cuda is not None


def cuda_architectures(torch_has_cuda: bool) -> str:
    """What the CUDA kernels are compiled for, as CMake's list; empty: not at all."""
    wanted = os.environ.get("SK_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        stop(f"SK_CUDA must be auto, 0 or 1, got {wanted!r}")
    has_nvcc = bool(os.environ.get("CUDACXX") or shutil.which("nvcc"))
    if wanted == "1" and not has_nvcc:
        stop("nvcc must be on PATH for SK_CUDA=1, found none: install the CUDA toolkit")
    if wanted == "0" or not has_nvcc:
        return ""
    # beside a torch that cannot run them, one shows that they compile
    return os.environ.get("SK_CUDA_ARCHS") or (CUDA_ARCHITECTURES if torch_has_cuda else "90-real")


def check_compiler() -> None:
    wanted = os.environ.get("CXX")
    names = [shlex.split(wanted)[0]] if wanted else ["c++", "g++", "clang++"]
    if not any(map(shutil.which, names)):
        stop(f"a C++17 compiler must be installed before the build, found no {' or '.join(names)}: apt install g++")


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        torch_folder, torch_version, torch_has_cuda = find_torch()
        check_compiler()
        architectures = cuda_architectures(torch_has_cuda)
        if not (cmake := find_tool("cmake")):
            stop("CMake 3.22 or newer must be installed before the build: pip install cmake")
        try:
            import pybind11
        except ImportError:
            stop("pybind11 must be installed before the build: pip install pybind11")
        if not Path(sysconfig.get_path("include"), "Python.h").exists():
            stop(f"the headers of {sys.executable} must be installed before the build: apt install python3-dev")

        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = ROOT / "build" / f"{sys.implementation.cache_tag}-torch-{torch_version}{'-cuda' * bool(architectures)}"
        configure = [
            f"-S{ROOT}",
            f"-B{build}",
            "--log-level=NOTICE",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DSK_TORCH_DIR={torch_folder}",
            f"-DSK_TORCH_VERSION={torch_version}",
            f"-DSK_VERSION={self.distribution.get_version()}",
            f"-DSK_OUTPUT_DIR={output}",
            f"-DSK_CUDA_ARCHS={architectures}",
        ]
        if ninja := find_tool("ninja"):
            # given every time: the ninja of an isolated build is gone at the next one
            configure += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count()))
        for step in (configure, ["--build", str(build), "--parallel", jobs]):
            if subprocess.run([cmake, *step]).returncode:
                stop("the C++ build failed, its first error is above")


setup(
    license="Apache-2.0",
    ext_modules=[Extension("surgery_kernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
