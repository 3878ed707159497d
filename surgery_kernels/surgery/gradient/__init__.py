"""Adapters trained step by step: `v1` and `v2` say what a step is."""
