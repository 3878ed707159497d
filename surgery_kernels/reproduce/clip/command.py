"""The command line of the experiment on CLIP. Nothing heavy is imported before a run starts."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from ..errors import InputError
from .methods import IMAGES, METHODS, RANK, SURGERY
from .settings import Settings

PACKAGES = ("PIL", "matplotlib", "safetensors", "sklearn", "transformers")
COUNTS = (
    "rank",
    "v2_rank",
    "images",
    "steps",
    "adamerging_steps",
    "batch_size",
    "test_batch_size",
    "max_images",
    "workers",
)


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--model-dir",
        type=Path,
        required=True,
        help="folder of Hugging Face model folders: the pretrained CLIPModel, and for each task an expert in a folder "
        "<task> or <pretrained>_<task>: a CLIPModel, CLIPVisionModel or CLIPVisionModelWithProjection",
    )
    add(
        "--data-dir",
        type=Path,
        required=True,
        help="folder of task folders, each with test/ and perhaps train/: <class>/<image>.png, or what datasets' "
        "save_to_disk wrote; <task>/classnames.txt or .json says what classes are called in prompts",
    )
    add("--pretrained", default="pretrained", help="folder of the pretrained model in --model-dir (default pretrained)")
    add("--tasks", nargs="+", help="tasks to take (default: all with an expert and images)")
    add(
        "--heads",
        type=Path,
        help="zero-shot heads [classes, num_features]: a safetensors file with a tensor per task, or a folder of "
        "<task>.safetensors or <task>.pt (default: from the pretrained text encoder)",
    )
    add("--templates", type=Path, help="JSON file: task -> sentences with {} for the class (default: CLIP's own)")
    add(
        "--methods",
        nargs="+",
        default=METHODS,
        metavar="METHOD",
        help=f"of {', '.join(METHODS)} (default: these), whose merges are repaired, and of all that `surgery-kernels "
        "methods` lists, which are not; or all",
    )
    add(
        "--surgery",
        nargs="*",
        choices=tuple(SURGERY),
        default=tuple(SURGERY),
        metavar="MODE",
        help=f"after every merge: of {', '.join(SURGERY)} (default: all), or nothing for none",
    )
    add("--rank", default=str(RANK), help=f"rank of Surgery's adapters (default {RANK})")
    add("--v2-rank", help="rank of SurgeryV2's and the closed form's (default: the paper's, 4 on ViT-L/14, else 16)")
    add(
        "--images",
        default=str(IMAGES),
        help=f"images of a task, drawn with the seed, for closed form and calibrate (default {IMAGES})",
    )
    add("--steps", default="1000", help="steps of the adapters, each a batch of every task (default 1000)")
    add("--adamerging-steps", default="500", help="steps of AdaMerging's coefficients (default 500)")
    add("--batch-size", default="16", help="images of a task in a step of either (default 16)")
    add(
        "--adapt-split",
        choices=("test", "train"),
        default="test",
        help="whose images, never labels, AdaMerging and the adapters see: test as in the papers (default), or train",
    )
    add("--max-images", help="at most so many images of a split, drawn with the seed (default all)")
    add("--test-batch-size", default="128", help="images at once in a test (default 128)")
    add("--device", default="cpu", help="cpu (default); cuda, say, for merges without surgery and adamerging")
    add("--autocast", choices=("bfloat16", "float16"), help="dtype of the encoders' matrix products (default float32)")
    add("--workers", default="0", help="processes that decode images (default 0: this one)")


def run(options: argparse.Namespace, error: Callable[[str], NoReturn]) -> None:
    """Starts the experiment; `error` says one sentence and exits."""
    settings = {name: value for name, value in vars(options).items() if name not in ("command", "out")}
    for name in COUNTS:
        least = 0 if name == "workers" else 1
        if settings[name] is not None:
            if not settings[name].isdecimal() or int(settings[name]) < least:
                error(f"--{name.replace('_', '-')} must be a whole number from {least}, got {settings[name]}")
            settings[name] = int(settings[name])
    try:
        from safetensors import SafetensorError

        from .declared import chosen
        from .experiment import run as run_experiment
    except ModuleNotFoundError as missing:
        if missing.name not in PACKAGES:
            raise
        error(f"{missing.name} must be installed for this experiment: pip install 'surgery-kernels[clip]'")
    try:
        settings["methods"] = chosen(settings["methods"])
        run_experiment(Settings(**{**settings, "seed": int(options.seed)}), options.out)
    except InputError as wrong:
        error(str(wrong))
    except SafetensorError as broken:
        error(f"every safetensors file must be readable, got {broken}")
