"""Models of several components and of other libraries: as these save them, merged, and loaded by them again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from surgery_kernels.checkpoint import merge
from surgery_kernels.checkpoint.plan import plan_merge
from surgery_kernels.checkpoint.reading.opening import open_checkpoint
from surgery_kernels.checkpoint.run import run
from surgery_kernels.recipes import load_recipe
from tests.cases import assert_same
from tests.checkpoints import ADDED, files_in, save_safetensors

pytestmark = pytest.mark.any_isa


def halves(models: Sequence[Path | str], **keys: Any) -> dict[str, Any]:
    """Half of each of two models."""
    entries = [{"model": str(model), "parameters": {"weight": 0.5}} for model in models]
    return {"merge_method": "linear", "models": entries, **keys}


def check_mean(merged: Mapping[str, Tensor], models: Sequence[Mapping[str, Tensor]]) -> None:
    assert merged.keys() == models[0].keys()
    for name, tensor in merged.items():
        if tensor.is_floating_point():
            assert_same(tensor, ((models[0][name].double() + models[1][name].double()) / 2).to(tensor.dtype), name)


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Stable diffusion, very small, twice."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("diffusers")
    (folder / "vocab.json").write_text(json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    text = {"vocab_size": 3, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        pipeline = diffusers.StableDiffusionPipeline(
            vae=diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4),
            text_encoder=CLIPTextModel(CLIPTextConfig(**text, bos_token_id=0, eos_token_id=1)),
            tokenizer=CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")),
            unet=diffusers.UNet2DConditionModel(
                block_out_channels=(4,),
                layers_per_block=1,
                down_block_types=("CrossAttnDownBlock2D",),
                up_block_types=("CrossAttnUpBlock2D",),
                cross_attention_dim=8,
                attention_head_dim=2,
                norm_num_groups=2,
            ),
            scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        found.append(folder / f"model{seed}")
        pipeline.save_pretrained(found[-1])
        pipeline.save_pretrained(found[-1], variant="fp16")
    return found


COMPONENTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def components(pipeline: Any) -> list[dict[str, Tensor]]:
    return [getattr(pipeline, component).state_dict() for component in COMPONENTS]


def test_a_pipeline(pipelines: list[Path], tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    again = pipelines[0] / "sd.safetensors"
    again.write_bytes(b"the same model in one file")
    with pytest.warns(UserWarning, match=f"^the result goes without these files of {pipelines[0]}: sd.safetensors$"):
        merge(halves(pipelines), tmp_path / "out")
    again.unlink()
    names = set(files_in(tmp_path / "out"))
    weights = {f"{component}/{stem}.safetensors" for component, stem in COMPONENTS.items()}
    assert {name for name in names if name.endswith(".safetensors")} == weights
    kept = {name for name in files_in(pipelines[0]) if not name.endswith(".safetensors")}
    assert names == kept | weights | ADDED and "tokenizer/tokenizer.json" in kept
    for name in kept:
        assert (tmp_path / "out" / name).read_bytes() == (pipelines[0] / name).read_bytes()
    loaded = [StableDiffusionPipeline.from_pretrained(folder) for folder in (tmp_path / "out", *pipelines)]
    for merged, *models in zip(*map(components, loaded), strict=True):
        check_mean(merged, models)


def test_shards_dtypes_and_resuming_by_component(
    pipelines: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import StableDiffusionPipeline

    from surgery_kernels.checkpoint.writing import writer

    given = halves(pipelines, out_dtype="bfloat16")
    merge(given, tmp_path / "whole", max_shard_bytes=1500)
    for component, stem in COMPONENTS.items():
        index = tmp_path / "whole" / component / f"{stem}.safetensors.index.json"
        weight_map = json.loads(index.read_text())["weight_map"]
        shards = sorted(set(weight_map.values()))
        assert shards == [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        for shard in shards:
            assert set(load_file(index.parent / shard)) == {name for name, file in weight_map.items() if file == shard}
    config = json.loads((tmp_path / "whole" / "text_encoder" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    unet = Path("unet/config.json")
    assert (tmp_path / "whole" / unet).read_bytes() == (pipelines[0] / unet).read_bytes()
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "whole", dtype=torch.bfloat16)
    assert loaded.unet.conv_in.weight.dtype == torch.bfloat16

    write_at, calls = writer._write_at, []
    monkeypatch.setattr(writer, "SYNC_BYTES", 1)

    def failing(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 60:
            raise OSError("the disk is gone")
        write_at(*arguments)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="gone"):
        patch.setattr(writer, "_write_at", failing)
        merge(given, tmp_path / "out", max_shard_bytes=1500)
    merge(given, tmp_path / "out", max_shard_bytes=1500, resume=True)
    whole, resumed = files_in(tmp_path / "whole"), files_in(tmp_path / "out")
    del whole["README.md"], resumed["README.md"]  # it has the name of the folder
    assert resumed == whole


def test_variants_and_single_components(pipelines: list[Path], tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(pipelines[1], half)
    for component, stem in COMPONENTS.items():
        (half / component / f"{stem}.safetensors").unlink()
        assert (half / component / f"{stem}.fp16.safetensors").exists()
    merge(halves([pipelines[0], half]), tmp_path / "of_variants")
    merge(halves(pipelines), tmp_path / "expected")
    for component, stem in COMPONENTS.items():
        whole = tmp_path / "expected" / component / f"{stem}.safetensors"
        assert (tmp_path / "of_variants" / component / f"{stem}.safetensors").read_bytes() == whole.read_bytes()
        for number, end in enumerate((component, f"{component}/{stem}.safetensors")):
            out = tmp_path / f"{component}{number}"
            merge(halves([folder / end for folder in pipelines]), out)
            assert (out / f"{stem}.safetensors").read_bytes() == whole.read_bytes()
            assert json.loads((out / "config.json").read_text())


def test_parts_that_are_missing(pipelines: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "a"
    shutil.copytree(pipelines[0], folder)
    shutil.rmtree(folder / "vae")
    message = f"{folder / 'vae'} must be a folder with the AutoencoderKL of {folder}, got none"
    with pytest.raises(FileNotFoundError, match=f"^{message}$"):
        open_checkpoint(folder)
    (folder / "vae").symlink_to(pipelines[1] / "vae")
    message = message.replace("got none", "got a link: put a copy in its place")
    with pytest.raises(FileNotFoundError, match=f"^{message}$"):
        open_checkpoint(folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(
        json.dumps({**index, "../unet": ["diffusers", "UNet"], "vae": [None, None]})
    )
    with pytest.raises(ValueError, match=r"model_index\.json must name folders beside it, got '../unet'$"):
        open_checkpoint(folder)


def test_a_quantized_component(pipelines: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "a"
    shutil.copytree(pipelines[0], folder)
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    assert open_checkpoint(folder).config == {"quantization_config": {"quant_method": "fp8"}}
    assert open_checkpoint(pipelines[0]).config is None


def test_sentence_transformers(tmp_path: Path) -> None:
    """The dense layer lies in a folder of its own, and is merged too."""
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red"]))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    config = BertConfig(vocab_size=6, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    folders = []
    for seed in range(2):
        torch.manual_seed(seed)
        BertModel(config).save_pretrained(tmp_path / "bert")
        modules = [Transformer(str(tmp_path / "bert")), Pooling(8, "cls"), Dense(8, 4)]
        folders.append(tmp_path / f"model{seed}")
        library.SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folders[-1]))
    merge(halves(folders), tmp_path / "out")
    names = set(files_in(tmp_path / "out"))
    assert names == {*files_in(folders[0]), *ADDED} and {"1_Pooling/config.json", "2_Dense/model.safetensors"} <= names
    loaded = [library.SentenceTransformer(str(folder), device="cpu") for folder in (tmp_path / "out", *folders)]
    merged, *models = (model.state_dict() for model in loaded)
    check_mean(merged, models)
    assert loaded[0].encode(["red"]).shape == (1, 4)
    (folders[1] / "modules.json").write_text('[{"path": ""}, {"path": "../model0"}]')
    with pytest.raises(ValueError, match=r"modules\.json must name folders beside it, got '\.\.'$"):
        open_checkpoint(folders[1])


def test_modules_in_folders_of_their_own(tmp_path: Path) -> None:
    """As older versions wrote them, where the model's own folder holds no weights; exports are not the model."""
    folders = []
    for seed in range(2):
        folders.append(tmp_path / f"model{seed}")
        weight = {"embeddings.weight": torch.randn(4, 4)}
        save_safetensors(folders[-1] / "0_Transformer", weight, config={"model_type": "bert"})
        save_safetensors(folders[-1] / "1_Router" / "query_0_Dense", {"linear.weight": torch.randn(2, 2)}, config={})
        (folders[-1] / "0_Transformer" / "openvino").mkdir()
        (folders[-1] / "0_Transformer" / "openvino" / "openvino_model.bin").write_bytes(b"the same model")
        (folders[-1] / "modules.json").write_text('[{"path": "0_Transformer"}, {"path": "1_Router"}]')
    merge(halves(folders), tmp_path / "out")
    expected = {"0_Transformer", "1_Router/query_0_Dense"}
    files = {f"{folder}/{file}" for folder in expected for file in ("model.safetensors", "config.json")}
    assert set(files_in(tmp_path / "out")) == {"modules.json", *ADDED, *files}
    for folder in expected:
        merged, *models = (load_file(root / folder / "model.safetensors") for root in (tmp_path / "out", *folders))
        check_mean(merged, models)
    shutil.rmtree(folders[0] / "0_Transformer")
    (folders[0] / "modules.json").write_text('[{"path": ""}, {"path": "1_Router"}]')
    with pytest.raises(FileNotFoundError, match="got a folder with models in 1_Router: name one of those$"):
        open_checkpoint(folders[0])


