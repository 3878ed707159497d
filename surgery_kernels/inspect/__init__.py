"""What models are to the one they were tuned from, and to one another: numbers, sentences, pictures, a page."""

from .inspection import Inspection, inspect_models

__all__ = ["Inspection", "inspect_models"]
