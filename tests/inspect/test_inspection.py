"""What an inspection counts, against eager PyTorch, and which sentences follow from models made for them."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from surgery_kernels.inspect import Inspection, inspect_models
from surgery_kernels.inspect.facts import as_json
from surgery_kernels.inspect.findings import findings
from surgery_kernels.inspect.numbers import QUANTILES, measure, spectrum, total
from surgery_kernels.inspect.places import kind_of, layer_of
from surgery_kernels.ops.trim import keep_count
from tests.checkpoints import save_lora, save_safetensors
from tests.fighting_models import EXPERTS, LAYERS, SHAPES

pytestmark = pytest.mark.any_isa


def test_numbers(folders: dict[str, str], inspection: Inspection) -> None:
    """All in float64 and by torch's own functions."""
    states = [load_file(f"{folders[name]}/model.safetensors") for name in ("base", *EXPERTS)]
    assert {tensor.name for tensor in inspection.tensors} == set(SHAPES)
    vectors, base_square = [], 0.0
    for tensor in inspection.tensors:
        base, *experts = (state[tensor.name] for state in states)
        changes = torch.stack([(expert - base).nan_to_num(0) for expert in experts]).flatten(1).double()
        vectors.append(changes)
        base_square += base.double().square().sum().item()
        assert torch.allclose(torch.tensor(tensor.numbers.norms, dtype=torch.float64), changes.norm(dim=1), rtol=1e-12)
        size = changes.shape[1]
        quantiles = [[x.kthvalue(math.ceil(q * size)).values.item() for q in QUANTILES] for x in changes.float().abs()]
        assert tensor.quantiles == quantiles, tensor.name
    whole = torch.cat(vectors, dim=1)
    of_whole = inspection.whole
    unit = whole / whole.norm(dim=1, keepdim=True)
    assert torch.allclose(torch.tensor(of_whole.cosines, dtype=torch.float64), unit @ unit.T, rtol=1e-9)
    relative = (whole.norm(dim=1) / math.sqrt(base_square)).tolist()
    assert of_whole.relative == pytest.approx(relative) and of_whole.numel == whole.shape[1]
    up, down = (whole > 0).any(0), (whole < 0).any(0)
    assert of_whole.conflict == pytest.approx(((up & down).sum() / (up | down).sum()).item())
    lesser = torch.minimum(whole.clamp_min(0).sum(0), (-whole).clamp_min(0).sum(0)).sum() / whole.abs().sum()
    assert of_whole.lost == pytest.approx(lesser.item(), rel=1e-6)
    assert of_whole.census.nonfinite.tolist() == [0, 1, 0, 0, 0]


def test_what_ties_keeps(folders: dict[str, str], inspection: Inspection) -> None:
    """Tensor by tensor at the density, as the op does."""
    states = [load_file(f"{folders[name]}/model.safetensors") for name in ("base", *EXPERTS)]
    tensor = next(tensor for tensor in inspection.tensors if "up_proj" in tensor.name)
    base, *experts = (state[tensor.name] for state in states)
    keep = keep_count(base.numel(), 0.2, "paper")
    changes = torch.stack([expert - base for expert in experts]).flatten(1)
    kept = changes.abs() >= changes.abs().sort(dim=1, descending=True).values[:, keep - 1 : keep]
    numbers = tensor.numbers
    assert numbers.census.kept.tolist() == [keep] * 4
    assert numbers.kept_by_any == kept.any(0).double().mean().item()
    assert numbers.kept_by_two == pytest.approx(((kept.sum(0) > 1).sum() / kept.any(0).sum()).item())


def test_sums_are_those_of_the_parts(inspection: Inspection) -> None:
    assert list(inspection.by_layer) == list(range(LAYERS))
    assert set(inspection.by_kind) == {"head", "embedding", "norm", "attention", "MLP"}
    assert sum(of.numel for of in inspection.by_kind.values()) == inspection.whole.numel
    of_kinds = total(inspection.by_kind.values())
    assert torch.equal(of_kinds.census.both, inspection.whole.census.both)


def test_sentences(inspection: Inspection) -> None:
    said = {found.rule: found.sentence for found in findings(inspection)}
    assert said["nonfinite"] == "expert 1 has 1 NaN or infinite values, in model.norm.weight"
    assert re.fullmatch(r"experts 3 and 4 are nearly the same \(cosine (0\.99\d\d|1\.0000)\)", said["alike"])
    assert re.fullmatch(
        r"conflict is in layers 5-6, where \d\d% of the change goes against the rest of it "
        r"\(\d% in the median layer\): lower their density",
        said["conflict"],
    )
    assert re.fullmatch(
        r"the head dominates the change: 9\d% of its square, in \d+% of the parameters", said["dominates"]
    )
    assert set(said) == {"nonfinite", "alike", "conflict", "dominates"}


def changed(folder: Path, base: str, name: str, **changes: Any) -> str:
    state = load_file(f"{base}/model.safetensors")
    for key in state:
        state[key] = changes["change"](state[key]) if not changes.get("only") or changes["only"] in key else state[key]
    (folder / name).mkdir()
    save_safetensors(folder / name, state)
    return str(folder / name)


