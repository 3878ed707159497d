"""Sentences that CLIP's text encoder reads, `{}` standing for the class.

Source: CLIP (arXiv 2103.00020), appendix A.1, and the prompts published with it.
"""

from __future__ import annotations

DEFAULT = ["a photo of a {}."]

CAR_KINDS = ("a {}", "the {}", "my {}", "my dirty {}", "my clean {}", "my new {}", "my old {}")
OVERHEAD_VIEWS = [f"{view} {kind} of" for kind in ("imagery", "photo", "view") for view in ("satellite", "aerial")]
DIGIT = ['a photo of the number: "{}".']

TEMPLATES = {
    "sun397": ["a photo of a {}.", "a photo of the {}."],
    "stanford-cars": [*(f"a photo of {car}." for car in CAR_KINDS), "i love my {}!"],
    "resisc45": [f"{view} {article}{{}}." for view in OVERHEAD_VIEWS for article in ("", "a ", "the ")],
    "eurosat": [f"a centered satellite photo of {article}{{}}." for article in ("", "a ", "the ")],
    "svhn": DIGIT,
    "gtsrb": [f'a {distance} photo of a "{{}}" traffic sign.' for distance in ("zoomed in", "centered", "close up")],
    "mnist": DIGIT,
    "dtd": [
        f"a photo of {article} {{}} {noun}."
        for article in ("a", "the")
        for noun in ("texture", "pattern", "thing", "object")
    ],
}
