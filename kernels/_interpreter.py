"""What Triton 3.6's interpreter lacks for these kernels; imported where TRITON_INTERPRET is set.

- Bounds of loops: NumPy 2.4 no longer makes an int of an array that holds one number.
- bfloat16, which NumPy does not know: its casts truncate where a GPU rounds to the nearest, and
  its dot product multiplies the bits.
- Speed: the language is patched anew for every call of one function by another.
"""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_patch_lang_tensor = interpreter._patch_lang_tensor
_cast_impl = interpreter.InterpreterBuilder.cast_impl
_create_dot = interpreter.InterpreterBuilder.create_dot


def _patch_tensor(tensor: Any, scope: Any) -> None:
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def _widen(bits: np.ndarray) -> np.ndarray:
    """float32 with the values of bfloat16, which comes as uint16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _round(values: np.ndarray) -> np.ndarray:
    """The nearest bfloat16 as uint16, ties to even; NaN stays."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _cast(self: Any, source: Any, target: Any) -> Any:
    kinds = source.dtype.scalar, target.scalar
    if kinds == (tl.float32, tl.bfloat16):
        return interpreter.TensorHandle(_round(source.data), tl.bfloat16)
    if kinds == (tl.bfloat16, tl.float32):
        return interpreter.TensorHandle(_widen(source.data), tl.float32)
    return _cast_impl(self, source, target)


def _dot(self: Any, a: Any, b: Any, total: Any, *options: Any) -> Any:
    wide = [
        interpreter.TensorHandle(_widen(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x
        for x in (a, b)
    ]
    return _create_dot(self, *wide, total, *options)


def _call(self: Any, *arguments: Any, **constants: Any) -> Any:
    if self.fn.__module__.startswith("triton."):
        interpreter._patch_lang(self.fn)  # ours have been since the launch
    return self.rewrite()(*arguments, **constants)


def repair() -> None:
    """Put these in place of the interpreter's own, for the whole process."""
    builder = interpreter.InterpreterBuilder
    interpreter.InterpretedFunction.__call__ = _call
    interpreter._patch_lang_tensor = _patch_tensor
    builder.cast_impl, builder.create_dot = _cast, _dot
