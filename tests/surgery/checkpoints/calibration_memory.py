"""Prints, as JSON, by how many bytes calibrations raise the peak of resident memory, one after the other.

python -m tests.surgery.checkpoints.calibration_memory FOLDER...: each with recipe.yml, data.jsonl and the model `base`,
taken for the merged one. A process of its own, for the peak never falls again: of a second one what it takes beyond the
first is seen.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import transformers

import tests.conftest  # noqa: F401
from surgery_kernels.surgery.checkpoints import calibrate_checkpoint
from tests.peak_memory import resident

USED = transformers.LlamaForCausalLM, transformers.PreTrainedTokenizerFast  # imported before anything is measured


def main(folders: list[Path]) -> None:
    torch.set_num_threads(1)
    os.fsync = lambda _: None  # waiting for the disk takes no memory
    peaks = [resident("VmRSS")]
    for folder in folders:
        given = folder / "recipe.yml", folder / "data.jsonl", folder / "out"
        calibrate_checkpoint(*given, merged=folder / "base", progress=False)
        peaks.append(resident("VmHWM"))
    print(json.dumps([after - before for before, after in zip(peaks, peaks[1:], strict=False)]))


if __name__ == "__main__":
    main([Path(folder) for folder in sys.argv[1:]])
