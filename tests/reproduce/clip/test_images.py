"""Images, decoded and kept; labels of folders and of datasets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from surgery_kernels.reproduce.clip import images as clip_images
from surgery_kernels.reproduce.clip.folders import InputError
from surgery_kernels.reproduce.clip.images import Decoder, class_names, open_images
from surgery_kernels.reproduce.clip.models import image_processor
from tests.clip_models import CLASSES, LABELS_OF_DTD, picture, save_classes

pytestmark = pytest.mark.any_isa


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
