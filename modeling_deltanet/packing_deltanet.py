"""Which tokens a layer may read: masks by layer type, and where packed documents begin.

Letters in shapes: B batch, T time, N packed documents.
"""

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache
from transformers.masking_utils import (
    create_causal_mask,
    create_recurrent_attention_mask,
    create_sliding_window_causal_mask,
    find_packed_sequence_indices,
)
from transformers.utils import is_torchdynamo_compiling

from .cache_deltanet import CACHE_NAME
from .configuration_deltanet import DeltaNetConfig


def find_packed_documents(
    inputs_embeds, attention_mask, position_ids, past_key_values, cu_seq_lens_q=None, seq_idx=None, **kwargs
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Where packed documents begin: from `cu_seq_lens_q`, from `seq_idx`, or from `position_ids` that start again.

    Returns the borders `[N + 1]` on the flattened time axis of all rows and each token's position in its document,
    `[B, T]`, or twice None if nothing is packed.
    """
    B, T, _ = inputs_embeds.shape
    padding_mask = attention_mask.get("linear_attention") if isinstance(attention_mask, dict) else attention_mask
    if cu_seq_lens_q is None and seq_idx is None:
        # (a mask of four dimensions says itself which token sees which)
        may_be_packed = position_ids is not None and past_key_values is None
        if not may_be_packed or (padding_mask is not None and len(padding_mask.shape) != 2):
            return None, None
        seq_idx = _packed_by_positions(position_ids.expand(B, -1), padding_mask)
        if seq_idx is None:
            return None, None
    elif padding_mask is not None and not padding_mask.all():
        raise ValueError("packed documents (cu_seq_lens_q, seq_idx) cannot be combined with padding in attention_mask")
    if past_key_values is not None:
        raise ValueError("packed documents (cu_seq_lens_q, seq_idx) cannot be combined with past_key_values")
    if cu_seq_lens_q is not None:
        cu_seqlens = cu_seq_lens_q
    else:
        starts = F.pad(seq_idx.diff(dim=1) != 0, (1, 0), value=True).flatten()
        cu_seqlens = F.pad(starts.nonzero().squeeze(1), (0, 1), value=B * T).to(torch.int32)
    t = torch.arange(B * T, device=inputs_embeds.device)
    starts = cu_seqlens[torch.searchsorted(cu_seqlens, t, right=True) - 1]
    return cu_seqlens, (t - starts).view(B, T)


@torch.compiler.disable(
    reason="whether position_ids are of packed documents depends on them; pass cu_seq_lens_q instead"
)
def _packed_by_positions(position_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """The document of each token, or None: a break in a compiled graph, without which documents would run together.

    Beside a mask, positions may jump forward within a document. Padding between documents is a document of its own:
    what it writes is read by no other.
    """
    if attention_mask is None:
        return find_packed_sequence_indices(position_ids)
    t = torch.arange(position_ids.shape[1], device=position_ids.device)
    is_real = attention_mask[:, -len(t) :].bool()
    previous = F.pad(
        torch.where(is_real, t, -1).cummax(dim=1).values[:, :-1], (1, 0), value=-1
    )  # the real token before t
    follows = is_real & (previous >= 0)
    starts = follows & (position_ids <= position_ids.gather(1, previous.clamp(min=0)))
    if not starts.any():
        return None
    if (follows & (previous != t - 1) & ~starts).any():
        raise ValueError(
            "attention_mask has padding within a document of packed position_ids, got it in a row of several"
        )
    return F.pad((starts[:, 1:] | (is_real[:, 1:] != is_real[:, :-1])).cumsum(dim=1), (1, 0))


def create_masks(
    config: DeltaNetConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None = None,
    position_ids: torch.Tensor | None = None,
) -> dict[str, torch.Tensor | None]:
    """The mask of each of the model's layer types, from `attention_mask`, which is 0 where a token is padding."""
    arguments = {
        "config": config,
        "inputs_embeds": inputs_embeds,
        "attention_mask": attention_mask,
        CACHE_NAME: past_key_values,
        "position_ids": position_ids,
    }
    create_mask = {
        "linear_attention": create_linear_attention_mask,
        "sliding_attention": create_sliding_window_causal_mask,
        "full_attention": create_causal_mask,
    }
    return {layer_type: create_mask[layer_type](**arguments) for layer_type in dict.fromkeys(config.layer_types)}


def create_linear_attention_mask(
    inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs
) -> torch.Tensor | None:
    """Transformers' `[B, T]` mask for linear layers, or None without padding.

    It takes a single token for a generated one, never padding (in 5.23). In a padded prompt that is processed token by
    token, or whose last chunk is one token, it may well be padding, and would enter the memory.
    """
    check_linear_attention_mask(attention_mask)
    is_padded_step = (
        attention_mask is not None
        and inputs_embeds.shape[1] == 1
        and not is_torchdynamo_compiling()
        and not attention_mask[:, -1].all()
    )
    if is_padded_step:
        return attention_mask[:, -1:]
    return create_recurrent_attention_mask(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)


def check_linear_attention_mask(attention_mask: torch.Tensor | None) -> None:
    if attention_mask is not None and len(attention_mask.shape) != 2:
        raise ValueError(
            "a linear-attention layer reads each token once and cannot hide some from others: its "
            f"attention_mask must be [B, T], got {list(attention_mask.shape)}; give packed documents as position_ids "
            "or cu_seq_lens_q, or a dict of masks by layer type"
        )
