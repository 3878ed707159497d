from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from .clip import command as clip_command
from .text import command as text_command

PACKAGES = ("matplotlib", "safetensors", "sklearn")
LARGEST_SEED = 2**32 - 1  # scikit-learn's


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{message}\n")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m surgery_kernels.reproduce", description="Experiments on merged models.")
    commands = parser.add_subparsers(dest="command", required=True)
    digits = commands.add_parser("digits", help="small vision transformers on scikit-learn's handwritten digits")
    digits.add_argument("--seed", default="0", help="seed of split, heads and training (default 0)")
    digits.add_argument(
        "--out", type=Path, default=Path(".cache"), help="folder for checkpoints, table and plots (default .cache)"
    )
    digits.add_argument("--seeds", default="1", help="how many seeds, from --seed on (default 1)")
    digits.add_argument("--steps", default="1000", help="training steps of every adapter (default 1000, the papers')")
    digits.add_argument(
        "--full", action="store_true", help="also SurgeryV2 by gradient, and what rank, steps and images do"
    )
    digits.add_argument("--quick", action="store_true", help="experts of fewer steps, three merges, one repair")
    digits.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help="instead of the merges and their repairs: these methods by task, beside the published order; or all",
    )
    digits.add_argument("--retrain", action="store_true", help="train again even where a checkpoint is there")
    clip = commands.add_parser("clip", help="CLIP ViT-B/32, B/16 or L/14 and the images you have")
    clip_command.add_options(clip)
    clip.add_argument("--seed", default="0", help="seed of adapters and of what --max-images draws (default 0)")
    clip.add_argument(
        "--out",
        type=Path,
        default=Path(".cache"),
        help="folder for pixels (150 KB an image), features, heads and results (default .cache)",
    )
    text = commands.add_parser("text", help="a sentence encoder and labelled texts out of packages of PyPI")
    text_command.add_options(text)
    text.add_argument("--seed", default="0", help="seed of the texts drawn, the experts and the adapters (default 0)")
    text.add_argument(
        "--out", type=Path, default=Path(".cache"), help="folder for tables, plots and JSON (default .cache)"
    )
    matching = commands.add_parser("matching", help="networks of different initialisation on the same digits")
    matching.add_argument("--seed", default="0", help="seed of split and training (default 0)")
    matching.add_argument("--out", type=Path, default=Path(".cache"), help="folder for the table (default .cache)")
    matching.add_argument("--steps", default="300", help="training steps of every network (default 300)")
    options = parser.parse_args(arguments)
    if not options.seed.isdecimal() or int(options.seed) > LARGEST_SEED:
        parser.error(f"--seed must be a whole number from 0 to {LARGEST_SEED}, got {options.seed}")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=options.out):
            pass
    except OSError as error:
        parser.error(f"--out must be a folder that can be written, got {options.out} ({error.strerror})")
    if options.command in ("digits", "matching"):
        for name in ("seeds", "steps"):
            value = getattr(options, name, "1")
            if not value.isdecimal() or int(value) == 0:
                parser.error(f"--{name} must be a whole number from 1, got {value}")
    if options.command in ("clip", "text"):
        command = clip_command if options.command == "clip" else text_command
        command.run(options, parser.error)
        return
    try:
        from safetensors import SafetensorError

        from .digits import methods, quick
        from .digits.experiment import run_seeds
        from .digits.experts import Config
        from .jobs import processes
        from .matching.experiment import run
    except ModuleNotFoundError as error:
        if error.name not in PACKAGES:
            raise
        parser.error(f"{error.name} must be installed for the experiments: pip install 'surgery-kernels[demo]'")
    if options.command == "matching":
        run(options.out, seed=int(options.seed), steps=int(options.steps))
        return
    configs = [Config(seed=int(options.seed) + i) for i in range(int(options.seeds))]
    wanted = methods.names() if options.methods == ["all"] else options.methods
    for name in wanted or ():
        if name not in methods.names():
            parser.error(f"--methods must be all, or of {', '.join(methods.names())}, got {name}")
    if options.quick and (options.full or wanted or len(configs) > 1):
        parser.error("--quick must be alone, got --full, --methods or --seeds beside it")
    try:
        if options.quick:
            quick.run(int(options.seed), options.out)
            return
        if wanted:
            for config in configs:
                with processes() as pool:
                    methods.run(config, options.out, pool, wanted, steps=int(options.steps))
            return
        run_seeds(configs, options.out, retrain=options.retrain, steps=int(options.steps), full=options.full)
    except SafetensorError as error:
        parser.error(f"every checkpoint must be readable, got {error}: run again with --retrain")


if __name__ == "__main__":
    main()
