"""The paper's experiment at a size that runs anywhere: `python -m surgery_kernels.reproduce digits`."""
