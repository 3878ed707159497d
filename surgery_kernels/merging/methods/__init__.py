"""The merging methods, by family."""
