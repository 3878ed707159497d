"""A command as a process of its own, and the most memory that it had resident.

python process.py COMMAND... runs it and prints the bytes. This file needs no package and little memory: to a process
counts as its own what the one that started it had resident.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence


def run(command: Sequence[str]) -> int:
    """Peak of resident memory in bytes, with the pages of mapped files; raises where the command fails."""
    starter = [sys.executable, "-I", "-S", __file__, *command]
    return int(subprocess.run(starter, stdout=subprocess.PIPE, check=True).stdout)


def main(command: Sequence[str]) -> int:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    print(usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
    return process.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
