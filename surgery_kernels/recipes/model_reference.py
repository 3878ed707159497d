"""Models as mergekit names them: a folder or a hub id, "@revision" and "+adapter"."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from .settings import check_keys


class Location(BaseModel):
    """A folder, or a repository of the hub at a revision: "path@revision"."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    path: str
    revision: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        if isinstance(value, str):
            path, *revisions = value.split("@")
            if not path or len(revisions) > 1 or revisions == [""]:
                raise ValueError(f" must be path or path@revision (or {{model: {{path: ...}}}}), got {value!r}")
            return {"path": path, "revision": revisions[0] if revisions else None}
        check_keys(value, ("path", "revision"))
        return value

    def __str__(self) -> str:
        return f"{self.path}@{self.revision}" if self.revision else self.path


class ModelReference(BaseModel):
    """A model, or one with an adapter on it: "model+adapter"."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    model: Location
    lora: Location | None = None

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        if isinstance(value, str):
            model, *adapters = value.split("+")
            if len(adapters) > 1:
                raise ValueError(f" must be model or model+adapter (or {{model: {{path: ...}}}}), got {value!r}")
            return {"model": model, "lora": adapters[0] if adapters else None}
        if not isinstance(value, dict):
            raise ValueError(f" must be a folder or a hub id, got {value!r}")
        check_keys(value, ("model", "lora"))
        return value

    def __str__(self) -> str:
        return f"{self.model}+{self.lora}" if self.lora else str(self.model)
