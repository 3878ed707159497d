from ..reference import representation_loss

__all__ = ["representation_loss"]
