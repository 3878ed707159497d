"""What a merge refuses before it writes anything, and what comes out where the user allows it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from surgery_kernels import merge_state_dicts
from surgery_kernels.checkpoint import merge
from surgery_kernels.checkpoint.plan import plan_merge
from surgery_kernels.checkpoint.run import run
from surgery_kernels.recipes import load_recipe
from tests.cases import assert_same
from tests.checkpoints import TIES, files_in, save_models, save_torch, ties_recipe

pytestmark = pytest.mark.any_isa

StateDict = dict[str, Tensor]
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def models() -> list[StateDict]:
    shapes = {EMBEDDING: (6, 4), "layers.0.weight": (5, 4), "layers.0.norm": (4,), "lm_head.weight": (6, 4)}
    return [{**{name: torch.randn(shape) for name, shape in shapes.items()}, "ids": torch.arange(4)} for _ in range(3)]


def refused(
    given: dict[str, Any], out: Path, message: str, error: type[Exception] = ValueError, **options: Any
) -> None:
    """With that sentence, and without a trace on the disk."""
    before, names = files_in(out.parent), sorted(out.parent.rglob("*"))
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        merge(given, out, **options)
    assert files_in(out.parent) == before and sorted(out.parent.rglob("*")) == names


def merged(given: dict[str, Any], out: Path, **options: Any) -> StateDict:
    merge(given, out, **options)
    return load_file(out / "model.safetensors")


def expected(models: list[StateDict]) -> StateDict:
    names = [name for name, x in models[0].items() if x.is_floating_point()]
    floating = [{name: model[name] for name in names} for model in models]
    return merge_state_dicts(floating[0], floating[1:], **TIES)


def assert_merged_as(result: StateDict, models: list[StateDict]) -> None:
    """With the base's integers."""
    for name, tensor in {**expected(models), "ids": models[0]["ids"]}.items():
        assert_same(result.pop(name), tensor, name)
    assert not result


def without(*names: str) -> Callable[[StateDict], None]:
    def drop(expert: StateDict) -> None:
        for name in names:
            del expert[name]

    return drop


def with_(**tensors: Tensor) -> Callable[[StateDict], None]:
    return lambda expert: expert.update({name.replace("__", "."): x for name, x in tensors.items()})


def rows(count: int) -> Callable[[StateDict], None]:
    return with_(model__embed_tokens__weight=torch.full((count, 4), 0.5), lm_head__weight=torch.full((count, 4), 2.0))


def first_rows(expert: StateDict, base: StateDict) -> None:
    """As far as both have them."""
    for name in (EMBEDDING, "lm_head.weight"):
        shared = expert[name][: len(base[name])]
        expert[name] = torch.cat([shared, base[name][len(shared) :]])


def taken_from_base(*names: str) -> Callable[[StateDict, StateDict], None]:
    return lambda expert, base: expert.update({name: base[name] for name in names})


OTHER_ROWS = ", ".join(f"{name!r} of shape [{{0}}, 4] instead of [6, 4]" for name in ("lm_head.weight", EMBEDDING))
# kind, what is done to the expert's file, what is said about it, and what then stands in
DIFFERENCES: list[tuple[str, Any, str, Any]] = [
    ("missing", without("layers.0.norm"), "no 'layers.0.norm'", taken_from_base("layers.0.norm")),
    ("extra", with_(value__head=torch.ones(1)), "'value.head' besides", lambda expert, base: expert.pop("value.head")),
    ("vocabulary", rows(9), OTHER_ROWS.format(9), first_rows),
    ("vocabulary", rows(4), OTHER_ROWS.format(4), first_rows),
    (
        "shape",
        with_(layers__0__weight=torch.ones(4, 5)),
        "'layers.0.weight' of shape [4, 5] instead of [5, 4]",
        taken_from_base("layers.0.weight"),
    ),
    (
        "shape",
        with_(lm_head__weight=torch.ones(6, 5)),
        "'lm_head.weight' of shape [6, 5] instead of [6, 4]",
        taken_from_base("lm_head.weight"),
    ),
    ("buffer", with_(ids=torch.zeros(4, dtype=torch.int64)), "other values in 'ids' of int64", lambda *_: None),
    ("buffer", with_(ids=torch.ones(5)), "other values in 'ids' of int64", lambda *_: None),
]


