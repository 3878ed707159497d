"""The blocks of a model one by one, each called with the arguments that the model itself gives it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .device import autocast_to, device_of
from .frozen import frozen
from .hooks import SiteHooks
from .inputs import MASK, Inputs, select, to_device
from .outputs import open_output
from .sites import Sites
from .stand_in import standing_in

# A cache of keys and values would grow at every replay. Some blocks get it without its name: it can tell its length.
WITHOUT_CACHE = {"past_key_values": None, "past_key_value": None, "use_cache": False}
LENGTH_OF_CACHE = "get_seq_length"

PROBE = 0.75  # what the streams of one sample are multiplied by: a correction at every block


@dataclass(frozen=True)
class Call:
    """How a model calls one of its blocks, but for the stream."""

    args: tuple[Any, ...]
    options: dict[str, Any]
    place: int | str  # of the stream among them
    wrap: Callable[[Tensor], Any]  # the stream as the block takes it

    def of(self, block: nn.Module, stream: Tensor) -> Any:
        args, options = list(self.args), dict(self.options)
        if isinstance(self.place, int):
            args[self.place] = self.wrap(stream)
        else:
            options[self.place] = self.wrap(stream)
        return block(*args, **options)

    def is_like(self, other: Call) -> bool:
        """Whether all but the stream is the same."""
        mine, theirs = (dict((*enumerate(call.args), *call.options.items())) for call in (self, other))
        if mine.keys() != theirs.keys():
            return False
        return all(name == self.place or _same(value, theirs[name]) for name, value in mine.items())


@dataclass(frozen=True)
class Started:
    """A batch on its way through the blocks: how they are called, and the stream before the first."""

    inputs: Inputs
    calls: tuple[Call, ...]
    stream: Tensor


class _BeforeTheBlocks(Exception):
    """Ends a pass at the first block, where what the others are called with is known."""


class BlockRunner(ExitStack):
    """Runs a model block by block, so that the streams of many batches can be changed between two blocks.

    ``begun = runner.start(inputs)``, then ``stream = runner.run(begun, i, stream)`` for every block i, and
    ``runner.finish(begun, stream)`` for the final representation. Streams lie as the model has them;
    ``runner.batch_first(stream)`` is a view [batch, tokens, dim], and back. Arguments of the blocks (masks, positions)
    are those of the model's own pass: of every batch, or of one where all blocks are called alike. The `with` freezes
    the model; in mode and gradients nothing of it is changed afterwards.

    Raises:
        ValueError: the model does something to the tokens between its blocks, or what a block is called with depends
            on the tokens of others; found on one sample at the first `start`.
    """

    def __init__(self, argument: str, model: nn.Module, sites: Sites, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self._argument, self._model, self._sites, self._autocast = argument, model, sites, autocast
        self._device = device_of(model)
        self._blocks = [model.get_submodule(name) for name in sites.blocks]
        self._given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []  # to the blocks, in the pass that runs
        self._returned: list[Any] = []  # by them
        self._puts: list[Callable[[Tensor], Any]] = []  # a stream as each block returns it
        self._final = torch.empty(0)
        self._correct: Callable[[Tensor], Tensor] | None = None
        self._place: int | str | None = None  # of the stream among a block's arguments; None before the first pass
        self._wrapped: list[bool] = []  # by block, whether it takes all that the one before returned
        self._all_alike = False
        self._passing = self._stops = False
        for i, block in enumerate(self._blocks):
            for handle in (
                block.register_forward_pre_hook(partial(self._before, i), with_kwargs=True),
                block.register_forward_hook(self._after),
            ):
                self.callback(handle.remove)
        self._hooks = self.enter_context(SiteHooks(model, sites, self._visit))
        self.enter_context(frozen(model))

    def start(self, inputs: Inputs) -> Started:
        if self._place is None:
            self._learn(to_device(select(inputs, torch.zeros(1, dtype=torch.int64)), self._device))
        inputs = to_device(inputs, self._device)
        self._stops = self._all_alike
        try:
            # what blocks are called with does not depend on the tokens
            with standing_in(self._blocks, self._as_given):
                self._pass(inputs)
        except _BeforeTheBlocks:
            pass
        finally:
            self._stops = False
        return Started(inputs, self._calls(), self._stream_of(*self._given[0]))

    def knows(self, other: BlockRunner) -> None:
        """What `other` found out at its first `start`, of a model of the same configuration: none of it is run for
        that again."""
        self._puts, self._wrapped = list(other._puts), list(other._wrapped)
        self._place, self._all_alike = other._place, other._all_alike
        self._hooks.token_major = list(other._hooks.token_major)

    def run(self, begun: Started, block: int, stream: Tensor) -> Tensor:
        with autocast_to(self._autocast, self._device):
            output = begun.calls[block].of(self._blocks[block], stream)
        return open_output(output, self._sites.blocks[block]).tensor

    def finish(self, begun: Started, stream: Tensor) -> Tensor:
        """The final representation from the stream behind the last block.  # [batch, dim]"""
        with standing_in(self._blocks, lambda block: self._puts[block](stream)):
            self._pass(begun.inputs)
        return self._final

    def batch_first(self, stream: Tensor) -> Tensor:
        """[batch, tokens, dim], a view; of such a view the stream again."""
        return stream.transpose(0, 1) if self._hooks.token_major[0] else stream

    def _pass(self, inputs: Inputs) -> None:
        self._given, self._returned = [], []
        self._passing = True
        try:
            with autocast_to(self._autocast, self._device):
                self._hooks.run(self._model, inputs)
        finally:
            self._passing = False

    @torch.no_grad()
    def _learn(self, one: Inputs) -> None:
        """From one sample: where the stream is, whether blocks are called alike, and that replays are right."""
        self._pass(one)
        self._puts = [_empty_put(output, name) for output, name in self._outputs()]
        self._wrapped = [False] * len(self._blocks)
        self._place = self._find_stream()
        begun = Started(one, self._calls(), self._stream_of(*self._given[0]))
        self._all_alike = all(call.is_like(begun.calls[0]) for call in begun.calls)
        stream = begun.stream
        for i in range(len(self._blocks)):
            stream = self.run(begun, i, stream) * PROBE
        replayed = self.finish(begun, stream)
        self._correct = lambda features: features * PROBE
        self._pass(one)
        self._correct = None
        tolerance = 1e-4 if self._autocast is None else 2e-2
        largest = float(self._final.abs().nan_to_num().max())
        if not torch.allclose(replayed, self._final, rtol=tolerance, atol=tolerance * largest, equal_nan=True):
            raise ValueError(
                f"{self._argument} must give the same when its blocks are called one by one, got other features: what "
                "a block is called with may depend on the tokens, or a block may remember"
            )

    def _as_given(self, block: int) -> Any:
        """What a block returns that leaves the stream as it is."""
        stream = self._stream_of(*self._given[-1])
        return self._puts[block](open_output(stream, self._sites.blocks[block]).tensor)

    def _outputs(self) -> Iterator[tuple[Any, str]]:
        return zip(self._returned, self._sites.blocks, strict=True)

    def _find_stream(self) -> int | str:
        """Where the second block takes what the first returned; of a single block, its first tensor."""
        args, options = self._given[min(1, len(self._given) - 1)]
        named: list[tuple[int | str, Any]] = [*enumerate(args), *options.items()]
        for place, value in named:
            if len(self._blocks) == 1 and isinstance(value, Tensor):
                return place
            if len(self._blocks) > 1 and self._is_from(value, 0):
                return place
        raise self._not_in_a_row(len(self._given) - 1 and 1)

    def _is_from(self, value: Any, block: int) -> bool:
        output = self._returned[block]
        return value is output or value is open_output(output, self._sites.blocks[block]).tensor

    def _calls(self) -> tuple[Call, ...]:
        """Of the last pass. If it ended at the first block, all are called like that."""
        assert self._place is not None
        given = self._given if len(self._given) == len(self._blocks) else self._given * len(self._blocks)
        calls = []
        for i, (args, options) in enumerate(given):
            if given is self._given and i > 0:
                value = _at(self._place, args, options)
                if not self._is_from(value, i - 1):
                    raise self._not_in_a_row(i)
                self._wrapped[i] = not isinstance(value, Tensor)
            without = {name: value for name, value in WITHOUT_CACHE.items() if name in options}
            args = tuple(None if hasattr(value, LENGTH_OF_CACHE) else value for value in args)
            args, options = self._without_stream(args, {**options, **without})
            calls.append(Call(args, options, self._place, self._puts[i - 1] if self._wrapped[i] else _as_it_is))
        return tuple(calls)

    def _without_stream(self, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """So that calls do not keep the tokens of their pass alive."""
        if isinstance(self._place, str):
            return args, {**options, self._place: None}
        return tuple(None if place == self._place else value for place, value in enumerate(args)), options

    def _not_in_a_row(self, block: int) -> ValueError:
        return ValueError(
            f"blocks of {self._argument} must be called with what the block before returned, got something else at "
            f"{self._sites.blocks[block]!r}"
        )

    def _stream_of(self, args: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
        assert self._place is not None
        stream: Tensor = _at(self._place, args, options)
        return stream

    def _before(self, block: int, _: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        if not self._passing:
            return
        self._given.append((args, options))
        if self._stops:
            raise _BeforeTheBlocks

    def _after(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        if self._passing:
            self._returned.append(output)

    def _visit(self, site: int, features: Tensor) -> Tensor | None:
        if site == len(self._blocks):
            self._final = features
            return None
        return None if self._correct is None else self._correct(features)


def row_weights(inputs: Inputs, features: Tensor) -> Tensor | None:
    """Which rows of features [batch, tokens, dim] are real: the attention mask of the inputs; None: all of them."""
    mask = inputs.get(MASK) if isinstance(inputs, Mapping) else None
    if mask is None:
        return None
    if mask.shape != features.shape[:2]:
        raise ValueError(
            f"{MASK} must be [batch, tokens] of the blocks, {list(features.shape[:2])}, got {list(mask.shape)}"
        )
    return (mask != 0).to(features.device, torch.float32)


def read_weights(read: Tensor, others: float) -> Tensor:
    """1 for rows that are read, and `others` for the rest, in float64."""
    return torch.full(read.shape, others, dtype=torch.float64, device=read.device).masked_fill(read, 1.0)


def _empty_put(output: Any, name: str) -> Callable[[Tensor], Any]:
    """The `put` of a block's output, but without the tokens in it, which it would keep alive."""
    slot = open_output(output, name)
    return open_output(slot.put(slot.tensor.new_empty(0)), name).put


def _as_it_is(stream: Tensor) -> Tensor:
    return stream


def _at(place: int | str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    if isinstance(place, str):
        return options.get(place)
    return args[place] if place < len(args) else None


def _same(value: object, other: object) -> bool:
    if isinstance(value, (bool, int, float, str)):
        return type(value) is type(other) and value == other
    return value is other
