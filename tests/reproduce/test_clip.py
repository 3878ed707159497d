"""The experiment on CLIP, end to end on models and images made here."""

from __future__ import annotations

import io
import json
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, CLIPVisionModel, CLIPVisionModelWithProjection

from surgery_kernels import merge_state_dicts
from surgery_kernels.merging import Learned
from surgery_kernels.reproduce.__main__ import main
from surgery_kernels.reproduce.clip import images as clip_images
from surgery_kernels.reproduce.clip import published
from surgery_kernels.reproduce.clip.folders import InputError, find_tasks
from surgery_kernels.reproduce.clip.heads import TextHeads, head_from_text, read_head
from surgery_kernels.reproduce.clip.images import Decoder, class_names, open_images
from surgery_kernels.reproduce.clip.methods import MERGES, METHODS
from surgery_kernels.reproduce.clip.models import (
    ImageProcessor,
    VisionEncoder,
    image_processor,
    load_vision,
    logit_scale,
    text_encoder,
    vision_config,
)
from surgery_kernels.reproduce.clip.published import ARCHITECTURES, TASKS, Architecture, canonical, recognise
from surgery_kernels.reproduce.clip.templates import TEMPLATES
from surgery_kernels.surgery import SurgeryAdapters

pytestmark = pytest.mark.any_isa

CLASSES = {"mnist": ["0", "1", "2"], "eurosat": ["Forest", "SeaLake"], "dtd": ["banded", "polka_dotted", "woven"]}
LABELS_OF_DTD = [2, 0, 1, 0, 2, 1, 1]
IMAGES_PER_CLASS = 5
ROWS = [*METHODS[:2], *(f"{name}{suffix}" for name in MERGES for suffix in ("", " + Surgery", " + SurgeryV2"))]


def tiny_tokenizer() -> CLIPTokenizer:
    characters = [chr(code) for code in range(33, 127)]
    tokens = [*characters, *(f"{character}</w>" for character in characters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[], model_max_length=48)


def tiny_clip(*, patch_size: int, image_size: int, width: int, depth: int, num_features: int) -> CLIPModel:
    tokens = len(tiny_tokenizer())
    text = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": tokens,
        "bos_token_id": tokens - 2,
        "eos_token_id": tokens - 1,
        "max_position_embeddings": 48,
    }
    vision = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": 2,
        "image_size": image_size,
        "patch_size": patch_size,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=num_features)).eval()


def save_pretrained(clip: CLIPModel, folder: Path) -> None:
    size = clip.config.vision_config.image_size
    clip.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    ImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}).save_pretrained(folder)


def tuned(clip: CLIPModel, seed: int) -> CLIPModel:
    """A copy with another image tower; text tower and projection stay."""
    generator = torch.Generator().manual_seed(seed)
    expert = CLIPModel(clip.config).eval()
    expert.load_state_dict(clip.state_dict())
    with torch.no_grad():
        for parameter in expert.vision_model.parameters():
            parameter += 0.3 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return expert


def as_clip(expert: CLIPModel, folder: Path) -> None:
    expert.save_pretrained(folder)


def as_shards(expert: CLIPModel, folder: Path) -> None:
    expert.save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1


def as_vision_tower(expert: CLIPModel, folder: Path) -> None:
    tower = CLIPVisionModel(expert.config.vision_config)
    tower.load_state_dict(expert.vision_model.state_dict())
    tower.save_pretrained(folder)


def as_bare_pickle(expert: CLIPModel, folder: Path) -> None:
    as_vision_tower(expert, folder)
    (folder / "model.safetensors").unlink()
    position_ids = {"embeddings.position_ids": torch.arange(5)[None]}  # older versions kept it
    torch.save({**expert.vision_model.state_dict(), **position_ids}, folder / "pytorch_model.bin")


def as_projected_tower(expert: CLIPModel, folder: Path) -> None:
    config = vision_config_of(expert)
    projected = CLIPVisionModelWithProjection(config)
    projected.vision_model.load_state_dict(expert.vision_model.state_dict())
    projected.visual_projection.load_state_dict(expert.visual_projection.state_dict())
    projected.save_pretrained(folder)


def vision_config_of(clip: CLIPModel) -> Any:
    config = clip.config.vision_config
    config.projection_dim = clip.config.projection_dim
    return config


FORMATS: dict[str, Callable[[CLIPModel, Path], None]] = {
    "CLIPModel": as_clip,
    "shards": as_shards,
    "CLIPVisionModel": as_vision_tower,
    "pickle without prefix": as_bare_pickle,
    "CLIPVisionModelWithProjection": as_projected_tower,
}


