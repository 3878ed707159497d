from ..reference import surgery_train

__all__ = ["surgery_train"]
