"""Repairs of Triton's interpreter, so that a kernel which passes there computes what it computes on a GPU.

bfloat16 arithmetic works on values, not on their bits, and rounding to it is to nearest; `/` and `tl.sqrt` of float32
are as inexact as the instructions they become, so that only a kernel which asks for the exact ones can pass for exact;
`tl.fma` rounds once.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
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
    executor.__call__ = np.errstate(all="ignore")(executor.__call__)  # infinity and NaN are results like any other
    # The language is patched for good; stock: by every launch and every call of a function, which takes milliseconds.
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda function: SimpleNamespace(restore=lambda: None)
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)  # as on the GPU


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
