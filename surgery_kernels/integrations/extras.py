"""What a missing toolkit says."""

from __future__ import annotations


def missing(package: str, extra: str, error: ImportError) -> ImportError:
    """A toolkit that is not installed, or too old or too new to have what is imported from it."""
    return ImportError(
        f"{package} must be installed in a version that surgery_kernels supports, got: {error}; "
        f"run `pip install 'surgery-kernels[{extra}]'`"
    )
