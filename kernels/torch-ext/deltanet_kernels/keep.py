"""Activation checkpointing that keeps the delta rule's results: its second run reads what the first left.

There is state that outlives a call here: the deque that a region's first run fills and its second empties, and, per
thread, which of the two runs. Without `keep_results` there is none.
"""

import collections
import threading

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from ._replay import replay


class _Here(threading.local):
    run = None


class _Run:
    """Context of a checkpointed region's first run, which leaves the rule's results in `kept`, or of its second."""

    here = _Here()  # backward has threads of its own

    def __init__(self, kept: collections.deque, again: bool):
        self.kept, self.again = kept, again

    def __enter__(self):
        self.outer = self.here.run
        self.here.run = self

    def __exit__(self, *error):
        self.here.run = self.outer


def run_once(function, numbers: tuple, tensors: tuple) -> list:
    """`function(*numbers, *tensors)`, but where a region runs a second time, what its first run kept (see
    `keep_results`).
    """
    run = _Run.here.run
    if run is not None and run.again and run.kept:  # a third run, of a retained graph, finds nothing left
        return run.kept.popleft()
    results = replay(function, numbers, tensors)
    if run is not None and not run.again:
        # detached: autograd hangs its graph on the tensors that it is given, and that graph holds `kept`
        run.kept.append([x.detach() if isinstance(x, torch.Tensor) else x for x in results])
    return results


def keep_results() -> tuple[_Run, _Run]:
    """For `torch.utils.checkpoint.checkpoint(..., use_reentrant=False, context_fn=keep_results)`.

    Backward then computes the region again, but for `chunk_delta_rule`, whose output, A, U and states are kept: 4.5
    tensors of v's size for heads of 128.

    Not `create_selective_checkpoint_contexts`, which intercepts every operator of the region in Python: on the host a
    layer of a model took 5.2 ms forward and backward, 2.9 with this and with plain checkpointing, 1.8 without (kernels
    stubbed).
    """
    kept = collections.deque()
    return _Run(kept, again=False), _Run(kept, again=True)


def keep_results_compiled():
    """The same where `torch.compile` traces the region: it marks the operators, which costs nothing at run time.

    Matrix products are not computed again either. Eager, backward stops before it would come to the last one.
    """
    return create_selective_checkpoint_contexts(_policy)


def _policy(context, operator, *args, **kwargs) -> CheckpointPolicy:
    # rsqrt: a norm's, 2 MB a layer; computed again, Inductor makes a kernel of its own of the norm's weight gradient
    is_kept = operator.name() in ("deltanet_kernels::chunk_forward", "aten::mm", "aten::addmm", "aten::rsqrt")
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE
