"""`register_with_fla` makes these kernels a backend of flash-linear-attention (fla): its layers, and what else
calls its `chunk_gated_delta_rule`, run on them without a change of theirs.

fla asks a backend about each call (`chunk_gated_delta_rule_verifier`) and computes what is turned down by itself. In
0.6 it dispatches the chunked gated rule; the rule without a gate and the token-by-token one it does not.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from . import _switch
from ._checks import as_state, check_arguments, check_layout
from .accelerate import refused_tensor
from .chunk import chunk_gated_delta_rule


__all__ = ["register_with_fla"]


def register_with_fla() -> None:
    """Registers the gated delta rule as the backend `deltanet_kernels` of fla, ahead of FlashQLA.

    fla logs at level INFO what it chooses and why. The environment variable `FLA_DELTANET_KERNELS=0` turns the backend
    off, at any time. fla itself computes for context-parallel runs, tensors on a CPU, AMD's GPUs and those below
    sm_80, head sizes beyond 256, and what `chunk_gated_delta_rule` of this package refuses.

    Raises:
        ImportError: there is no flash-linear-attention, or one without `fla.backends`, which came with 0.6.
    """
    try:
        from fla.backends import BaseBackend, register
    except ImportError as error:
        raise ImportError(f"register_with_fla needs flash-linear-attention >= 0.6: {error}") from error

    @register("gated_delta_rule")
    class DeltaNetKernelsBackend(BaseBackend):
        backend_type = "deltanet_kernels"
        env_var = "FLA_DELTANET_KERNELS"
        priority = 2  # FlashQLA has 3, and the lower comes first

        chunk_gated_delta_rule_verifier = staticmethod(_verify)
        chunk_gated_delta_rule = staticmethod(_compute)


class _Call(NamedTuple):
    """The arguments of fla's chunk_gated_delta_rule; one that is not among them raises, and fla takes the call."""

    q: torch.Tensor  # [B, T, H, K]
    k: torch.Tensor
    v: torch.Tensor  # [B, T, HV, V]
    g: torch.Tensor  # [B, T, HV], or what the decay is made of, with use_gate_in_kernel
    beta: torch.Tensor  # [B, T, HV], or its logits, with use_beta_sigmoid_in_kernel
    scale: float | None = None
    initial_state: torch.Tensor | None = None  # [N, HV, K, V], or [N, HV, V, K] with state_v_first
    output_final_state: bool = False
    use_qk_l2norm_in_kernel: bool = False
    use_beta_sigmoid_in_kernel: bool = False
    allow_neg_eigval: bool = False
    state_v_first: bool = False
    cu_seqlens: torch.Tensor | None = None
    cu_seqlens_cpu: torch.Tensor | None = None
    chunk_indices: torch.Tensor | None = None  # of fla's kernels
    cp_context: Any = None
    use_gate_in_kernel: bool = False
    A_log: torch.Tensor | None = None  # [HV]
    dt_bias: torch.Tensor | None = None  # [HV]
    chunk_size: int = 64

    @property
    def state(self) -> torch.Tensor | None:
        """The initial state, `[N, HV, K, V]`."""
        return self.initial_state.mT if self.state_v_first and self.initial_state is not None else self.initial_state


def _verify(*args, **options) -> tuple[bool, str | None]:
    """Whether the kernels take a call, and why not: a ValueError, too, makes fla compute it."""
    call = _Call(*args, **options)
    if "off" in _switch.CHOSEN:
        return False, "DELTANET_KERNELS=off"
    if (refused := refused_tensor(call.q)) is not None:
        return False, f"the kernels do not take {refused}"
    if call.cp_context is not None:
        return False, "the kernels do not split a sequence over GPUs (cp_context)"
    if call.g is None or (call.use_gate_in_kernel and call.A_log is None):
        return False, "the gated rule needs g, and A_log with use_gate_in_kernel=True"
    if call.allow_neg_eigval and not call.use_beta_sigmoid_in_kernel:
        return False, "allow_neg_eigval=True is for use_beta_sigmoid_in_kernel=True"
    check_layout(False, call.chunk_size)
    check_arguments(call.q, call.k, call.v, call.beta, call.scale, as_state(call.state), call.cu_seqlens, call.g)
    return True, None


def _compute(*args, **options) -> tuple[torch.Tensor, torch.Tensor | None]:
    """fla's chunk_gated_delta_rule, for a call that `_verify` has let pass."""
    call = _Call(*args, **options)
    g, beta = call.g, call.beta
    if call.use_gate_in_kernel:
        g = g.float() if call.dt_bias is None else g.float() + call.dt_bias.float()
        g = -call.A_log.float().exp() * F.softplus(g)
    if call.use_beta_sigmoid_in_kernel:
        beta = beta.float().sigmoid() * (2 if call.allow_neg_eigval else 1)
    o, final_state = chunk_gated_delta_rule(
        call.q,
        call.k,
        call.v,
        g,
        beta,
        call.scale,
        call.state,
        call.output_final_state,
        call.use_qk_l2norm_in_kernel,
        call.cu_seqlens,
    )
    if call.state_v_first and final_state is not None:
        final_state = final_state.mT.contiguous()
    return o, final_state
