"""What a merging method declares, once: everything that lists, reads, checks or explains methods looks here.

A method is a frozen dataclass. Its class says what it is; its fields are its parameters, made by `shared` and
`per_model`; `merge` fills a scope:

    @dataclass(frozen=True)
    class NearSwap(Method):
        \"\"\"Moves every entry of the base towards the expert's, by at most `t`.\"\"\"

        name = "nearswap"
        title = "NearSwap"
        formula = "base + clamp(expert - base, -t, t)"
        source = "mergekit 0.1.5 `nearswap`"
        num_experts = (1, 1)

        t: float = shared(meaning="largest change", range=AT_LEAST_0)
"""

from __future__ import annotations

import functools
import inspect
import math
from abc import ABC, abstractmethod
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, ClassVar

import torch

from ..ops import arguments
from .scope import Scope


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below and math.isfinite(value)

    def __str__(self) -> str:
        """What follows "must be"."""
        if self.low == -math.inf and self.high == math.inf:
            return "finite"
        if self.high == math.inf:
            return f"finite and above {self.low:g}" if self.open_low else f"finite and {self.low:g} or greater"
        return f"in {'(' if self.open_low else '['}{self.low:g}, {self.high:g}{')' if self.open_high else ']'}"


FINITE = Range()
AT_LEAST_0 = Range(0)
ABOVE_0 = Range(0, open_low=True)
SHARE = Range(0, 1)
SHARE_ABOVE_0 = Range(0, 1, open_low=True)

ARITHMETIC = ("exact", "mergekit")


class _NoneGiven:
    def __repr__(self) -> str:
        return "none given"


NONE_GIVEN = _NoneGiven()  # the default of a parameter that must be given


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method."""

    name: str  # of the field, and of the option of `merge_state_dicts`
    key: str | None  # in recipes; None: recipes do not have it
    meaning: str
    kind: type  # float, int, bool or str; object: whatever the method says
    per_model: bool
    default: Any
    recipe_default: Any  # mergekit's, where that is another; a tuple is a gradient from the first layer to the last
    range: Range
    choices: tuple[str, ...]  # of str

    @property
    def required(self) -> bool:
        return self.default is NONE_GIVEN

    @property
    def values(self) -> str:
        """What it takes, in words."""
        if self.kind is object:
            return "see the class"
        if self.choices:
            return " or ".join(map(repr, self.choices))
        if self.kind is bool:
            return "true or false"
        number = "a whole number" if self.kind is int else "a number"
        return number if self.range == FINITE else f"{number} {str(self.range).removeprefix('finite and ')}"

    def check(self, value: Any, num_tasks: int) -> None:
        """Raises ValueError or TypeError for a value it does not take."""
        if value is None and self.default is None:
            return
        if value is NONE_GIVEN:
            raise TypeError(f"{self.name} must be given, got none")
        if self.choices:
            arguments.check_one_of(self.name, value, self.choices)
        elif self.kind in (float, int):
            values = arguments.per_expert(self.name, value, num_tasks) if self.per_model else [value]
            for one in values:
                self._check_number(one)

    def _check_number(self, value: Any) -> None:
        number = arguments.number(self.name, value)
        if self.kind is int and number != int(number):
            raise ValueError(f"{self.name} must be a whole number, got {value}")
        if number not in self.range:
            raise ValueError(f"{self.name} must be {self.range}, got {value}")


def shared(
    default: Any = NONE_GIVEN,
    *,
    meaning: str,
    kind: type = float,
    range: Range = FINITE,
    choices: tuple[str, ...] = (),
    key: str | None = "",
    recipe_default: Any = MISSING,
) -> Any:
    """A parameter with one value for a tensor. `key`: its name in recipes where that is another; None: none."""
    return _declared(default, meaning, kind, range, choices, key, recipe_default, per_model=False)


def per_model(
    default: Any = NONE_GIVEN,
    *,
    meaning: str,
    range: Range = FINITE,
    key: str | None = "",
    recipe_default: Any = MISSING,
) -> Any:
    """A parameter with one number for every expert: in Python one for all or a list, in recipes each model's own."""
    return _declared(default, meaning, float, range, (), key, recipe_default, per_model=True)


def task_vector_scale() -> Any:
    """lambda, where task vectors are merged and added to a base."""
    return shared(1.0, key="lambda", meaning="scale of the merged task vector")


def model_weights(meaning: str = "factor of each task vector", default: float | None = None) -> Any:
    """What recipes call weight and must give for every model; in Python 1 unless given."""
    return per_model(default, key="weight", recipe_default=NONE_GIVEN, meaning=meaning)


def nonfinite_policy() -> Any:
    """What every op has: what happens with NaN and infinity."""
    meaning = "NaN and infinity: an error, let through, or taken as no change"
    return shared("error", choices=arguments.NONFINITE, key=None, meaning=meaning)


