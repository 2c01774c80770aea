"""For the whole suite: nothing may be fetched, and without a GPU Triton's kernels run in its interpreter."""

import os

import torch


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not torch.cuda.is_available():
    # Read when triton is first imported, which transformers may do: so here, and not beside the kernels' tests.
    os.environ.setdefault("TRITON_INTERPRET", "1")