def picture(task: int, label: int, index: int) -> Image.Image:
    generator = np.random.default_rng((task, label, index))
    pixels = generator.integers(0, 256, (40, 52, 3)) // 2 + 40 * label
    return Image.fromarray(pixels.astype(np.uint8)).convert("L" if index == 0 else "RGB")


def save_classes(folder: Path, task: int, classes: list[str], per_class: int = IMAGES_PER_CLASS) -> None:
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(per_class):
            picture(task, label, index).save(folder / name / f"{index}.{'jpg' if index == 1 else 'png'}")


def save_dataset(folder: Path, task: int, classes: list[str], labels: list[int]) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets reads what its save_to_disk wrote; it is optional")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)})
    rows = {"image": [picture(task, label, index) for index, label in enumerate(labels)], "label": labels}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(folder))


@pytest.fixture(autouse=True)
def one_thread(restored_threads: None) -> None:
    """Matrices this small only lose by a second one."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def clip() -> CLIPModel:
    torch.manual_seed(0)
    return tiny_clip(patch_size=16, image_size=32, width=32, depth=2, num_features=16)


@pytest.fixture(scope="module")
def experts(clip: CLIPModel) -> dict[str, CLIPModel]:
    return {name: tuned(clip, seed) for seed, name in enumerate(CLASSES)}


@pytest.fixture(scope="module")
def model_dir(clip: CLIPModel, experts: dict[str, CLIPModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_pretrained(clip, folder / "pretrained")
    as_clip(experts["mnist"], folder / "mnist")
    as_vision_tower(experts["eurosat"], folder / "pretrained_eurosat")
    as_projected_tower(experts["dtd"], folder / "DTD")
    return folder


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    save_classes(folder / "mnist" / "test", 0, CLASSES["mnist"])
    save_classes(folder / "mnist" / "train", 7, CLASSES["mnist"], 2)
    save_classes(folder / "eurosat" / "test", 1, CLASSES["eurosat"])
    save_classes(folder / "eurosat" / "train", 8, CLASSES["eurosat"], 2)
    (folder / "eurosat" / "classnames.json").write_text('{"Forest": "forest", "SeaLake": "lake or sea"}')
    save_dataset(folder / "dtd" / "test", 2, CLASSES["dtd"], LABELS_OF_DTD)
    save_dataset(folder / "dtd" / "train", 9, CLASSES["dtd"], [0, 1, 2])
    return folder


def result_folder(out: Path) -> Path:
    """Of the last run."""
    return max(out.glob("clip-*"), key=lambda folder: (folder / "results.json").stat().st_mtime_ns)


@pytest.fixture
def run(model_dir: Path, data_dir: Path, tmp_path: Path) -> Iterator[Callable[..., dict[str, Any]]]:
    def run(*arguments: str) -> dict[str, Any]:
        main(["clip", f"--model-dir={model_dir}", f"--data-dir={data_dir}", f"--out={tmp_path}", *arguments])
        return json.loads((result_folder(tmp_path) / "results.json").read_text())

    yield run


@torch.no_grad()
def expected_accuracy(vision: CLIPModel, text: CLIPModel, folder: Path, task: str, prompts: list[list[str]]) -> float:
    """By transformers alone: pictures through the processor, one class after the other."""
    processor, tokenizer = image_processor(folder), tiny_tokenizer()
    number = list(CLASSES).index(task)
    labels = LABELS_OF_DTD if task == "dtd" else [c for c in range(len(CLASSES[task])) for _ in range(IMAGES_PER_CLASS)]
    indices = range(len(labels)) if task == "dtd" else [index % IMAGES_PER_CLASS for index in range(len(labels))]
    pictures = []
    for label, index in zip(labels, indices, strict=True):
        image = picture(number, label, index)
        if task != "dtd" and index == 1:
            image = through_jpeg(image)
        pictures.append(image.convert("RGB"))
    pixels = processor(pictures, return_tensors="pt")["pixel_values"]
    features = vision.visual_projection(vision.vision_model(pixel_values=pixels).pooler_output)
    rows = []
    for sentences in prompts:
        tokens = tokenizer(sentences, padding=True, return_tensors="pt")
        embedded = text.text_projection(text.text_model(**tokens).pooler_output)
        mean = (embedded / embedded.norm(dim=1, keepdim=True)).mean(0)
        rows.append(mean / mean.norm())
    cosine = F.normalize(features, dim=1) @ torch.stack(rows).T
    return 100 * (cosine.argmax(1) == torch.tensor(labels)).double().mean().item()


def through_jpeg(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "jpeg")
    return Image.open(buffer)


PROMPTS = {
    "mnist": [[f'a photo of the number: "{digit}".'] for digit in "012"],
    "eurosat": [
        [f"a centered satellite photo of {article}{name}." for article in ("", "a ", "the ")]
        for name in ("forest", "lake or sea")
    ],
    "dtd": [
        [f"a photo of {a} {name} {noun}." for a in ("a", "the") for noun in ("texture", "pattern", "thing", "object")]
        for name in ("banded", "polka dotted", "woven")
    ],
}


def test_whole_experiment(
    run: Callable[..., dict[str, Any]],
    clip: CLIPModel,
    experts: dict[str, CLIPModel],
    model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    results = run(
        "--steps=3", "--adamerging-steps=2", "--batch-size=4", "--rank=2", "--v2-rank=2", "--test-batch-size=4"
    )
    printed = capsys.readouterr().out
    assert list(results["accuracy"]) == ROWS
    assert results["published average"] is None and results["architecture"] == "An unpublished CLIP"
    assert results["settings"]["model_dir"] == str(model_dir) and results["settings"]["steps"] == 3
    for name, by_task in results["accuracy"].items():
        assert list(by_task) == ["eurosat", "mnist", "dtd"]  # the paper's order
        assert all(0 <= value <= 100 for value in by_task.values())
        assert results["average"][name] == pytest.approx(sum(by_task.values()) / 3)

    for task, prompts in PROMPTS.items():
        for name, vision in (("pretrained", clip), ("individual", experts[task])):
            expected = expected_accuracy(vision, clip, model_dir / "pretrained", task, prompts)
            assert results["accuracy"][name][task] == pytest.approx(expected), (name, task)

    folder = result_folder(tmp_path)
    text = (folder / "results.txt").read_text()
    assert text in printed and "published" not in text
    assert "dtd: 7 of 7 test images, 3 classes (banded, polka dotted, woven)" in printed
    assert "adapters see the test images, never a label" in printed
    assert (folder / "average_accuracy.png").read_bytes().startswith(b"\x89PNG")
    for options in MERGES.values():
        v1, v2 = (SurgeryAdapters.load(folder / f"{options['method']}-{mode}.safetensors") for mode in ("v1", "v2"))
        assert v1.tasks == v2.tasks == ("eurosat", "mnist", "dtd") and v1.rank == v2.rank == 2
        assert list(v1.widths.values()) == [16] and list(v2.widths.values()) == [32, 32, 16]
        assert all(up.any() for up in (*v1.up, *v2.up))


@pytest.mark.parametrize("autocast", [[], ["--autocast=bfloat16"]], ids=["float32", "bfloat16"])
def test_proportions_of_l14(autocast: list[str], data_dir: Path, tmp_path: Path) -> None:
    """Patches of 14 pixels, tokens of another number than rows, deeper and wider, SurgeryV2 at rank 4."""
    torch.manual_seed(1)
    clip = tiny_clip(patch_size=14, image_size=56, width=64, depth=3, num_features=24)
    save_pretrained(clip, tmp_path / "models" / "large")
    for seed, name in enumerate(("mnist", "dtd")):
        as_vision_tower(tuned(clip, seed), tmp_path / "models" / f"large_{name}")
    folders = [f"--model-dir={tmp_path / 'models'}", f"--data-dir={data_dir}", f"--out={tmp_path}"]
    options = ["--pretrained=large", "--methods", "average", "--v2-rank=4", "--steps=2", "--adapt-split=train"]
    main(["clip", *folders, *options, *autocast])
    results = json.loads((result_folder(tmp_path) / "results.json").read_text())
    merged = "weight averaging"
    assert list(results["accuracy"]) == [merged, f"{merged} + Surgery", f"{merged} + SurgeryV2"]
    assert list(results["accuracy"][merged]) == ["mnist", "dtd"]
    adapters = SurgeryAdapters.load(result_folder(tmp_path) / "average-v2.safetensors")
    assert list(adapters.widths.values()) == [64, 64, 64, 24] and adapters.rank == 4


def test_second_run_decodes_nothing_and_repeats_the_first(
    run: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ("--methods", "ties", "--surgery", "v1", "--steps=2", "--max-images=6")
    first = run(*options)
    monkeypatch.setattr(clip_images.Decoder, "_decode", None)
    monkeypatch.setattr("surgery_kernels.reproduce.clip.heads.text_encoder", None)
    assert run(*options) == first
    assert "6 of 15 test images" in capsys.readouterr().out
    assert len(list((tmp_path / "pixels").iterdir())) == len(list((tmp_path / "heads").iterdir())) == 3


@pytest.mark.parametrize("autocast", [None, "bfloat16"])
def test_merges_are_those_of_merge_state_dicts(
    autocast: str | None, run: Callable[..., dict[str, Any]], model_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    results = run("--methods", "task_arithmetic", "--surgery", *([f"--autocast={autocast}"] if autocast else []))
    base = load_vision(model_dir / "pretrained")
    experts = [load_vision(task.expert, base) for task in find_tasks(model_dir, data_dir).tasks]
    encoder = VisionEncoder(vision_config(model_dir / "pretrained")).eval()
    encoder.load_state_dict(merge_state_dicts(base, experts, method="task_arithmetic", lam=0.3))
    decoder = Decoder(image_processor(model_dir / "pretrained"), tmp_path / "pixels")
    pixels = decoder.pixels("mnist-test", open_images(data_dir / "mnist" / "test"), at_most=None, seed=0)
    head = TextHeads(model_dir / "pretrained", tmp_path / "heads").head("mnist", CLASSES["mnist"])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
        features = encoder(pixels[:])
    predicted = (F.normalize(features.float(), dim=1) @ head.T).argmax(1)
    expected = 100 * (predicted == pixels.labels).double().mean().item()
    assert list(results["accuracy"]) == ["task arithmetic"]
    assert results["accuracy"]["task arithmetic"]["mnist"] == pytest.approx(expected)


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


def test_pixels_are_those_of_the_processor(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    processor = image_processor(model_dir / "pretrained")
    for task in ("mnist", "dtd"):
        images = open_images(data_dir / task / "test")
        pixels = Decoder(processor, tmp_path).pixels(task, images, at_most=None, seed=0)
        expected = processor([images.open(i).convert("RGB") for i in range(len(images))], return_tensors="pt")
        assert pixels[:].shape == (len(images), 3, 32, 32) and len(pixels) == len(images)
        torch.testing.assert_close(pixels[:], expected["pixel_values"])
        torch.testing.assert_close(pixels[1], expected["pixel_values"][1])


def test_processor_of_the_released_models(tmp_path: Path) -> None:
    """Their preprocessor_config.json is older than most of its keys."""
    old = {
        "do_resize": True,
        "size": 224,
        "resample": 3,
        "do_center_crop": True,
        "crop_size": 224,
        "do_normalize": True,
    }
    mean_and_std = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    config = {**old, **mean_and_std, "feature_extractor_type": "CLIPFeatureExtractor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    save_classes(tmp_path / "data", 0, ["white"], 1)
    Image.new("RGB", (300, 400), "white").save(tmp_path / "data" / "white" / "0.png")
    pixels = Decoder(image_processor(tmp_path), tmp_path).pixels(
        "white", open_images(tmp_path / "data"), at_most=None, seed=0
    )
    assert pixels[:].shape == (1, 3, 224, 224)
    for channel, value in zip(pixels[0], (2.5, 2.0, 1.75), strict=True):
        torch.testing.assert_close(channel, torch.full((224, 224), value))


def test_workers_decode_the_same(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    processor, images = image_processor(model_dir / "pretrained"), open_images(data_dir / "mnist" / "test")
    alone, shared = (
        Decoder(processor, tmp_path / str(workers), workers).pixels("mnist", images, at_most=None, seed=0)
        for workers in (0, 2)
    )
    np.testing.assert_array_equal(alone.stored, shared.stored)


def test_max_images_draws_with_the_seed(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    images = open_images(data_dir / "mnist" / "test")
    decoder = Decoder(image_processor(model_dir / "pretrained"), tmp_path)
    whole = decoder.pixels("mnist", images, at_most=None, seed=0)
    drawn = [decoder.pixels("mnist", images, at_most=6, seed=seed) for seed in (0, 0, 1)]
    assert [len(pixels) for pixels in (whole, *drawn)] == [15, 6, 6, 6]
    np.testing.assert_array_equal(drawn[0].stored, drawn[1].stored)
    assert not np.array_equal(drawn[0].stored, drawn[2].stored)
    for pixels, label in zip(drawn[0].stored, drawn[0].labels, strict=True):
        (row,) = [row for row, stored in enumerate(whole.stored) if np.array_equal(stored, pixels)]
        assert whole.labels[row] == label
    assert len(decoder.pixels("mnist", images, at_most=99, seed=5)) == 15


def test_more_images_than_are_decoded_at_once(
    model_dir: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, processor = open_images(data_dir / "mnist" / "test"), image_processor(model_dir / "pretrained")
    whole = Decoder(processor, tmp_path / "whole").pixels("mnist", images, at_most=None, seed=0)
    monkeypatch.setattr(clip_images, "DECODED_AT_ONCE", 4)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    parts = Decoder(processor, tmp_path / "parts").pixels("mnist", images, at_most=None, seed=0)
    np.testing.assert_array_equal(parts.stored, whole.stored)


def test_a_changed_image_is_decoded_again(model_dir: Path, tmp_path: Path) -> None:
    save_classes(tmp_path / "data", 0, ["a", "b"], 2)
    decoder = Decoder(image_processor(model_dir / "pretrained"), tmp_path / "pixels")
    before = decoder.pixels("t", open_images(tmp_path / "data"), at_most=None, seed=0)
    picture(3, 1, 9).save(tmp_path / "data" / "a" / "0.png")
    after = decoder.pixels("t", open_images(tmp_path / "data"), at_most=None, seed=0)
    assert not np.array_equal(before.stored[0], after.stored[0])
    np.testing.assert_array_equal(before.stored[1:], after.stored[1:])


def test_stopped_decoding_leaves_no_pixels(
    model_dir: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = Decoder(image_processor(model_dir / "pretrained"), tmp_path)
    monkeypatch.setattr(clip_images, "DataLoader", lambda *args, **kwargs: iter([]).__next__())
    with pytest.raises(StopIteration):
        decoder.pixels("mnist", open_images(data_dir / "mnist" / "test"), at_most=None, seed=0)
    assert not list(tmp_path.glob("*.npy"))


def test_labels_of_folders_and_datasets(data_dir: Path) -> None:
    folders, dataset = open_images(data_dir / "mnist" / "test"), open_images(data_dir / "dtd" / "test")
    assert folders.class_names == CLASSES["mnist"] and dataset.class_names == CLASSES["dtd"]
    assert folders.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5 and dataset.labels.tolist() == LABELS_OF_DTD
    assert len(dataset) == 7 and dataset.identity != folders.identity


def test_dataset_with_plain_labels_and_other_columns(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets reads what its save_to_disk wrote; it is optional")
    rows = {"id": ["x", "y"], "label": [3, 1], "img": [picture(0, 0, 1), picture(0, 1, 1)]}
    features = {"id": datasets.Value("string"), "label": datasets.Value("int64"), "img": datasets.Image()}
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).save_to_disk(str(tmp_path / "plain"))
    images = open_images(tmp_path / "plain")
    assert images.labels.tolist() == [3, 1] and images.class_names == ["0", "1", "2", "3"]
    np.testing.assert_array_equal(np.asarray(images.open(1)), np.asarray(picture(0, 1, 1)))
    classes = {**features, "part": datasets.ClassLabel(names=["x"])}
    of_parts = {**rows, "part": [0, 0]}
    datasets.Dataset.from_dict(of_parts, features=datasets.Features(classes)).save_to_disk(str(tmp_path / "parts"))
    assert open_images(tmp_path / "parts").class_names == ["0", "1", "2", "3"]
    rows["label"][0] = -1
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).save_to_disk(str(tmp_path / "hidden"))
    with pytest.raises(InputError, match=r"must have a label for every image, got -1 among 'label'$"):
        open_images(tmp_path / "hidden")
    datasets.Dataset.from_dict({"label": ["x"]}).save_to_disk(str(tmp_path / "text"))
    with pytest.raises(InputError, match=r"must have a column of images and one of class labels, got label$"):
        open_images(tmp_path / "text")


def test_class_names(tmp_path: Path) -> None:
    assert class_names(tmp_path, ["annual_crop", "sea"]) == ["annual crop", "sea"]
    (tmp_path / "classnames.json").write_text('["crop", "water"]')
    assert class_names(tmp_path, ["annual_crop", "sea"]) == ["crop", "water"]
    (tmp_path / "classnames.json").write_text('{"sea": "water", "annual_crop": "crop"}')
    assert class_names(tmp_path, ["annual_crop", "sea"]) == ["crop", "water"]
    with pytest.raises(InputError, match=r"classnames.json must name every class, got none for 'land'$"):
        class_names(tmp_path, ["land", "sea"])
    for wrong in ("3", "{"):
        (tmp_path / "classnames.json").write_text(wrong)
        with pytest.raises(InputError, match=r"classnames.json must be a JSON list of names, or an object that maps"):
            class_names(tmp_path, ["sea"])
    (tmp_path / "classnames.txt").write_text("field\nocean\n")
    assert class_names(tmp_path, ["annual_crop", "sea"]) == ["field", "ocean"]
    with pytest.raises(InputError, match=r"classnames.txt must name 3 classes, got 2$"):
        class_names(tmp_path, ["a", "b", "c"])


def test_heads_from_text(clip: CLIPModel, model_dir: Path, tmp_path: Path) -> None:
    names, templates = ["cat", "striped dog"], ["a photo of a {}.", "{} on {}"]
    head = head_from_text(text_encoder(model_dir / "pretrained"), tiny_tokenizer(), names, templates)
    for row, name in zip(head, names, strict=True):
        tokens = tiny_tokenizer()([f"a photo of a {name}.", f"{name} on {name}"], padding=True, return_tensors="pt")
        with torch.no_grad():
            embedded = clip.text_projection(clip.text_model(**tokens).pooler_output)
        mean = (embedded / embedded.norm(dim=1, keepdim=True)).mean(0)
        torch.testing.assert_close(row, mean / mean.norm())

    file = tmp_path / "templates.json"
    file.write_text(json.dumps({"Pets_": templates}))
    heads = TextHeads(model_dir / "pretrained", tmp_path / "heads", templates=file)
    torch.testing.assert_close(heads.head(canonical("Pets_"), names), head)
    other = heads.head("no template", names)  # "a photo of a {}."
    assert other.shape == head.shape and not torch.allclose(other, head)
    assert len(list((tmp_path / "heads").iterdir())) == 2


def test_saved_heads(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Heads that all say the last class, as one file and as a file each."""
    heads = {name: torch.zeros(len(classes), 16) for name, classes in CLASSES.items()}
    direction = torch.randn(16)
    for head in heads.values():
        head[:-1], head[-1] = direction, direction + 1e-3  # decided by the sign of the sum of the features
    save_file(heads, tmp_path / "heads.safetensors")
    (tmp_path / "folder").mkdir()
    save_file({"weight": heads["mnist"]}, tmp_path / "folder" / "mnist.safetensors")
    for name in ("eurosat", "dtd"):
        torch.save(heads[name].half(), tmp_path / "folder" / f"{name}.pt")
    for path in (tmp_path / "heads.safetensors", tmp_path / "folder"):
        for name, head in heads.items():
            torch.testing.assert_close(read_head(path, name), head, atol=1e-3, rtol=1e-3)
    for wrong in (torch.nn.Linear(2, 2), {"a": heads["mnist"], "b": heads["mnist"]}, [1]):
        torch.save(wrong, tmp_path / "folder" / "zoo.pt")
        with pytest.raises(
            InputError, match=r"zoo.pt must hold one tensor \[classes, num_features\], got something else$"
        ):
            read_head(tmp_path / "folder", "zoo")
    (tmp_path / "folder" / "zoo.pt").write_text("text")
    with pytest.raises(InputError, match=r"zoo.pt must hold one tensor \[classes, num_features\], got something else$"):
        read_head(tmp_path / "folder", "zoo")
    with zipfile.ZipFile(tmp_path / "folder" / "dtd.pt") as saved:
        parts = {name: saved.read(name) for name in saved.namelist()}
    with zipfile.ZipFile(tmp_path / "folder" / "dtd.pt", "w") as saved:  # as if it had been written on a GPU
        for name, part in parts.items():
            saved.writestr(name, part.replace(b"X\3\0\0\0cpu", b"X\6\0\0\0cuda:0"))
    torch.testing.assert_close(read_head(tmp_path / "folder", "dtd"), heads["dtd"], atol=1e-3, rtol=1e-3)
    results = run("--methods", "pretrained", f"--heads={tmp_path / 'heads.safetensors'}")
    assert list(results["accuracy"]) == ["pretrained"]
    assert not (tmp_path / "heads").exists()


