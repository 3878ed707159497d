"""Checkpoints as they lie on disk or on the Hub, read tensor by tensor."""
