"""surgery-kernels info."""

from __future__ import annotations

import click
import torch

from .. import _C
from .options import as_json, print_json


@click.command()
@as_json
def info(as_json: bool) -> None:
    """Print the build, the instruction sets and the devices."""
    build = _C.build_info()
    devices = list(map(torch.cuda.get_device_name, range(torch.cuda.device_count())))
    if as_json:
        facts = {
            **build,
            "built against": build["torch"],
            "torch": torch.__version__,
            "isa": _C.isa(),
            "isas": _C.isas(),
            "threads": torch.get_num_threads(),
            "cuda devices": devices,
        }
        print_json({name.replace(" ", "_"): value for name, value in facts.items()})
        return
    lines = {
        "surgery_kernels": build["version"],
        "torch": f"{torch.__version__} (built against {build['torch']})",
        "compiler": build["compiler"],
        "instruction set": f"{_C.isa()} of {', '.join(_C.isas())}",
        "threads": torch.get_num_threads(),
        "CUDA kernels": ", ".join(build["cuda"]) or "none besides Triton's",
        "CUDA devices": ", ".join(devices) or "none",
    }
    for name, value in lines.items():
        click.echo(f"{name:16} {value}")
