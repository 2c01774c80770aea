"""Every documented head size on a GPU, in each dtype and layout, against fp64: what README and docstrings promise.

`deltanet check --full` runs the same cases. Nearly all of the time goes into compiling, so sizes that share machine code go
to one test, and the longest tests come first: `pytest -m gpu -n 8 --dist load --maxschedchunk 1 tests/ops/test_sizes.py`.
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

from deltanet_conversion import check, check_run  # noqa: E402


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SEED = int(os.environ.get("DELTANET_SEED", torch.seed() % 2**32))


def wrong(K, V, dtype):
    """Too large errors of forward without gradients, output, final state and every gradient, in each basic layout, and bits
    that differ between calls."""
    found = {}
    for case in check.cases([(K, V)], [dtype]):
        errors = check.run_case(case, torch.device("cuda"), chunk_delta_rule, again=check_run.AGAIN)
        found |= {
            f"{case}: {name}": e for name, e in check.too_large(errors, check.tolerance(case, "kernels")).items()
        }
    return found


PARTS = 8


@pytest.mark.parametrize("part", range(PARTS))
def test_gpu_odd_sizes(part):
    """Heads that are no multiple of 16 are padded, not refused, and as right as the others. A part has its range of K."""
    width = 256 // PARTS

    @seed(SEED + part)
    @settings(max_examples=2, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(k=st.integers(1, width), v=st.integers(0, 255), dtype=st.sampled_from(("bfloat16", *check.DTYPES)))
    def run(k, v, dtype):
        note(f"DELTANET_SEED={SEED}")
        # the first example is always the least
        assert not wrong(part * width + k, (v + part * 37) % 256 + 1, dtype)

    run()


def groups():
    """All sizes, those together that share machine code, largest keys of fp32 first."""
    found = {}
    for (K, V), dtype in itertools.product(check.ALL_SIZES, check.DTYPES):
        kinds = [f"{triton.next_power_of_2(d)}{'' if d & (d - 1) == 0 else '-'}" for d in (K, V)]
        key = (dtype, *kinds) if dtype == "bfloat16" else (dtype, kinds[0])  # value columns of the others: always 16
        found.setdefault(key, []).append((K, V))
    for key in sorted(found, key=lambda key: (-check.DTYPES.index(key[0]), *[-d for d in found[key][-1]])):
        yield pytest.param(key[0], found[key], id=" ".join(key))


@pytest.mark.parametrize("dtype, sizes", groups())
def test_gpu_every_size(dtype, sizes):
    """A user of any documented heads gets right results: few heads, many, packed, cut into segments, grouped."""
    assert not functools.reduce(operator.or_, (wrong(K, V, dtype) for K, V in sizes))
