"""bf16 in Triton's interpreter, which keeps it as uint16 and computes with those bits (3.6 to 3.9): made to mean
numbers here.

Patched are casts, which round to nearest even, arithmetic, functions and products, each computed in fp32 and rounded
as the GPU does. Sums over an axis need nothing: Triton casts their input to fp32 itself. What only moves values
(loads, stores, transposes, where, bit casts) moves bits as before. Gluon has no interpreter, so its kernels run on a
GPU alone.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle


def decode(x: TensorHandle) -> np.ndarray:
    if x.dtype.scalar != tl.bfloat16:
        return x.data
    return (np.asarray(x.data).astype(np.uint32) << np.uint32(16)).view(np.float32)


def encode(data: np.ndarray) -> np.ndarray:
    """fp32 to the bits of bf16, rounded to nearest even."""
    bits = np.asarray(data, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(data), np.uint32(0x7FC0), rounded).astype(np.uint16)


def install() -> None:
    builder = interpreter.InterpreterBuilder
    cast_impl, binary_op, unary_op, create_fma = (
        builder.cast_impl, builder.binary_op, builder.unary_op, builder.create_fma,
    )  # fmt: skip

    def is_bf16(x) -> bool:
        return getattr(x, "dtype", x).scalar == tl.bfloat16

    def handle(data, dtype):
        if dtype == tl.bfloat16 and data.dtype != np.bool_:  # a comparison stays one
            data = encode(data)
        return TensorHandle(data, dtype)

    def cast(self, src, dst_type):
        if is_bf16(src) == is_bf16(dst_type):
            return cast_impl(self, src, dst_type)
        data = decode(src)
        data = data.astype(np.float32 if is_bf16(dst_type) else interpreter._get_np_dtype(dst_type))
        return handle(data, dst_type.scalar)

    def binary(self, lhs, rhs, op):
        if not is_bf16(lhs):
            return binary_op(self, lhs, rhs, op)
        return handle(op(decode(lhs), decode(rhs)), tl.bfloat16)

    def unary(self, arg, op):
        return handle(op(decode(arg)), tl.bfloat16) if is_bf16(arg) else unary_op(self, arg, op)

    def fma(self, x, y, z):
        return handle(decode(x) * decode(y) + decode(z), tl.bfloat16) if is_bf16(z) else create_fma(self, x, y, z)

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        # also of fp16: numpy would round after each term, the tensor core once
        total = np.matmul(decode(a), decode(b), dtype=np.float32) + decode(d)
        return handle(total.astype(d.data.dtype if not is_bf16(d) else np.float32), d.dtype.scalar)

    builder.cast_impl, builder.binary_op, builder.unary_op = cast, binary, unary
    builder.create_fma, builder.create_dot = fma, dot
