"""The paper's experiment on CLIP: `python -m surgery_kernels.reproduce clip --model-dir ... --data-dir ...`."""
