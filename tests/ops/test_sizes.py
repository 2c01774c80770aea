"""Every documented head size on a GPU, in each dtype and layout, against fp64: what README and docstrings promise.

`deltanet check --full` runs the same cases. Nearly all of the time goes into compiling, so sizes that share machine
code go to one test, and the longest tests come first: `pytest -m gpu -n 8 --dist load --maxschedchunk 1
tests/ops/test_sizes.py`.
"""

import itertools
import os
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, note, seed, settings
from hypothesis import strategies as st


triton = pytest.importorskip("triton")
from deltanet_kernels import chunk_delta_rule  # noqa: E402

from deltanet_conversion import check, check_run  # noqa: E402


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SEED = int(os.environ.get("DELTANET_SEED", torch.seed() % 2**32))


LAYOUTS = ("few", "segmented"), ("many",)  # those of a line share their kernels


def wrong(sizes, dtype, inputs="random", function=chunk_delta_rule):
    """Too large errors of forward without gradients, output, final state and every gradient, in each basic layout, and
    bits that differ between calls. Two threads, for the sake of compiling."""

    def run(layouts):
        found = {}
        for case in check.cases(sizes, [dtype], layouts, [inputs]):
            errors = check.run_case(case, torch.device("cuda"), function, again=check_run.AGAIN)
            too_large = check.too_large(errors, check.tolerance(case, "kernels"))
            found |= {f"{case}: {name}": e for name, e in too_large.items()}
        return found

    with ThreadPoolExecutor(len(LAYOUTS)) as pool:
        return [x for x in pool.map(run, LAYOUTS) if x]


PARTS = 12


@pytest.mark.parametrize("part", range(PARTS))
def test_gpu_odd_sizes(part):
    """Heads that are no multiple of 16 are padded, not refused, and as right as the others. A part has its range of
    K.
    """
    width = (check.LARGEST - 16) // PARTS
    offsets = random.Random(SEED + part)  # hypothesis begins with the least of all
    k_0, v_0, dtype_0 = (offsets.randrange(n) for n in (width, check.LARGEST, len(check.DTYPES)))

    @seed(SEED + part)
    @settings(
        max_examples=1, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(k=st.integers(0, width - 1), v=st.integers(0, check.LARGEST - 1), d=st.integers(0, len(check.DTYPES) - 1))
    def run(k, v, d):
        note(f"DELTANET_SEED={SEED}")
        size = 17 + part * width + (k + k_0) % width, (v + v_0) % check.LARGEST + 1
        assert not wrong([size], check.DTYPES[(d + dtype_0) % len(check.DTYPES)])

    run()


def groups():
    """All sizes, those together that share machine code, largest keys of fp32 first."""
    found = {}
    for (K, V), dtype in itertools.product(check.ALL_SIZES, check.DTYPES):
        kinds = [f"{triton.next_power_of_2(d)}{'' if d & (d - 1) == 0 else '-'}" for d in (K, V)]
        key = (dtype, *kinds) if dtype == "bfloat16" else (dtype, kinds[0])  # value columns of the others: always 16
        found.setdefault(key, []).append((K, V))
    order = sorted(found, key=lambda key: (-check.DTYPES.index(key[0]), *[-d for d in found[key][-1]]))
    # xdist deals out two each at first: a long one and a short one
    pairs = [x for i in range(8) for x in (order[i], order[-1 - i])]
    for key in [*pairs, *order[8:-8]]:
        yield pytest.param(key[0], found[key], id=" ".join(key))


@pytest.mark.parametrize("dtype, sizes", groups())
def test_gpu_every_size(dtype, sizes):
    """A user of any documented heads gets right results: few heads, many, packed, cut into segments, grouped."""
    assert set(check.BASIC) == set(itertools.chain(*LAYOUTS))
    assert not wrong(sizes, dtype)