@pytest.mark.parametrize(("kind", "change", "details", "stand_in"), DIFFERENCES)
def test_differences(
    models: list[StateDict], tmp_path: Path, kind: str, change: Any, details: str, stand_in: Any
) -> None:
    change(models[2])
    folders = save_models(tmp_path, models)
    message = f"models must have the tensors of {folders[0]} unless allowed, got {kind}: {folders[2]} has {details}"
    given, out = ties_recipe(folders), tmp_path / "out"
    by_token = ", or merge by token (tokenizer_source: base)" if kind == "vocabulary" else ""
    way_on = f"{message}; to go on allow {kind}{by_token}"
    refused(given, out, way_on)
    refused(given, out, way_on, allow=["missing" if kind != "missing" else "extra"])
    stand_in(models[2], models[0])
    assert_merged_as(merged(given, out, allow=[kind]), models)


def test_all_differences_at_once(models: list[StateDict], tmp_path: Path) -> None:
    for model in models:
        model["norm"] = torch.ones(4)
    for name in (EMBEDDING, "layers.0.weight", "layers.0.norm", "lm_head.weight"):
        del models[1][name]
    models[2]["value"] = torch.ones(1)
    base, first, second = folders = save_models(tmp_path, models)
    refused(
        ties_recipe(folders),
        tmp_path / "out",
        f"models must have the tensors of {base} unless allowed, got missing: {first} has no 'layers.0.norm', "
        f"no 'layers.0.weight', no 'lm_head.weight' and 1 more; extra: {second} has 'value' besides; "
        "to go on allow missing, extra",
    )
    models[1] |= {name: x for name, x in models[0].items() if name != "ids"}
    del models[2]["value"]
    assert_merged_as(merged(ties_recipe(folders), tmp_path / "out", allow=["missing", "extra"]), models)


def test_what_needs_no_permission(models: list[StateDict], tmp_path: Path) -> None:
    del models[1]["lm_head.weight"], models[1]["ids"]
    models[2] = {name: x.double() if x.is_floating_point() else x for name, x in models[2].items()}
    given = ties_recipe(save_models(tmp_path, models))
    with plan_merge(load_recipe(given)) as plan:
        said = [(d.kind, d.model[-7:], d.sentence.split(" has ")[1], d.consequence) for d in plan.differences]
    tied = "'lm_head.weight' tied to 'model.embed_tokens.weight'"
    assert said[0] == ("tied", "expert0", tied, "the input layer stands in")
    names = ("layers.0.norm", "layers.0.weight", "lm_head.weight")
    wider = ", ".join(f"{name!r} in float64 instead of float32" for name in names)
    assert said[1:] == [("dtype", "expert1", f"{wider} and 1 more", "such tensors are merged in the wider dtype")]
    models[1] |= {"lm_head.weight": models[1][EMBEDDING], "ids": models[0]["ids"]}
    wide = [{name: x.double() if x.is_floating_point() else x for name, x in model.items()} for model in models]
    assert_merged_as(merged(given, tmp_path / "out"), wide)


def test_an_output_layer_that_is_not_tied_is_missing(models: list[StateDict], tmp_path: Path) -> None:
    del models[1]["lm_head.weight"]
    folders = save_models(tmp_path, models, config={"tie_word_embeddings": False})
    refused(
        ties_recipe(folders),
        tmp_path / "out",
        f"models must have the tensors of {folders[0]} unless allowed, got missing: {folders[1]} has "
        "no 'lm_head.weight'; to go on allow missing",
    )


def test_options(models: list[StateDict], tmp_path: Path) -> None:
    given, out = ties_recipe(save_models(tmp_path, models)), tmp_path / "out"
    kinds = "'missing', 'extra', 'vocabulary', 'shape', 'buffer'"
    refused(given, out, f"allow must be one of {kinds}, got 'all'", allow=["all"])
    refused(given, out, "nonfinite must be one of 'error', 'propagate', 'drop', got 'skip'", nonfinite="skip")
    refused(given, out, "max_shard_size must be at least 1 byte, got 0", max_shard_bytes=0)
    refused(given, out, "threads must be at least 1, got 0", threads=0)
    refused(given, out, "device must be 'cpu' or 'cuda', got 'tpu'", device="tpu")
    refused(given, out, "device must be 'cpu' or 'cuda', got 'meta'", device="meta")
    count = torch.cuda.device_count()
    refused(given, out, f"device must be there, got 'cuda:99' with {count} CUDA devices", device="cuda:99")
    merge(given, out)


