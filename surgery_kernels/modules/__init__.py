"""PyTorch models as they run: what they are called with, where their features are, and their blocks one by one."""
