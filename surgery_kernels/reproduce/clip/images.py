"""Images of a split: found on disk, decoded and cropped once, read back as bytes by every method."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ...merging.progress import SECONDS_BEFORE_SHOWN
from ..errors import InputError

SUFFIXES = frozenset((".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))
DECODED_AT_ONCE = 64


@dataclass(frozen=True)
class Images:
    """A split before decoding."""

    class_names: list[str]  # as the files say, before classnames.txt
    labels: Tensor  # int64 [num_images]
    open: Callable[[int], Image.Image]
    identity: str  # another one if any image may be another

    def __len__(self) -> int:
        return len(self.labels)


def open_images(folder: Path) -> Images:
    """The images of one split: ``<class>/<any name>.png`` (or .jpg, ...), or what datasets' save_to_disk wrote.

    Raises:
        InputError: neither is there.
    """
    if not folder.is_dir():
        raise InputError(
            f"{folder.parent} must have a folder {folder.name} of <class>/<image>.png or written by datasets' "
            f"save_to_disk, got no such folder"
        )
    return open_dataset(folder) if (folder / "state.json").is_file() else open_classes(folder)


def open_classes(folder: Path) -> Images:
    """Labels follow the sorted names of the class folders, as in torchvision's ImageFolder."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    paths: list[Path] = []
    labels: list[int] = []
    for label, class_folder in enumerate(classes):
        of_class = sorted(path for path in class_folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        if not of_class:
            raise InputError(f"every class folder must hold an image, got none in {class_folder}")
        paths += of_class
        labels += [label] * len(of_class)
    if not paths:
        raise InputError(
            f"{folder} must hold <class>/<image>.png (.jpg, ...) or be written by datasets' save_to_disk, got neither"
        )

    digest = hashlib.sha256()
    for path in paths:
        status = path.stat()
        digest.update(f"{path.relative_to(folder)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return Images(
        [path.name for path in classes],
        torch.tensor(labels),
        lambda index: Image.open(paths[index]),
        digest.hexdigest(),
    )


def open_dataset(folder: Path) -> Images:
    """The image column and the label column of a dataset on disk; class names come from its ClassLabel."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise InputError(
            f"{error.name} must be installed to read {folder}, got no such module: pip install 'surgery-kernels[clip]'"
        ) from None

    data = datasets.load_from_disk(str(folder))
    columns = data.features
    image = next((name for name, kind in columns.items() if isinstance(kind, datasets.Image)), None)
    integers = [name for name, kind in columns.items() if getattr(kind, "dtype", None) in ("int64", "int32", "uint8")]
    classes = [name for name in integers if isinstance(columns[name], datasets.ClassLabel)]
    label = next((name for name in ("label", *classes) if name in integers), None)
    if image is None or label is None:
        raise InputError(f"{folder} must have a column of images and one of class labels, got {', '.join(columns)}")
    labels = torch.tensor(data[label][:], dtype=torch.int64)
    if labels.min() < 0:
        raise InputError(f"{folder} must have a label for every image, got {labels.min()} among {label!r}")
    names = getattr(columns[label], "names", None) or map(str, range(int(labels.max()) + 1))
    return Images(list(names), labels, lambda index: data[index][image], data._fingerprint)


class Pixels(Dataset[Tensor]):
    """A split as the encoder takes it, kept as bytes in a file. Item: float32 [channels, height, width]."""

    def __init__(
        self, stored: np.ndarray, labels: Tensor, *, scale: float, mean: list[float], std: list[float]
    ) -> None:
        self.stored = stored  # uint8 [num_images, channels, height, width]
        self.labels = labels  # int64 [num_images]
        self.scale = scale
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, index: int | slice) -> Tensor:
        return self.on("cpu", index)

    def on(self, device: str, index: int | slice) -> Tensor:
        """An image or a batch; the device gets bytes and does the rest."""
        pixels = torch.from_numpy(np.array(self.stored[index])).to(device).float()
        return (pixels * self.scale - self.mean.to(device)) / self.std.to(device)


@dataclass(frozen=True)
class Decoder:
    """How images become pixels: the processor of the pretrained model, and the file that keeps what it gives."""

    processor: Any  # transformers' image processor for PIL
    cache: Path
    workers: int = 0

    def pixels(self, name: str, images: Images, *, at_most: int | None, seed: int) -> Pixels:
        """Decodes on the first call, reads on the next; `at_most` takes that many images, drawn with `seed`."""
        chosen = torch.arange(len(images))
        if at_most is not None and at_most < len(images):
            generator = torch.Generator().manual_seed(seed)
            chosen = torch.randperm(len(images), generator=generator)[:at_most].sort().values
        settings = json.dumps([self.processor.to_dict(), images.identity, chosen.tolist()], sort_keys=True)
        path = self.cache / f"{name}-{hashlib.sha256(settings.encode()).hexdigest()[:12]}.npy"
        if not path.exists():
            self._decode(name, images, chosen, path)
        processor = self.processor
        return Pixels(
            np.load(path, mmap_mode="r"),
            images.labels[chosen],
            scale=processor.rescale_factor if processor.do_rescale else 1.0,
            mean=processor.image_mean if processor.do_normalize else [0.0],
            std=processor.image_std if processor.do_normalize else [1.0],
        )

    def _decode(self, name: str, images: Images, chosen: Tensor, path: Path) -> None:
        """Writes beside and renames: a run that is stopped leaves no half of a file."""
        self.cache.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        cropped = Cropped(images, chosen, self.processor)
        loader = DataLoader(cropped, DECODED_AT_ONCE, num_workers=self.workers, collate_fn=np.stack)
        stored = np.lib.format.open_memmap(unfinished, "w+", np.uint8, (len(cropped), *cropped[0].shape))
        with tqdm(total=len(cropped), desc=f"decoding {name}", unit=" images", delay=SECONDS_BEFORE_SHOWN) as progress:
            for start, batch in zip(range(0, len(cropped), DECODED_AT_ONCE), loader, strict=True):
                stored[start : start + len(batch)] = batch
                progress.update(len(batch))
        stored.flush()
        unfinished.replace(path)


class Cropped(Dataset[np.ndarray]):
    """Images resized and cropped, not yet scaled and normalised. Item: uint8 [channels, height, width]."""

    def __init__(self, images: Images, chosen: Tensor, processor: Any) -> None:
        self.images, self.chosen, self.processor = images, chosen, processor

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> np.ndarray:
        image = self.images.open(int(self.chosen[index])).convert("RGB")
        (pixels,) = self.processor(image, do_rescale=False, do_normalize=False)["pixel_values"]
        return np.asarray(pixels)


def class_names(folder: Path, found: list[str]) -> list[str]:
    """The names that prompts use: of `folder`/classnames.txt or .json where there is one, else those found.

    classnames.txt has a line per class, in the order of the labels; classnames.json a list, or what each found name is
    called. Without them an underscore becomes a space.

    Raises:
        InputError: the file does not name every class.
    """
    listed, mapped = folder / "classnames.txt", folder / "classnames.json"
    if listed.is_file():
        names = listed.read_text(encoding="utf-8").strip().splitlines()
        source = listed
    elif mapped.is_file():
        names, source = mapped_names(mapped, found), mapped
    else:
        return [name.replace("_", " ") for name in found]
    if len(names) != len(found):
        raise InputError(f"{source} must name {len(found)} classes, got {len(names)}")
    return names


def mapped_names(path: Path, found: list[str]) -> list[str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if isinstance(content, dict):
        if missing := [name for name in found if name not in content]:
            raise InputError(f"{path} must name every class, got none for {missing[0]!r}")
        return [content[name] for name in found]
    if not isinstance(content, list):
        raise InputError(f"{path} must be a JSON list of names, or an object that maps found names to them")
    return content
