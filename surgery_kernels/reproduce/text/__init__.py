"""The paper's experiment on a text encoder, from packages of PyPI: `python -m surgery_kernels.reproduce text`."""
