"""CLIP checkpoints of every format, and which architecture they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPModel

from surgery_kernels.reproduce.clip.declared import names
from surgery_kernels.reproduce.clip.folders import InputError
from surgery_kernels.reproduce.clip.models import (
    VisionEncoder,
    image_processor,
    load_vision,
    logit_scale,
    text_encoder,
    vision_config,
)
from surgery_kernels.reproduce.clip.published import ARCHITECTURES, recognise
from tests.clip_models import ROWS, as_clip, as_projected_tower, as_vision_tower, save_pretrained, tiny_clip, tuned

pytestmark = pytest.mark.any_isa


def as_shards(expert: CLIPModel, folder: Path) -> None:
    expert.save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1


def as_bare_pickle(expert: CLIPModel, folder: Path) -> None:
    as_vision_tower(expert, folder)
    (folder / "model.safetensors").unlink()
    position_ids = {"embeddings.position_ids": torch.arange(5)[None]}  # older versions kept it
    torch.save({**expert.vision_model.state_dict(), **position_ids}, folder / "pytorch_model.bin")


FORMATS: dict[str, Callable[[CLIPModel, Path], None]] = {
    "CLIPModel": as_clip,
    "shards": as_shards,
    "CLIPVisionModel": as_vision_tower,
    "pickle without prefix": as_bare_pickle,
    "CLIPVisionModelWithProjection": as_projected_tower,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_of_an_expert(name: str, clip: CLIPModel, tmp_path: Path) -> None:
    save_pretrained(clip, tmp_path / "pretrained")
    expert = tuned(clip, 5)
    FORMATS[name](expert, tmp_path / "expert")
    base = load_vision(tmp_path / "pretrained")
    state = load_vision(tmp_path / "expert", base)
    assert list(state) == list(base)
    encoder = VisionEncoder(vision_config(tmp_path / "pretrained")).eval()
    encoder.load_state_dict(state)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        pooled = expert.vision_model(pixel_values=images).pooler_output
        torch.testing.assert_close(encoder(images), expert.visual_projection(pooled))


def test_half_precision_is_read_as_float32(clip: CLIPModel, tmp_path: Path) -> None:
    save_pretrained(tuned(clip, 2).half(), tmp_path)
    state = load_vision(tmp_path)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert logit_scale(tmp_path) == pytest.approx(clip.logit_scale.exp().item(), rel=1e-2)


def test_logit_scale_of_a_tower_is_that_of_the_released_models(clip: CLIPModel, tmp_path: Path) -> None:
    as_vision_tower(clip, tmp_path)
    assert logit_scale(tmp_path) == 100


def test_architectures_are_recognised() -> None:
    found = [recognise(768, 12, 32), recognise(768, 12, 16), recognise(1024, 24, 14)]
    assert found == list(ARCHITECTURES) and [one.v2_rank for one in found if one] == [16, 16, 4]
    assert recognise(32, 2, 16) is None
    for architecture in ARCHITECTURES:
        assert set(architecture.averages) <= {*ROWS, *names()}
        assert all(40 < value < 95 for value in architecture.averages.values())


def test_folders_that_are_no_clip(clip: CLIPModel, model_dir: Path, tmp_path: Path) -> None:
    base = load_vision(model_dir / "pretrained")
    wider = tiny_clip(patch_size=16, image_size=32, width=48, depth=2, num_features=16)
    as_vision_tower(wider, tmp_path / "wider")
    with pytest.raises(InputError, match=r"must hold vision_model\.\S+ \(32,\) as the pretrained model, got \(48,\)$"):
        load_vision(tmp_path / "wider", base)
    shallow = tiny_clip(patch_size=16, image_size=32, width=32, depth=1, num_features=16)
    as_vision_tower(shallow, tmp_path / "shallow")
    with pytest.raises(InputError, match=r"layers\.1\.\S+ \(.*\) as the pretrained model, got no such tensor$"):
        load_vision(tmp_path / "shallow", base)
    with pytest.raises(InputError, match=r"must hold visual_projection.weight for the pretrained model, got no"):
        load_vision(tmp_path / "wider")
    with pytest.raises(InputError, match=r"must hold model.safetensors or pytorch_model.bin, got neither$"):
        load_vision(tmp_path, base)
    with pytest.raises(InputError, match=r"must hold a CLIPModel with its text encoder, got none: give --heads$"):
        text_encoder(tmp_path / "wider")
    with pytest.raises(InputError, match=r"must hold preprocessor_config.json, got no such file$"):
        image_processor(tmp_path / "wider")
    save_file({"layer.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"must hold the image encoder of a CLIP model, got no tensor 'vision_model"):
        load_vision(tmp_path, base)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(InputError, match=r"must hold a CLIP model, got 'bert'$"):
        vision_config(tmp_path)
