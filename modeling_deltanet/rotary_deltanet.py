"""Rotary position embeddings: the angles of each position, and the rotation of queries and keys by them."""

from collections.abc import Callable

import torch
import torch.nn as nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

from .configuration_deltanet import DeltaNetConfig


class DeltaNetRotaryEmbedding(nn.Module):
    """Cosines and sines, in fp32, for the queries and keys of the layers that rotate them."""

    def __init__(self, config: DeltaNetConfig):
        super().__init__()
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        rope_init_fn: Callable = self.compute_default_rope_parameters
        if self.rope_type != "default":
            rope_init_fn = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = rope_init_fn(config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: DeltaNetConfig, **kwargs) -> tuple[torch.Tensor, float]:
        """Inverse frequencies of the plain rotary embedding, and its scaling factor of 1."""
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        return config.rope_parameters["rope_theta"] ** -exponents, 1.0

    def _apply(self, fn, recurse=True):
        # `model.bfloat16()` moves parameters and buffers alike, but frequencies that are rounded to bf16 turn the
        # 2000th token too far by up to 4 radians: a hybrid of two layers was 1.3 times as far from its fp32 run, one
        # of three 1.4 times (commit fbd1269).
        exact = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        freqs = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        emb = torch.cat((freqs, freqs), dim=-1)
        return emb.cos() * self.attention_scaling, emb.sin() * self.attention_scaling


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads_dim: int = 1) -> torch.Tensor:
    """Rotate `[B, heads, T, head_dim]`, or another place of `heads`, by the angles of cos and sin, `[B, T, head_dim]`.

    cos and sin are fp32, hence the arithmetic too, with one rounding at the end: all in bf16 its error was 1.7 times
    that (commit 8347574).
    """
    x1, x2 = x.chunk(2, dim=-1)
    return (x * cos.unsqueeze(heads_dim) + torch.cat((-x2, x1), dim=-1) * sin.unsqueeze(heads_dim)).to(x.dtype)