def test_tasks_in_the_papers_order_by_any_spelling(tmp_path: Path) -> None:
    models, data = tmp_path / "models", tmp_path / "data"
    for name in ("b32", "b32_stanford-cars", "b32_sun397", "zoo", "b16_sun397", "gtsrb"):
        (models / name).mkdir(parents=True)
        (models / name / "config.json").touch()
    (models / "notes").mkdir()
    for name in ("zoo", "Stanford_Cars", "SUN397", "mnist"):
        (data / name / "test").mkdir(parents=True)
    found = find_tasks(models, data, pretrained="b32")
    assert [task.name for task in found.tasks] == ["sun397", "stanford-cars", "zoo"]
    assert [task.expert.name for task in found.tasks] == ["b32_sun397", "b32_stanford-cars", "zoo"]
    assert [path.name for path in found.without_images] == ["b16_sun397", "gtsrb"]
    assert [path.name for path in found.without_expert] == ["mnist"]
    chosen = find_tasks(models, data, pretrained="b32", wanted=["zoo", "Cars", "zoo"])
    assert [task.name for task in chosen.tasks] == ["zoo", "stanford-cars"]
    assert not chosen.without_images and not chosen.without_expert


def test_what_is_left_out_is_said(
    model_dir: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "mnist").symlink_to(data_dir / "mnist")
    (data / "svhn" / "test").mkdir(parents=True)
    folders = [f"--model-dir={model_dir}", f"--data-dir={data}", f"--out={tmp_path}"]
    main(["clip", *folders, "--methods", "pretrained"])
    printed = capsys.readouterr().out
    assert f"{model_dir / 'DTD'} is left out: it has no images in {data}\n" in printed
    assert f"{data / 'svhn'} is left out: it has no expert in {model_dir}\n" in printed