def test_more_sentences(tmp_path: Path, folders: dict[str, str]) -> None:
    def noise(seed: int, scale: float = 0.01) -> Any:
        generator = torch.Generator().manual_seed(seed)
        return lambda x: x + scale * torch.randn(x.shape, generator=generator)

    base = folders["base"]
    same = changed(tmp_path, base, "same", change=lambda x: x)
    few = changed(tmp_path, base, "few", change=noise(1), only="self_attn")
    one, other = (changed(tmp_path, base, f"noise{i}", change=noise(i)) for i in (2, 3))
    loud = changed(tmp_path, base, "loud", change=noise(4, 0.9))
    same_noise = noise(2)
    back = changed(tmp_path, base, "back", change=lambda x: x - same_noise(torch.zeros_like(x)))
    hot = changed(
        tmp_path, base, "hot", change=lambda x: torch.full_like(x, torch.finfo(x.dtype).max), only="norm.weight"
    )

    def said(*models: str) -> dict[str, str]:
        return {found.rule: found.sentence for found in findings(inspect_models(models, base))}

    assert said(same, one)["unchanged"] == "expert 1 changes nothing: it is the base"
    assert said(one, one)["same"] == "experts 1 and 2 are the same"
    assert re.fullmatch(r"expert 1 leaves \d\d% of the entries as they are", said(few, one)["sparse"])
    assert re.fullmatch(r"the experts have little in common \(.*\): their sum keeps .*", said(one, other)["apart"])
    assert re.fullmatch(r"expert 3 changes \d\d\.\d times as much as the others: .*", said(one, other, loud)["loud"])
    assert re.fullmatch(r"expert 1 lies far from the base, 0\.9\d? of its length: .*", said(loud)["far"])
    assert re.fullmatch(r"experts 1 and 2 undo one another \(cosine -1\.00\): .*", said(one, back)["fighting"])
    assert "values at the limit of their dtype, in model." in said(hot)["saturated"]


def test_a_base_among_the_models(folders: dict[str, str]) -> None:
    """The first, where none is given; adapters lie over it."""
    found = inspect_models([folders["base"], folders["code"]])
    assert (found.base, found.experts) == (folders["base"], [folders["code"]])


def test_an_adapter(tmp_path: Path, folders: dict[str, str]) -> None:
    layer = "model.layers.2.self_attn.q_proj"
    adapter = save_lora(tmp_path / "adapter", {layer: (torch.ones(2, 16), torch.ones(16, 2))})
    found = inspect_models([f"{folders['base']}+{adapter}"], folders["base"])
    assert [tensor.name for tensor in found.tensors if tensor.numbers.norms[0]] == [f"{layer}.weight"]
    assert found.by_layer[2].changed[0] > 0 == found.by_layer[3].changed[0]


def test_what_only_one_has(tmp_path: Path, folders: dict[str, str]) -> None:
    state = load_file(f"{folders['code']}/model.safetensors")
    state["extra.weight"] = state.pop("model.norm.weight")
    (tmp_path / "other").mkdir()
    save_file(state, tmp_path / "other" / "model.safetensors")
    found = inspect_models([str(tmp_path / "other")], folders["base"])
    assert {difference.kind for difference in found.differences} == {"missing", "extra"}
    assert {"missing", "extra"} <= {finding.rule for finding in findings(found)}


def test_spectra() -> None:
    left, right = torch.randn(30, 2, generator=torch.Generator().manual_seed(0)), torch.randn(2, 20)
    base = torch.randn(30, 20)
    found = spectrum(base, base + left @ right)
    values = torch.linalg.svdvals((left @ right).double())
    assert found.stable_rank == pytest.approx((values.square().sum() / values[0] ** 2).item(), rel=1e-3)
    assert found.leading == pytest.approx(1, abs=1e-4) and spectrum(base, base).stable_rank == 0
    state = torch.get_rng_state()
    assert spectrum(base, base + left @ right) == found and torch.equal(torch.get_rng_state(), state)


def test_empty_tensors() -> None:
    numbers, quantiles = measure(torch.zeros(0, 3), [torch.zeros(0, 3)] * 2, 0.2)
    assert numbers.norms == [0, 0] and numbers.conflict == 0 and quantiles == [[0.0] * 3] * 2


def test_as_json(inspection: Inspection) -> None:
    """All of it, in numbers that JSON has."""
    facts = json.loads(json.dumps(as_json(inspection)))
    assert len(facts["tensors"]) == len(SHAPES) and facts["model"]["cosines"][2][3] > 0.98
    assert {finding["rule"] for finding in facts["findings"]} == {found.rule for found in findings(inspection)}


@pytest.mark.parametrize(
    ("name", "kind", "layer"),
    [
        ("model.layers.12.self_attn.q_proj.weight", "attention", 12),
        ("model.layers.1.mlp.experts.3.up_proj.weight", "MLP", 1),
        ("model.layers.1.mlp.gate.weight", "router", 1),
        ("model.layers.1.mlp.gate_proj.weight", "MLP", 1),
        ("model.layers.1.post_attention_layernorm.weight", "norm", 1),
        ("lm_head.weight", "head", None),
        ("model.embed_tokens.weight", "embedding", None),
        ("visual.transformer.resblocks.3.attn.in_proj_weight", "attention", 3),
        ("vision_model.encoder.layers.0.mlp.fc1.weight", "MLP", 0),
        ("blocks.5.norm1.bias", "norm", 5),
        ("something", "other", None),
    ],
)
def test_places(name: str, kind: str, layer: int | None) -> None:
    assert (kind_of(name), layer_of(name)) == (kind, layer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"models": ["a"]}, "models must be two at least without a base, got 1"),
        ({"models": [], "base": "a"}, "models must be one at least, got none"),
        ({"models": ["b"], "base": "a", "density": 0}, r"density must be in \(0, 1\], got 0"),
        ({"models": ["b"], "base": "a"}, ".*a.*"),
    ],
    ids=str,
)
def test_errors(arguments: Any, message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        inspect_models(**arguments)
