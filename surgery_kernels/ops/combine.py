from ..reference import combine

__all__ = ["combine"]