def test_timm(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    from timm.models import save_for_hf

    folders = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = timm.create_model("test_vit", num_classes=3)
        folders.append(tmp_path / f"model{seed}")
        save_for_hf(model, str(folders[-1]), safe_serialization=[True, False][seed])
    merge(halves(folders), tmp_path / "out")
    loaded = [timm.create_model(f"local-dir:{folder}", pretrained=True) for folder in (tmp_path / "out", folders[0])]
    expected = torch.load(folders[1] / "pytorch_model.bin", weights_only=True)
    check_mean(loaded[0].state_dict(), [loaded[1].state_dict(), expected])


def test_open_clip(tmp_path: Path) -> None:
    pytest.importorskip("open_clip", reason="open_clip is not installed")
    from open_clip import create_model

    vision = {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8}
    text = {"context_length": 5, "vocab_size": 20, "width": 64, "heads": 1, "layers": 1}
    config = {"model_cfg": {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {}}
    folders = [tmp_path / "model0", tmp_path / "model1"]
    for folder in folders:
        folder.mkdir()
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        tensors = create_model(f"local-dir:{folder}", load_weights=False).state_dict()
        save_file({name: x.clone() for name, x in tensors.items()}, folder / "open_clip_model.safetensors")
    tensors = load_file(folders[1] / "open_clip_model.safetensors")
    (folders[1] / "open_clip_model.safetensors").unlink()
    torch.save({"state_dict": tensors, "epoch": 7}, folders[1] / "open_clip_pytorch_model.bin")
    merge(halves(folders), tmp_path / "out")
    assert set(files_in(tmp_path / "out")) == {"open_clip_config.json", "open_clip_model.safetensors", *ADDED}
    merged = create_model(f"local-dir:{tmp_path / 'out'}").state_dict()
    check_mean(merged, [load_file(folders[0] / "open_clip_model.safetensors"), tensors])


@pytest.mark.parametrize("file", ["consolidated.safetensors", "consolidated.00.pth"])
def test_consolidated_files(tmp_path: Path, file: str) -> None:
    folders, models = [tmp_path / "model0", tmp_path / "model1"], []
    for folder in folders:
        folder.mkdir()
        models.append({"layers.0.attention.wq.weight": torch.randn(3, 3)})
        (save_file if file.endswith("safetensors") else torch.save)(models[-1], folder / file)
        (folder / "params.json").write_text('{"dim": 3}')
        (folder / "tekken.json").write_text("{}")
    merge(halves(folders), tmp_path / "out")
    assert set(files_in(tmp_path / "out")) == {"consolidated.safetensors", "params.json", "tekken.json", *ADDED}
    check_mean(load_file(tmp_path / "out" / "consolidated.safetensors"), models)
    torch.save(models[0], folders[0] / "consolidated.01.pth")
    if file.endswith("pth"):
        with pytest.raises(
            ValueError, match=r"got consolidated\.00\.pth, consolidated\.01\.pth, \.\.\., which hold slic"
        ):
            open_checkpoint(folders[0])


def test_single_files_with_what_is_beside_them(tmp_path: Path) -> None:
    """A checkpoint of a training, with the configuration of its own name and the licence; nothing of its neighbours."""
    models = [{"model.diffusion_model.w": torch.randn(3, 3)} for _ in range(2)]
    save_file(models[0], tmp_path / "a.safetensors")
    torch.save(
        {"state_dict": models[1], "global_step": 3, "optimizer_states": [{"a": torch.ones(2)}]}, tmp_path / "b.ckpt"
    )
    for name in ("a.yaml", "b.yaml", "LICENSE.md", "README.md"):
        (tmp_path / name).write_text(name)
    merge(halves([tmp_path / "a.safetensors", tmp_path / "b.ckpt"]), tmp_path / "out")
    assert set(files_in(tmp_path / "out")) == {"model.safetensors", "model.yaml", "LICENSE.md", *ADDED}
    assert (tmp_path / "out" / "model.yaml").read_text() == "a.yaml"
    check_mean(load_file(tmp_path / "out" / "model.safetensors"), models)


def test_companions_are_part_of_what_the_disk_must_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    folders = [save_safetensors(tmp_path / name, {"w": torch.ones(4)}, config={}) for name in "ab"]
    (folders[0] / "tokenizer.json").write_bytes(b" " * 10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5000))
    with (
        plan_merge(load_recipe(halves(folders))) as plan,
        pytest.raises(ValueError, match=r"disk with 10\.\d+ KB free"),
    ):
        run(plan, tmp_path / "out")
