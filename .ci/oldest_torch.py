"""What was built against the oldest torch that is promised: that one has all it asks for, and it merges on this one.

.ci/oldest_torch.py VERSION LIBRARY    # where the package was built; LIBRARY: libtorch_cpu.so of that torch
"""

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path.cwd()))

import torch

import surgery_kernels
from surgery_kernels import _C, reference


def symbols(library: str, kind: str) -> set[str]:
    listed = subprocess.run(["nm", "-D", kind, library], check=True, capture_output=True, text=True).stdout
    return {line.split()[-1].partition("@")[0] for line in listed.splitlines()}


version, library = sys.argv[1:]
assert Path.cwd() in Path(_C.__file__).parents, _C.__file__
assert _C.build_info()["torch"].startswith(version), _C.build_info()
asked = {name for name in symbols(_C.__file__, "--undefined-only") if name.startswith(("torch_", "aoti_torch_"))}
# of a GPU; weak, so that the library loads without
missing = asked - symbols(library, "--defined-only") - {"aoti_torch_get_current_cuda_stream"}
assert asked and not missing, missing

base = torch.arange(5_000) % 97 / 64
experts = [base + (torch.arange(5_000) % (7 + t) - 3) / 64 for t in range(3)]
assert torch.equal(surgery_kernels.ties_merge(base, experts), reference.ties_merge(base, experts))
print(f"built against torch {version}, merged with torch {torch.__version__}")
