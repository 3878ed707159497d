"""How a command ends: one sentence instead of a traceback, and a code that says what came of it."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import click

FAILED, WRONG_INPUT, INTERRUPTED = 1, 2, 130

MANUAL = {  # the page of docs/ that explains the input of a command
    "merge": "checkpoints",
    "check": "checkpoints",
    "diff": "checkpoints",
    "verify": "checkpoints",
    "explain": "checkpoints",
    "inspect": "inspect",
    "calibrate": "surgery",
    "methods": "methods",
}

EXIT_CODES = """
\b
Exit codes:
  0    done (diff, verify: no difference)
  1    failed on the way, such as on a full disk; --resume goes on from there (diff, verify: different)
  2    wrong arguments, recipe or checkpoints; nothing was written
  130  interrupted; --resume goes on from there
"""


@contextmanager
def errors_as_exit_codes(*, writing: bool = False, written: bool = False) -> Iterator[None]:
    """One sentence on stderr instead of a traceback.

    An OSError is a wrong input until the `writing` has begun, and nothing is once an earlier document was `written`.
    """
    try:
        yield
    except (ValueError, TypeError, ImportError) as error:
        _stop(str(error), FAILED if written else WRONG_INPUT)
    except BrokenPipeError:  # nobody reads on, as behind `| head`: click ends quietly, with 1
        raise
    except OSError as error:
        hint = ": make room and run it again with --resume" if writing and error.errno == errno.ENOSPC else ""
        _stop(f"{error}{hint}", FAILED if writing or written else WRONG_INPUT)
    except RuntimeError as error:
        _stop(str(error), FAILED)
    except KeyboardInterrupt:
        _stop("interrupted: run it again with --resume to go on" if writing else "interrupted", INTERRUPTED)


def _stop(sentence: str, code: int) -> NoReturn:
    command = click.get_current_context().command.name
    if code == WRONG_INPUT and command in MANUAL:
        sentence += f" (manual: {MANUAL[command]})"
    click.echo(f"surgery-kernels: {sentence}", err=True)
    sys.exit(code)
