"""Every documented head size on a GPU, in each dtype and layout, against fp64: what README and docstrings promise.

`deltanet check --full` runs the same cases. Nearly all of the time goes into compiling, so sizes that share machine code go
to one worker: `pytest -m gpu -n 8 --dist loadgroup tests/ops/test_sizes.py`.
"""

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


def run(K, V, dtype, layouts=check.BASIC):
    """Forward without gradients, output, final state and every gradient of each layout."""
    wrong = {}
    for case in check.cases([(K, V)], [dtype], layouts):
        errors = check.run_case(case, torch.device("cuda"), chunk_delta_rule)
        wrong |= {
            f"{case}: {name}": e for name, e in check.too_large(errors, check.tolerance(case, "kernels")).items()
        }
    assert not wrong, wrong


def table():
    for K, V in check.ALL_SIZES:
        for dtype in check.DTYPES:
            kinds = [(triton.next_power_of_2(d), d & (d - 1) == 0) for d in (K, V)]
            group = f"{dtype} {kinds if dtype == 'bfloat16' else kinds[0]}"  # value columns of the others: always 16
            yield pytest.param(K, V, dtype, marks=pytest.mark.xdist_group(group))


@pytest.mark.parametrize("K, V, dtype", table())
def test_gpu_every_size(K, V, dtype):
    """A user of these heads gets right outputs, states and gradients: few heads, many, packed, cut into segments, grouped."""
    run(K, V, dtype)


@seed(SEED)
@settings(max_examples=20, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(K=st.integers(1, 256), V=st.integers(1, 256), dtype=st.sampled_from(check.DTYPES))
def test_gpu_odd_sizes(K, V, dtype):
    """Heads that are no multiple of 16 are padded, not refused, and as right as the others."""
    note(f"DELTANET_SEED={SEED}")
    run(K, V, dtype)
