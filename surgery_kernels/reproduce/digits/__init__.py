"""The paper's experiment on scikit-learn's handwritten digits: `python -m surgery_kernels.reproduce digits`."""