def arithmetic_of(default: str = "mergekit") -> Any:
    """Whether a method rounds once, or after every step as mergekit does; `default` is that of recipes."""
    return shared(
        "exact",
        choices=ARITHMETIC,
        recipe_default=default,
        meaning="exact: float32 or wider, rounded once; mergekit: rounded after every step, as there",
    )


def _declared(
    default: Any,
    meaning: str,
    kind: type,
    range: Range,
    choices: tuple[str, ...],
    key: str | None,
    recipe_default: Any,
    *,
    per_model: bool,
) -> Any:
    facts = {
        "meaning": meaning,
        "kind": str if choices else kind,
        "range": range,
        "choices": choices,
        "key": key,
        "per_model": per_model,
        "recipe_default": default if recipe_default is MISSING else recipe_default,
    }
    return field(default=default, metadata={"parameter": facts})


@dataclass(frozen=True)
class Method(ABC):
    """A merging method with its parameters. Subclasses are dataclasses and say what differs from what stands here."""

    name: ClassVar[str]
    title: ClassVar[str]  # in running text
    formula: ClassVar[str]
    source: ClassVar[str]
    base: ClassVar[str] = "required"  # or "optional"; "none": a base is one model more
    num_experts: ClassVar[tuple[int, int | None]] = (1, None)  # besides a base that is not one of them
    # What decides together: an "element", a "tensor", a "row" or the "model"; "scope": a tensor or the model, as asked
    decides: ClassVar[str] = "element"
    decides_by: ClassVar[tuple[str, ...]] = ()  # "scope": parameters that must be the same for a whole model
    scope: ClassVar[str] = "tensor"  # "scope": of `merge_state_dicts`, where none is asked for
    recipe_scope: ClassVar[str] = "tensor"  # the same of recipes
    in_recipes: ClassVar[bool] = True
    takes_factors: ClassVar[bool] = False  # whether it merges products of LoRAs from a scope's `factors`
    from_inputs: ClassVar[bool] = False  # whether it takes what inputs say of the models: a parameter or an objective
    ignored: ClassVar[tuple[str, ...]] = ()  # keys of mergekit that change no result

    @property
    def batched(self) -> bool:
        """Whether a scope of several tensors gives each of them what it would get alone."""
        return self.decides == "element"

    @classmethod
    @functools.cache
    def parameters(cls) -> tuple[Parameter, ...]:
        return tuple(_parameter(declared) for declared in fields(cls) if "parameter" in declared.metadata)

    @classmethod
    def recipe_defaults(cls) -> dict[str, Any]:
        """What recipes that say nothing give the parameters, by their names."""
        return {parameter.name: parameter.recipe_default for parameter in cls.parameters()}

    @classmethod
    def takes(cls, num_experts: int) -> bool:
        least, most = cls.num_experts
        return least <= num_experts and (most is None or num_experts <= most)

    @classmethod
    def summary(cls) -> str:
        """The first line of its docstring."""
        return (inspect.getdoc(cls) or "").partition("\n")[0]

    @property
    def reads(self) -> int:
        """How often `merge` reads the tensors, about, for the progress bar."""
        return 2

    @property
    def asks(self) -> int:
        """How often `merge` asks its `objective`: where it learns, that is what the progress bar counts."""
        return 0

    def check(self, num_tasks: int) -> None:
        """Raises ValueError or TypeError for a number of experts or a parameter out of range."""
        if not self.takes(num_tasks):
            raise ValueError(f"experts must be {count_in_words(type(self))} for {self.name}, got {num_tasks}")
        for parameter in self.parameters():
            parameter.check(getattr(self, parameter.name), num_tasks)

    @property
    def randomness(self) -> str:
        """Of a method that draws: from which seed and how, in words."""
        return ""

    def generator(self) -> torch.Generator | None:
        """What `Scope.generator` must be, where masks are drawn one after the other."""
        return None

    def num_draws(self, numel: int, num_tasks: int) -> int:
        """How many numbers of the generator `merge` takes for a tensor."""
        return 0

    def decide(self, scope: Scope) -> Any:
        """What is decided over the whole model before its tensors are merged one by one; None where nothing is."""
        return None

    @property
    def expects(self) -> bool:
        """Whether `decide` gives limits that a sample can tell, by which a merge can be corrected entry by entry."""
        return False

    def present(self, num_tasks: int) -> list[int]:
        """The experts that have a limit."""
        return list(range(num_tasks))

    def ranks(self, numel: int, num_tasks: int) -> list[int | None]:
        """How many entries of a model each of these experts keeps, where it `expects`; None: all."""
        raise NotImplementedError

    @abstractmethod
    def merge(self, scope: Scope) -> None:
        """Fills `scope.out`."""


def _parameter(declared: Field[Any]) -> Parameter:
    facts = dict(declared.metadata["parameter"])
    key = declared.name if facts["key"] == "" else facts["key"]
    return Parameter(**{**facts, "key": key}, name=declared.name, default=declared.default)


def count_in_words(method: type[Method]) -> str:
    least, most = method.num_experts
    if least == most:
        return f"exactly {least}"
    return f"at least {least}" if most is None else f"{least} to {most}"
