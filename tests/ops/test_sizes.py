"""Every documented head size on a GPU, in each dtype and layout, against fp64: what README and docstrings promise.

`deltanet check --full` runs the same cases. Nearly all of the time goes into compiling, so sizes that share machine code go
to one test: `pytest -m gpu -n 8 --dist worksteal tests/ops/test_sizes.py`.
"""

import functools
import itertools
import operator
import os

import pytest
import torch
from hypothesis import HealthCheck, given, note, seed, settings
from hypothesis import strategies as st


triton = pytest.importorskip("triton")
from deltanet_kernels import chunk_delta_rule  # noqa: E402

from deltanet_conversion import check  # noqa: E402


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SEED = int(os.environ.get("DELTANET_SEED", torch.seed() % 2**32))


def wrong(K, V, dtype):
    """Too large errors of forward without gradients, output, final state and every gradient, in each basic layout."""
    found = {}
    for case in check.cases([(K, V)], [dtype]):
        errors = check.run_case(case, torch.device("cuda"), chunk_delta_rule)
        found |= {
            f"{case}: {name}": e for name, e in check.too_large(errors, check.tolerance(case, "kernels")).items()
        }
    return found


def groups():
    """All sizes, those together that share machine code: compiling, a minute a group in fp32, is what takes the time."""
    found = {}
    for (K, V), dtype in itertools.product(check.ALL_SIZES, check.DTYPES):
        kinds = [f"{triton.next_power_of_2(d)}{'' if d & (d - 1) == 0 else '-'}" for d in (K, V)]
        key = (dtype, *kinds) if dtype == "bfloat16" else (dtype, kinds[0])  # value columns of the others: always 16
        found.setdefault(key, []).append((K, V))
    # the longest first in the part of each of eight workers
    order = sorted(found, key=lambda key: (key[0] != "float32", key[0] != "float16", -found[key][-1][0]))
    for key in itertools.chain.from_iterable(order[i::8] for i in range(8)):
        yield pytest.param(key[0], found[key], id=" ".join(key))


@pytest.mark.parametrize("dtype, sizes", groups())
def test_gpu_every_size(dtype, sizes):
    """A user of any documented heads gets right results: few heads, many, packed, cut into segments, grouped."""
    assert not functools.reduce(operator.or_, (wrong(K, V, dtype) for K, V in sizes))


@seed(SEED)
@settings(max_examples=20, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(K=st.integers(1, 256), V=st.integers(1, 256), dtype=st.sampled_from(check.DTYPES))
def test_gpu_odd_sizes(K, V, dtype):
    """Heads that are no multiple of 16 are padded, not refused, and as right as the others."""
    note(f"DELTANET_SEED={SEED}")
    assert not wrong(K, V, dtype)