def test_architectures_are_recognised() -> None:
    names = [recognise(768, 12, 32), recognise(768, 12, 16), recognise(1024, 24, 14)]
    assert names == list(ARCHITECTURES) and [name.v2_rank for name in names if name] == [16, 16, 4]
    assert recognise(32, 2, 16) is None
    for architecture in ARCHITECTURES:
        assert set(architecture.averages) <= set(ROWS)
        assert all(40 < value < 95 for value in architecture.averages.values())


def test_templates_have_a_place_for_the_class() -> None:
    assert set(TEMPLATES) == set(TASKS)
    counts = {
        "sun397": 2,
        "stanford-cars": 8,
        "resisc45": 18,
        "eurosat": 3,
        "svhn": 1,
        "gtsrb": 3,
        "mnist": 1,
        "dtd": 8,
    }
    assert {task: len(set(templates)) for task, templates in TEMPLATES.items()} == counts
    assert all(text.count("{}") == 1 for texts in TEMPLATES.values() for text in texts)
    assert "aerial photo of the {}." in TEMPLATES["resisc45"] and "i love my {}!" in TEMPLATES["stanford-cars"]


def test_published_averages_stand_beside_ours(
    run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = Architecture("tiny", width=32, depth=2, patch_size=16, v2_rank=3, averages={"pretrained": 12.34})
    monkeypatch.setattr(published, "ARCHITECTURES", (tiny,))
    options = ["--methods", "pretrained", "average", "--surgery", "v2", "--steps=1"]
    assert run(*options)["published average"] is None  # of other tasks
    monkeypatch.setattr("surgery_kernels.reproduce.clip.experiment.TASKS", tuple(CLASSES))
    capsys.readouterr()
    results = run(*options)
    assert results["published average"] == {"pretrained": 12.34} and results["architecture"] == "tiny"
    header, _, pretrained, merged, repaired = capsys.readouterr().out.split("\n\n")[-2].splitlines()
    assert header.split()[-2:] == ["average", "published"] and pretrained.split()[-1] == "12.3"
    assert len(merged) < len(pretrained) and repaired.split()[:2] == ["+", "SurgeryV2"]


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a run that ends at once."""
    with pytest.raises(SystemExit) as stopped:
        main(["clip", *arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err.splitlines()
    return error[-1]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--steps=x", "--steps must be a whole number from 1, got x"),
        ("--adamerging-steps=0", "--adamerging-steps must be a whole number from 1, got 0"),
        ("--rank=0", "--rank must be a whole number from 1, got 0"),
        ("--v2-rank=-4", "--v2-rank must be a whole number from 1, got -4"),
        ("--batch-size=1.5", "--batch-size must be a whole number from 1, got 1.5"),
        ("--test-batch-size=0", "--test-batch-size must be a whole number from 1, got 0"),
        ("--max-images=0", "--max-images must be a whole number from 1, got 0"),
        ("--workers=-1", "--workers must be a whole number from 0, got -1"),
        ("--seed=-1", "--seed must be a whole number from 0 to 4294967295, got -1"),
        ("--device=nowhere", "--device must be one that torch can use, got nowhere"),
        ("--device=meta", "--device must be cpu for surgery and adamerging, whose ops run there, got meta"),
        (
            "--pretrained=b32",
            "--model-dir must hold the folder of a pretrained model with a config.json, got no 'b32' in",
        ),
        ("--tasks=svhn", "--tasks must have an expert each, got none for 'svhn' in"),
        ("--heads=heads.bin", "--heads must be a safetensors file or a folder, got heads.bin"),
        (
            "--templates=none.json",
            "--templates must be a JSON file of lists of sentences with {} by task, got none.json",
        ),
    ],
)
def test_options_out_of_range(
    option: str, message: str, model_dir: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [f"--model-dir={model_dir}", f"--data-dir={data_dir}", f"--out={tmp_path}"]
    assert said(capsys, *folders, option).startswith(message)


@pytest.mark.parametrize("content", ['{"mnist": "a photo"}', '{"mnist": []}', '["{}"]', "{", '{"mnist": ["no place"]}'])
def test_templates_must_have_their_form(content: str, tmp_path: Path) -> None:
    (tmp_path / "templates.json").write_text(content)
    with pytest.raises(
        InputError, match=r"^--templates must be a JSON file of lists of sentences with {} by task, got"
    ):
        TextHeads(tmp_path, tmp_path, templates=tmp_path / "templates.json")


def test_missing_folders(model_dir: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere, out = tmp_path / "nowhere", f"--out={tmp_path}"
    assert "--data-dir" in said(capsys, f"--model-dir={model_dir}")
    message = said(capsys, f"--model-dir={nowhere}", f"--data-dir={data_dir}", out)
    assert message == f"--model-dir must be a folder, got {nowhere}"
    message = said(capsys, f"--model-dir={model_dir}", f"--data-dir={nowhere}", out)
    assert message == f"--data-dir must be a folder, got {nowhere}"
    (tmp_path / "data" / "svhn").mkdir(parents=True)
    message = said(capsys, f"--model-dir={model_dir}", f"--data-dir={tmp_path / 'data'}", out)
    shared = "--model-dir and --data-dir must share a task, got experts for dtd, mnist, eurosat and images for svhn"
    assert message == shared
    message = said(capsys, f"--model-dir={data_dir}", f"--data-dir={data_dir}", out)
    assert message.endswith(f"got no 'pretrained' in {data_dir} (models there: none): name it with --pretrained")
    folders = [f"--model-dir={model_dir}", f"--data-dir={data_dir}", out]
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "train").mkdir()
    message = said(capsys, f"--model-dir={model_dir}", f"--data-dir={tmp_path}", out)
    assert message.startswith(f"{tmp_path / 'mnist'} must have a folder test of <class>/<image>.png or written by")
    (tmp_path / "mnist" / "test").mkdir()
    message = said(capsys, f"--model-dir={model_dir}", f"--data-dir={tmp_path}", out)
    assert message.endswith(
        "must hold <class>/<image>.png (.jpg, ...) or be written by datasets' save_to_disk, got neither"
    )
    (tmp_path / "mnist" / "test" / "0").mkdir()
    message = said(capsys, f"--model-dir={model_dir}", f"--data-dir={tmp_path}", out)
    assert message == f"every class folder must hold an image, got none in {tmp_path / 'mnist' / 'test' / '0'}"
    (tmp_path / "heads.safetensors").write_bytes(b"broken")
    message = said(capsys, *folders, f"--heads={tmp_path / 'heads.safetensors'}")
    assert message.startswith("every safetensors file must be readable, got ")
    for heads in ({"mnist": torch.zeros(3, 16)}, {name: torch.zeros(2, 16) for name in CLASSES}):
        save_file(heads, tmp_path / "heads.safetensors")
        message = said(capsys, *folders, f"--heads={tmp_path / 'heads.safetensors'}", "--tasks", "mnist", "dtd")
        assert message in (
            "--heads must hold a tensor for every task, got mnist, not dtd",
            "the head of mnist must be [classes, num_features] of shape [3, 16], got [2, 16]",
        )
    message = said(capsys, *folders, f"--heads={tmp_path / 'mnist'}")
    assert message == f"--heads must hold eurosat.safetensors or eurosat.pt, got none in {tmp_path / 'mnist'}"


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


def test_missing_packages_are_named(
    model_dir: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [f"--model-dir={model_dir}", f"--data-dir={data_dir}", f"--out={tmp_path}"]
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "datasets", None)
        message = said(capsys, *folders, "--tasks=dtd")
    assert message.startswith("datasets must be installed to read ") and message.endswith("'surgery-kernels[clip]'")
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "transformers", None)
        for module in ("experiment", "heads", "models"):
            patched.delitem(sys.modules, f"surgery_kernels.reproduce.clip.{module}")
        message = said(capsys, *folders)
    assert message == "transformers must be installed for this experiment: pip install 'surgery-kernels[clip]'"


def test_adamerging_lowers_the_entropy_of_predictions(
    run: Callable[..., dict[str, Any]],
    model_dir: Path,
    data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    learned: list[Learned] = []
    monkeypatch.setitem(MERGES["AdaMerging"], "receive", learned.append)
    monkeypatch.setitem(MERGES["AdaMerging"], "lr", 0.05)
    options = ["--methods", "adamerging", "--surgery", "--adamerging-steps=8", "--batch-size=100"]
    results = run(*options)
    assert list(results["accuracy"]) == ["AdaMerging"]
    (found,) = learned
    assert len(found.losses) == 8 and found.losses[-1] < found.losses[0]

    folder, names = model_dir / "pretrained", ["eurosat", "mnist", "dtd"]
    base = load_vision(folder)
    experts = [load_vision(task.expert, base) for task in find_tasks(model_dir, data_dir).tasks]
    encoder = VisionEncoder(vision_config(folder)).eval()
    encoder.load_state_dict(merge_state_dicts(base, experts, method="task_arithmetic", lam=0.3))
    entropies = []
    for name in names:
        images = open_images(data_dir / name / "test")
        pixels = [images.open(index).convert("RGB") for index in range(len(images))]
        head = TextHeads(folder, tmp_path).head(name, class_names(data_dir / name, images.class_names))
        with torch.no_grad():
            features = encoder(image_processor(folder)(pixels, return_tensors="pt")["pixel_values"])
        scale = logit_scale(folder)
        predicted = torch.distributions.Categorical(logits=scale * F.normalize(features, dim=1) @ head.T)
        entropies.append(predicted.entropy().mean())
    assert found.losses[0].item() == pytest.approx(sum(entropies).item(), rel=1e-4)
