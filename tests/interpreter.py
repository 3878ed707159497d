"""Repairs of Triton's interpreter, so that a kernel which passes there computes what it computes on a GPU.

bfloat16 arithmetic works on values, not on their bits, and rounding to it is to nearest; `/` and `tl.sqrt` of float32
are as inexact as the instructions they become, so that only a kernel which asks for the exact ones can pass for exact;
`tl.fma` rounds once; the programs of a launch that says so run at the same time.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import inspect
import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Handle = interpreter.TensorHandle


@functools.cache
def repair() -> None:
    """Once per process, before the first kernel."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    for name in ("cast_impl", "binary_op", "unary_op", "ternary_op", "create_dot"):
        setattr(builder, name, REPAIRED[name](getattr(builder, name)))
    builder.create_fdiv = _divide
    builder.create_sqrt = _square_root
    builder.create_fma = _multiply_add
    # the operand that is a number, as on the GPU; stock: NaN
    builder.create_maxnumf = lambda self, x, y: self.binary_op(x, y, np.fmax)
    builder.create_minnumf = lambda self, x, y: self.binary_op(x, y, np.fmin)
    builder.grid_idx = property(lambda self: PROGRAM.index, lambda self, index: setattr(PROGRAM, "index", index))
    executor.__call__ = _together(executor.__call__)
    executor.__call__ = np.errstate(all="ignore")(executor.__call__)  # infinity and NaN are results like any other
    # The language is patched for good; stock: by every launch and every call of a function, which takes milliseconds.
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda function: SimpleNamespace(restore=lambda: None)
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)  # as on the GPU


PROGRAM = threading.local()  # index: of the program of a thread
WAITING = 1e-4  # seconds after which a program that waits lets another go on


def _together(stock: Callable[..., Any]) -> Callable[..., Any]:
    """A cooperative launch, whose programs may wait for one another: each in a thread of its own."""

    def call(self: Any, *arguments: Any, launch_cooperative_grid: bool = False, **options: Any) -> Any:
        if not launch_cooperative_grid:
            return stock(self, *arguments, **options)
        kernel, self.fn = self.fn, _Collected(self.fn)
        interval = sys.getswitchinterval()
        sys.setswitchinterval(WAITING)
        try:
            return stock(self, *arguments, **options)
        finally:
            sys.setswitchinterval(interval)
            self.fn = kernel

    return call


class _Collected:
    """A kernel whose programs begin once the last of them is there."""

    def __init__(self, kernel: Callable[..., None]) -> None:
        self.kernel, self.indices, self.failed = kernel, [], []
        functools.update_wrapper(self, kernel)
        self.__signature__ = inspect.signature(kernel)

    def __call__(self, **arguments: Any) -> None:
        self.indices.append(PROGRAM.index)
        if len(self.indices) < np.prod(interpreter.interpreter_builder.grid_dim):
            return
        threads = [threading.Thread(target=self._run, args=(i, arguments), daemon=True) for i in self.indices]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive() and not self.failed:  # who waits for one that failed would wait for ever
                thread.join(0.01)
        if self.failed:
            raise self.failed[0]

    @np.errstate(all="ignore")
    def _run(self, index: tuple[int, ...], arguments: dict[str, Any]) -> None:
        PROGRAM.index = index
        try:
            self.kernel(**arguments)
        except Exception as error:  # raised where the launch is
            self.failed.append(error)


def widen(bits: np.ndarray) -> np.ndarray:
    """The float32 of bfloat16 bits."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """The bfloat16 bits of float32, rounded to nearest even; NaN is the GPU's."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits.astype(np.uint64) + 0x7FFF + (bits >> 16 & 1) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def _is_bfloat16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widened(handle: Any) -> Any:
    return Handle(widen(handle.data), tl.float32) if _is_bfloat16(handle) else handle


def _compared(result: Any) -> Any:
    """Truth values as such; stock: of the type that was compared, which 3.9 refuses as a mask."""
    return Handle(result.data, tl.int1) if result.data.dtype == np.bool_ else result


def _cast(stock: Callable[..., Any]) -> Callable[..., Any]:
    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if _is_bfloat16(source) == (target.scalar == tl.bfloat16):
            return stock(self, source, target)
        if _is_bfloat16(source):
            return stock(self, _widened(source), target)
        return Handle(narrow(source.data.astype(np.float32)), tl.bfloat16)

    return cast_impl


def _on_values(stock: Callable[..., Any]) -> Callable[..., Any]:
    def apply(self: Any, *arguments: Any) -> Any:
        *operands, operation = arguments
        if not _is_bfloat16(operands[-1]):  # the first may be a condition
            return _compared(stock(self, *arguments))
        result = stock(self, *map(_widened, operands), operation)
        return Handle(narrow(result.data), tl.bfloat16) if result.data.dtype == np.float32 else _compared(result)

    return apply


def _dot(stock: Callable[..., Any]) -> Callable[..., Any]:
    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return stock(self, _widened(a), _widened(b), *rest)

    return create_dot


REPAIRED = {
    "cast_impl": _cast,
    "binary_op": _on_values,
    "unary_op": _on_values,
    "ternary_op": _on_values,
    "create_dot": _dot,
}


def _divide(self: Any, x: Any, y: Any) -> Any:
    if x.data.dtype == np.float32:
        return Handle(x.data * (np.float32(1) / y.data), x.dtype.scalar)
    return self.binary_op(x, y, np.divide)


def _square_root(self: Any, x: Any) -> Any:
    root = np.sqrt(x.data)
    return Handle(np.nextafter(root, np.float32(0)) if x.data.dtype == np.float32 else root, x.dtype.scalar)


def _c_function(name: str, number: Any) -> Callable[..., np.ndarray]:
    function = getattr(ctypes.CDLL(None), name)
    function.argtypes, function.restype = [number] * 3, number
    return np.frompyfunc(function, 3, 1)


FUSED = {np.float32: _c_function("fmaf", ctypes.c_float), np.float64: _c_function("fma", ctypes.c_double)}


def _multiply_add(self: Any, x: Any, y: Any, z: Any) -> Any:
    number = z.data.dtype.type
    return Handle(np.asarray(FUSED[number](x.data, y.data, z.data), dtype=number), z.dtype.scalar)
