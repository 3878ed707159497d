"""An inspection for programs."""

from __future__ import annotations

from typing import Any

from .findings import findings
from .inspection import Inspection


def as_json(of: Inspection) -> dict[str, Any]:
    """Everything under keys that stay; shares are in [0, 1]."""
    return {
        "base": of.base,
        "experts": of.experts,
        "density": of.density,
        "findings": [{"rule": found.rule, "sentence": found.sentence} for found in findings(of)],
        "model": of.whole.as_json(),
        "result": of.result.as_json() if of.result else None,
        "kinds": {kind: numbers.as_json() for kind, numbers in of.by_kind.items()},
        "layers": {str(layer): numbers.as_json() for layer, numbers in of.by_layer.items()},
        "tensors": [
            {
                "name": tensor.name,
                "shape": list(tensor.shape),
                "dtype": tensor.dtype,
                "layer": tensor.layer,
                "kind": tensor.kind,
                "quantiles": tensor.quantiles,
                "spectra": [vars(spectrum) for spectrum in tensor.spectra],
                "result": tensor.result.as_json() if tensor.result else None,
                **tensor.numbers.as_json(),
            }
            for tensor in of.tensors
        ],
        "differences": [{"kind": found.kind, "what": found.sentence} for found in of.differences],
        "notices": of.notices,
    }
