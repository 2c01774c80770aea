"""The tensor core products in a kernel's PTX: `python products.py kernel.ptx`.

An assembler that gets one kind of product wrong gets it wrong in every kernel, so a rule about kinds can be asserted
for every line of the launch table without a GPU.
"""

import collections
import re
import sys
from pathlib import Path
from typing import NamedTuple


SWIZZLES = {0: 0, 1: 128, 2: 64, 3: 32}  # bytes, by the two highest bits of a descriptor of shared memory


class Product(NamedTuple):
    """One kind of product D [m, n] += A [m, k] B [k, n]. None: does not apply, or does not stand in the PTX."""

    instruction: str  # wgmma (sm_90), mma.sync (all others, and small ones), tcgen05 (sm_100)
    m: int | None
    n: int | None
    k: int | None
    types: str  # of the accumulator, A and B; tcgen05: its kind
    a: str = "registers"  # or "shared", "tensor memory"
    b: str = "registers"
    a_transposed: bool = False  # rows of A next to each other in shared memory, not its columns
    b_transposed: bool = False  # columns of B next to each other in shared memory, not its rows
    a_swizzle: int | None = None  # bytes of a row of the pattern in shared memory: 128, 64, 32, or 0 without
    b_swizzle: int | None = None

    def __str__(self):
        where = [
            place + (f" {swizzle} B" if swizzle is not None else "") + (" transposed" if transposed else "")
            for place, swizzle, transposed in (
                (self.a, self.a_swizzle, self.a_transposed),
                (self.b, self.b_swizzle, self.b_transposed),
            )
        ]
        size = "" if self.m is None else f" m{self.m}n{self.n}k{self.k}"
        return f"{self.instruction}{size} {self.types}, A {where[0]}, B {where[1]}"


def products(ptx: str) -> collections.Counter:
    """Product -> how many instructions of that kind the PTX has."""
    found = collections.Counter()
    for shape, types, arguments in re.findall(r"wgmma\.mma_async\.\S*?\.(m\d+n\d+k\d+)\.(\S+) ([^;]*);", ptx):
        # {d}, a, b, scale-d, imm-scale-a, imm-scale-b[, imm-trans-a][, imm-trans-b]; {registers} or a descriptor for a
        _, a, b, rest = re.fullmatch(r"(\{.*?\}), (\{.*?\}|\S+), (\S+), (.*)", arguments).groups()
        turned = [x == "1" for x in rest.split(", ")[3:]]  # tf32 and 8 bits have no transposed form
        in_registers = a.startswith("{")
        if in_registers:
            turned = [False, *turned]
        a_turned, b_turned = (*turned, False, False)[:2]
        found[
            Product(
                "wgmma", *_sizes(shape), types, "registers" if in_registers else "shared", "shared", a_turned,
                b_turned, None if in_registers else _swizzle(ptx, a), _swizzle(ptx, b),
            )
        ] += 1  # fmt: skip
    for shape, types in re.findall(r"mma\.sync\.aligned\.(m\d+n\d+k\d+)\.row\.col\.(\S+)", ptx):
        found[Product("mma.sync", *_sizes(shape), types)] += 1
    for kind, arguments in re.findall(r"tcgen05\.mma\.\S*kind::(\S+) ([^;]*);", ptx):
        # [d], a, b, instruction descriptor, enable; a descriptor or [tensor memory] for a
        _, a, b, descriptor, _ = arguments.split(", ")[:5]
        bits = _constant(ptx, descriptor)
        n, m = (None, None) if bits is None else ((bits >> 17 & 63) * 8, (bits >> 24 & 31) * 16)
        turned = (False, False) if bits is None else (bool(bits >> 15 & 1), bool(bits >> 16 & 1))
        place = "tensor memory" if "[" in a else "shared"
        k = {"f16": 16, "tf32": 8}.get(kind)
        found[Product("tcgen05", m, n, k, kind, place, "shared", *turned)] += 1
    return found


def _sizes(shape: str) -> list[int]:
    return [int(x) for x in re.findall(r"\d+", shape)]


def _swizzle(ptx: str, register: str) -> int | None:
    """From the constant that makes a descriptor of an address: the last addend of its register, or of its source's."""
    found = re.search(rf"(?:or\.b64|add\.s64)\s+{re.escape(register)}, (%\w+), (-?\d+);", ptx)
    if found is None:
        return None
    source, constant = found[1], int(found[2]) % 2**64
    return SWIZZLES[constant >> 62] if constant >= 2**32 else _swizzle(ptx, source)


def _constant(ptx: str, register: str) -> int | None:
    found = re.search(rf"mov\.b32\s+{re.escape(register)}, (-?\d+);", ptx)
    return None if found is None else int(found[1]) % 2**32


if __name__ == "__main__":
    for path in sys.argv[1:]:
        print(path)
        for product, count in sorted(products(Path(path).read_text()).items(), key=str):
            print(f"  {count:4} x {product}")