def test_tensors_that_cannot_be_merged(models: list[StateDict], tmp_path: Path) -> None:
    out = tmp_path / "out"
    integers = save_models(tmp_path, [{"ids": torch.arange(4)}] * 2)
    refused(ties_recipe(integers), out, f"{integers[0]} must have floating-point tensors to merge, got none")
    models[2]["layers.0.norm"] = torch.ones(4, dtype=torch.float8_e4m3fn)
    folders = save_models(tmp_path, models)
    refused(
        ties_recipe(folders),
        out,
        f"'layers.0.norm' of {folders[2]} must be float64, float32, float16 or bfloat16 unless the recipe has a dtype "
        "to cast to, got torch.float8_e4m3fn",
    )
    models[2]["layers.0.norm"] = torch.ones(4)
    assert_merged_as(merged(ties_recipe(folders, dtype="float32"), out), models)


def test_mixed_dtypes_in_one_scope(models: list[StateDict], tmp_path: Path) -> None:
    for model in models:
        model["layers.0.norm"] = model["layers.0.norm"].double()
    given = ties_recipe(save_models(tmp_path, models), scope="model")
    message = "scope must be 'tensor' for a model that mixes float64 with other dtypes, got 'model'"
    refused(given, tmp_path / "out", message)
    merge({**given, "dtype": "float32"}, tmp_path / "out")


def test_dtypes_that_safetensors_lacks(models: list[StateDict], tmp_path: Path) -> None:
    for model in models:
        model["ids"] = torch.ones(2, dtype=torch.complex128)
    folders = [str(save_torch(tmp_path / f"m{i}", model)) for i, model in enumerate(models)]
    message = "'ids' must be of a dtype that safetensors has, got torch.complex128"
    refused(ties_recipe(folders), tmp_path / "out", message)


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_without_anybody_left_the_base_is_copied(models: list[StateDict], tmp_path: Path, scope: str) -> None:
    given = ties_recipe(save_models(tmp_path, models), scope=scope)
    for entry in given["models"]:
        entry["parameters"]["density"] = 0
    for name, tensor in merged(given, tmp_path / "out").items():
        assert_same(tensor, models[0][name], name)


def folder(path: Path) -> None:
    path.mkdir()


def file(path: Path) -> None:
    path.touch()


def dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize("make", [folder, file, dangling_link])
@pytest.mark.parametrize("resume", [False, True])
def test_out_exists(models: list[StateDict], tmp_path: Path, make: Callable[[Path], None], resume: bool) -> None:
    out = tmp_path / "out"
    make(out)
    given = ties_recipe(save_models(tmp_path / "models", models))
    refused(given, out, f"out must not exist, got {str(out)!r}", resume=resume)


def test_where_out_cannot_be(models: list[StateDict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ties_recipe(save_models(tmp_path / "models", models))
    out = tmp_path / "out"
    (tmp_path / "out.partial").mkdir()
    message = f"out must have no unfinished merge beside it, got '{out}.partial': resume it, or remove it"
    refused(given, out, message)
    (tmp_path / "out.partial").rmdir()
    with pytest.raises(ValueError, match=f"^out must be in a folder that exists, got '{tmp_path}/none/out'$"):
        merge(given, tmp_path / "none" / "out")
    with pytest.raises(ValueError, match="^out must not exist, got '/'$"):
        merge(given, "/")
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)  # root may write everywhere
        message = f"out must be in a folder that can be written to, got {str(out)!r}"
        refused(given, out, message, PermissionError)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
        refused(given, out, "out must be on a disk with 768 bytes free, got 100 bytes")
    merge(given, out)


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_inputs_that_change_during_the_merge(models: list[StateDict], tmp_path: Path, scope: str) -> None:
    for model in models:
        del model["ids"]  # compared by the plan; the others are read by the merge first
    given = ties_recipe(save_models(tmp_path, models), scope=scope)
    with plan_merge(load_recipe(given)) as plan:
        os.truncate(tmp_path / "expert1" / "model.safetensors", 100)
        with pytest.raises(OSError, match="/expert1/model.safetensors'? must (not change during|stay the file)"):
            run(plan, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "expert0", "expert1"]
