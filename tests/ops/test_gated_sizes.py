"""The gated rule on a GPU against fp64: every documented head size in bf16, published ones in every dtype.

`pytest -m gpu -n 8 --dist load --maxschedchunk 1 tests/ops/test_gated_sizes.py`; see `test_sizes.py`.
"""

import pytest
import torch


triton = pytest.importorskip("triton")
from deltanet_kernels import chunk_gated_delta_rule  # noqa: E402

from deltanet_conversion import check  # noqa: E402
from tests.ops.test_sizes import groups, wrong  # noqa: E402


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
# of Qwen3-Next and Qwen3.5, of OLMo-Hybrid, small ones, and the largest
PUBLISHED = (128, 128), (96, 192), (64, 64), (256, 256)


@pytest.mark.parametrize("inputs", check.GATES)
@pytest.mark.parametrize("dtype", check.DTYPES)
@pytest.mark.parametrize("K, V", PUBLISHED)
def test_gpu_published_sizes(K, V, dtype, inputs):
    """Few heads, many, packed, cut into segments, grouped; a gate as models start with, and one that forgets all."""
    assert not wrong([(K, V)], dtype, inputs, chunk_gated_delta_rule)


@pytest.mark.parametrize("dtype, sizes", [x for x in groups() if x.values[0] == "bfloat16"])
def test_gpu_every_gated_size(dtype, sizes):
    """A user of any documented heads gets right results with a gate, too."""
    assert not wrong(sizes, dtype, "gated", chunk_gated_delta_rule)
