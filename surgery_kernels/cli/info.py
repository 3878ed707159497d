"""surgery-kernels info."""

from __future__ import annotations

import click
import torch

from .. import _C


@click.command()
def info() -> None:
    """Print the build, the instruction sets and the devices."""
    build = _C.build_info()
    lines = {
        "surgery_kernels": build["version"],
        "torch": f"{torch.__version__} (built against {build['torch']})",
        "compiler": build["compiler"],
        "instruction set": f"{_C.isa()} of {', '.join(_C.isas())}",
        "threads": torch.get_num_threads(),
        "CUDA kernels": ", ".join(build["cuda"]) or "none besides Triton's",
        "CUDA devices": ", ".join(map(torch.cuda.get_device_name, range(torch.cuda.device_count()))) or "none",
    }
    for name, value in lines.items():
        click.echo(f"{name:16} {value}")
