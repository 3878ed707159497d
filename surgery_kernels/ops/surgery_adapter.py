from ..reference import surgery_adapter

__all__ = ["surgery_adapter"]
