"""The paper's experiment: `python -m surgery_kernels.reproduce digits` runs anywhere, `clip` needs CLIP's models."""
