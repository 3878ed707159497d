"""The command `surgery-kernels`: merge checkpoints, calibrate and compare them, and say what this build can do."""

from __future__ import annotations

from importlib import import_module

import click

from .. import _C
from .exits import EXIT_CODES

COMMANDS = (
    *("merge", "inspect", "calibrate", "check", "diff", "verify", "explain"),
    *("methods", "info", "example", "demo"),
)  # each in the file of its name


class Commands(click.Group):
    """Imports a command when it is called for, so that none waits for what another needs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(f".{cmd_name}", __name__), cmd_name)
        return command


@click.group(cls=Commands, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(_C.build_info()["version"], prog_name="surgery-kernels")
def main() -> None:
    """Exact and fast merging of models."""
