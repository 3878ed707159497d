"""Bytes as people write them, in powers of 1000."""

UNITS = {"TB": 10**12, "GB": 10**9, "MB": 10**6, "KB": 10**3, "": 1}


def format_size(nbytes: float) -> str:
    unit = next(unit for unit in UNITS if nbytes >= UNITS[unit] or not unit)
    return f"{nbytes / UNITS[unit]:.3g} {unit}" if unit else f"{nbytes:.0f} bytes"


def parse_size(text: str) -> int:
    """Raises ValueError for what is not a size of at least one byte."""
    number = text.strip().upper()
    unit = next(unit for unit in UNITS if number.endswith(unit))
    try:
        nbytes = int(float(number.removesuffix(unit)) * UNITS[unit])
    except (ValueError, OverflowError):
        nbytes = 0
    if nbytes < 1:
        raise ValueError(f"must be a number of bytes such as 500MB or 5GB, got {text!r}")
    return nbytes
