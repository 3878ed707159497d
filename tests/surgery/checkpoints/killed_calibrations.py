"""Kills calibrations and resumes them. Prints, as JSON, how often one was killed, how many of these had a block
behind them, and how often the files came out otherwise.

python -m tests.surgery.checkpoints.killed_calibrations RECIPE DATA OUT CALL...: before those writes to journals.
A process of its own that never calibrates itself: its children are forks.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
import transformers

import tests.conftest  # noqa: F401
from surgery_kernels.surgery.checkpoints import calibrate_checkpoint
from tests.killed_merges import digest, in_child

USED = transformers.LlamaForCausalLM, transformers.PreTrainedTokenizerFast  # imported once, before there are forks


def main(recipe: str, data: str, out: Path, calls: list[int]) -> None:
    torch.set_num_threads(1)
    partial = out.with_name(f"{out.name}.partial")

    def work(resume: bool = False) -> None:
        calibrate_checkpoint(recipe, data, out, residual=True, resume=resume, progress=False)

    def dies_before(call: int) -> None:
        left, write = call, os.write

        def deadly(*arguments: object) -> int:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return write(*arguments)  # type: ignore[arg-type]

        os.write = deadly  # type: ignore[assignment]
        work()

    assert in_child(work) == 0
    expected = digest(out)
    killed = behind_a_block = different = 0
    shutil.rmtree(out)
    for call in calls:
        killed += in_child(functools.partial(dies_before, call)) == -signal.SIGKILL
        streams = partial / "streams"
        behind_a_block += streams.exists() and not (streams / "0").exists()
        if partial.exists() or not out.exists():
            assert in_child(lambda: work(resume=True)) == 0
        different += digest(out) != expected or partial.exists()
        shutil.rmtree(out)
    print(json.dumps({"killed": killed, "behind_a_block": behind_a_block, "different": different}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), [int(call) for call in sys.argv[4:]])
