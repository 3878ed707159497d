"""The first thing a GPU is asked to do takes in every op."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from surgery_kernels.triton import CUDA_OPS, MODULES

pytestmark = pytest.mark.any_isa


class Recorded(TorchDispatchMode):
    """The names of the library's ops that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, _: Any, arguments: Any = (), options: Any = None) -> Any:
        if function.namespace == "surgery_kernels":
            self.names.add(function._schema.name.split("::")[1])
        return function(*arguments, **(options or {}))


@pytest.fixture
def smoke(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "bench"))
    return importlib.import_module("gpu_smoke")


def test_every_op_is_called(smoke: Any) -> None:
    of_cuda: set[str] = set()
    with Recorded() as recorded:
        for check in smoke.checks(1_003):
            before, recorded.names = recorded.names, set()
            check.call(torch.ops.surgery_kernels, *check.inputs)
            of_cuda |= recorded.names if check.has_cuda else set()
            recorded.names |= before
    assert recorded.names == {*MODULES}
    assert of_cuda == {*CUDA_OPS}


def test_an_op_that_fails_costs_its_line(
    smoke: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = torch.zeros(3)
    checks = [smoke.Check("fine", lambda _, x: x, (given,)), smoke.Check("wrong", wrong(), (given,))]
    monkeypatch.setattr(smoke, "checks", lambda count: iter(checks))
    assert smoke.run(dry=True) == 1
    monkeypatch.setattr(smoke, "checks", lambda count: iter(checks[:1]))
    assert smoke.run(dry=True) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["fine", "triton", "float32", "as", "the", "CPU"]
    assert lines[1].startswith("wrong            triton float32  FAILED: AssertionError: ")


def wrong() -> Any:
    """Another result at every call."""
    counted = iter(range(100))
    return lambda _, x: x + next(counted)
