"""What models compute is no weight: the donor's is kept. A model that has nothing in common is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import Tensor

from surgery_kernels.checkpoint import merge
from surgery_kernels.checkpoint.differences import ALLOWABLE
from surgery_kernels.checkpoint.plan import plan_merge
from surgery_kernels.cli import main
from surgery_kernels.recipes import load_recipe
from tests.checkpoints import save_models

pytestmark = pytest.mark.any_isa

IDS = "cond_stage_model.transformer.text_model.embeddings.position_ids"
COMPUTED = {
    IDS: torch.arange(77.0)[None],
    "bert.embeddings.token_type_ids": torch.zeros(1, 8),
    "swin.layers.0.attn.relative_position_index": torch.arange(16.0).view(4, 4),
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.tensor([1.0, 0.1]),
    "model.rotary_emb.original_inv_freq": torch.tensor([1.0, 0.1]),
    "freqs_cis": torch.rand(4),
    "model.layers.0.self_attn.rotary_emb.cos_cached": torch.rand(4),
    "bn.num_batches_tracked": torch.tensor(5.0),
    "transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4).tril(),
    "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    "cond_stage_model.model.attn_mask": torch.full((4, 4), -torch.inf).triu(1),
    "alphas_cumprod": torch.rand(10),
    "sqrt_recipm1_alphas_cumprod": torch.rand(10),
    "posterior_mean_coef1": torch.rand(10),
    "model_ema.decay": torch.tensor(0.9999),
}
# their names only look like it
LEARNED = {
    "transformer.h.0.attn.c_attn.bias": torch.rand(4),
    "blocks.0.attn.bias": torch.rand(4),
    "swin.layers.0.attn.relative_position_bias_table": torch.rand(4, 4),
    "model.position_embeddings.weight": torch.rand(4, 4),
    "bn.running_mean": torch.rand(4),
    "kids.weight": torch.rand(4),
    "model.layers.0.mlp.gate.e_score_correction_bias": torch.rand(4),
}


def linear(folders: list[str], weight: float, **keys: Any) -> dict[str, Any]:
    models = [{"model": folder, "parameters": {"weight": weight}} for folder in folders]
    return {"merge_method": "linear", "models": models, "parameters": {"normalize": False}, **keys}


def changed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor + 1 for name, tensor in tensors.items()}


def test_what_is_computed_is_the_donors(tmp_path: Path) -> None:
    folders = save_models(tmp_path, [{**COMPUTED, **LEARNED}, {**changed(COMPUTED), **changed(LEARNED)}])
    merge(linear(folders, 1.0, dtype="bfloat16"), tmp_path / "out")
    result = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in COMPUTED.items():
        assert result[name].dtype == torch.float32 and torch.equal(result[name], tensor), name
    for name, tensor in LEARNED.items():
        assert result[name].dtype == torch.bfloat16
        torch.testing.assert_close(result[name].float(), 2 * tensor + 1, rtol=0.02, atol=0.02)


def test_a_difference_in_it_is_noted(tmp_path: Path) -> None:
    folders = save_models(tmp_path, [{**COMPUTED, **LEARNED}, {**COMPUTED, **LEARNED, IDS: COMPUTED[IDS] + 1}])
    with plan_merge(load_recipe(linear(folders, 0.5))) as plan:
        (difference,) = plan.differences
    assert difference.sentence == f"{folders[1]} has other values in {IDS!r} of float32"
    assert difference.consequence == f"they are not learned, and those of {folders[0]} are kept"


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.int64), (torch.int64, torch.float32)])
def test_dtypes_of_it_may_differ(tmp_path: Path, dtypes: Any) -> None:
    folders = save_models(tmp_path, [{IDS: COMPUTED[IDS].to(dtype), "w": torch.ones(2)} for dtype in dtypes])
    merge(linear(folders, 0.7), tmp_path / "out")
    result = load_file(tmp_path / "out" / "model.safetensors")[IDS]
    assert result.dtype == dtypes[0] and torch.equal(result.long(), COMPUTED[IDS].long())


def test_it_is_merged_where_that_is_asked_for(tmp_path: Path) -> None:
    finite = {name: tensor for name, tensor in COMPUTED.items() if bool(tensor.isfinite().all())}
    folders = save_models(tmp_path, [finite, changed(finite)])
    (tmp_path / "r.yml").write_text(str(linear(folders, 0.5)).replace("False", "false"))
    out = CliRunner().invoke(main, ["merge", str(tmp_path / "r.yml"), str(tmp_path / "out"), "--merge-computed"])
    assert out.exit_code == 0, out.output
    result = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in finite.items():
        torch.testing.assert_close(result[name], tensor + 0.5)


def test_what_a_model_lacks_of_it_is_said(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    folders = save_models(tmp_path, [{name: torch.ones(2), "w": torch.ones(2)}, {"w": torch.ones(2)}])
    with pytest.raises(ValueError, match=f"got missing: {re.escape(folders[1])} has no {name!r}; to go on allow miss"):
        merge(linear(folders, 0.5), tmp_path / "out")
    merge(linear(folders, 0.5), tmp_path / "out", allow=["missing"])
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[name], torch.ones(2))


@pytest.mark.parametrize("allow", [(), ("missing", "extra"), tuple(ALLOWABLE)])
@pytest.mark.parametrize(
    ("theirs", "way_on"),
    [
        ("model.layers.0.mlp.weight", ": its '{theirs}' may be the '{ours}' there, under another name"),
        ("other.weight", ""),
    ],
)
def test_a_model_that_takes_part_in_nothing_is_refused(tmp_path: Path, allow: Any, theirs: str, way_on: str) -> None:
    ours = "language_model.model.layers.0.mlp.weight"
    common = {IDS: COMPUTED[IDS]}  # is not learned from anybody
    base, same, stranger = ({**common, name: torch.rand(3)} for name in (ours, ours, theirs))
    folders = save_models(tmp_path, [base, same, stranger])
    recipe = {"merge_method": "task_arithmetic", "base_model": folders[0]}
    models = [{"model": folder, "parameters": {"weight": 1}} for folder in folders[1:]]
    way_on = way_on.format(ours=ours, theirs=theirs)
    message = f"models must have tensors of {folders[0]} to take part, got none in {folders[2]}{way_on}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        merge({**recipe, "models": models}, tmp_path / "out", allow=allow)
