"""For the whole suite: nothing may be fetched, and without a GPU Triton's kernels run in its interpreter."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    # One thread a worker, and a process that a test starts: read by torch's OpenMP when it is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402


if not torch.cuda.is_available():
    # Read when triton is first imported, which transformers may do: so here, and not beside the kernels' tests.
    os.environ.setdefault("TRITON_INTERPRET", "1")
