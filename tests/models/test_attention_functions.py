"""Flex and flash attention give what sdpa gives, on a CPU.

Flex attention runs uncompiled; compiled, as Transformers runs it, it has no gradients on a CPU, and its C++ does not
always compile (torch 2.13, Llama too): see `test_gpu.py`. Flash attention's package needs a GPU. Two functions with
its signatures stand in for it; all that comes before them, in Transformers and in the model, is the real thing. They
show that it is asked the right question, not that it answers.
"""

import pytest
import torch
import torch.nn.functional as F
from tiny import FULL, LINEAR, SLIDING, output_and_gradients, tiny_model, tokens
from torch.nn.attention import flex_attention as torch_flex
from transformers import AttentionInterface, AttentionMaskInterface, modeling_flash_attention_utils
from transformers.integrations import flex_attention
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.masking_utils import flash_attention_mask


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), deterministic=False
):
    """flash-attn's: q `[B, T, H, D]`, k and v `[B, S, G, D]`, the last query beside the last key."""
    T, S = q.shape[1], k.shape[1]
    assert causal and q.shape[2] % k.shape[2] == 0 and k.shape == v.shape and dropout_p == 0.0
    distance = torch.arange(S - T, S)[:, None] - torch.arange(S)
    seen = (distance >= 0) & ((distance <= window_size[0]) | (window_size[0] < 0))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, seen, scale=softmax_scale, enable_gqa=True).transpose(1, 2)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), deterministic=False,
):  # fmt: skip
    """flash-attn's: the sequences of a batch one after the other, q `[T, H, D]`, k and v `[S, G, D]`."""
    parts = []
    for x, borders, longest in ((q, cu_seqlens_q, max_seqlen_q), (k, cu_seqlens_k, max_seqlen_k)):
        lengths = borders.diff().tolist()
        assert borders.dtype == torch.int32 and borders[0] == 0 and sum(lengths) == len(x) and max(lengths) <= longest
        parts.append(lengths)
    rows = zip(q.split(parts[0]), k.split(parts[1]), v.split(parts[1]), strict=True)
    options = dropout_p, softmax_scale, causal, window_size
    return torch.cat([flash_attn_func(*(x.unsqueeze(0) for x in row), *options).squeeze(0) for row in rows])


@pytest.fixture
def flash(monkeypatch):
    """A name under which Transformers takes the stand-ins for a flash attention."""
    name, utils = "flash_stand_in", modeling_flash_attention_utils
    functions = flash_attn_func, flash_attn_varlen_func, None, utils._pad_input, utils._unpad_input
    monkeypatch.setattr(utils, "_lazy_imports", lambda *args, **kwargs: functions)
    monkeypatch.setattr(utils, "_loaded_implementation", None)
    monkeypatch.setitem(AttentionInterface._global_mapping, name, flash_attention_forward)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, name, flash_attention_mask)
    return name


@pytest.fixture
def flex(monkeypatch):
    """The name of flex attention, uncompiled."""
    monkeypatch.setattr(flex_attention, "WrappedFlexAttention", lambda training: lambda: torch_flex.flex_attention)
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    with torch.compiler.set_stance("force_eager"):  # the making of block masks too, which took half a minute
        yield "flex_attention"


def cases() -> dict:
    """A batch as it is, padded on either side, and with packed documents, said in each of the ways there are."""
    padded, lengths = torch.ones(2, 20, dtype=torch.long), [6, 14, 3, 17]
    padded[0, :7] = 0
    positions = torch.cat([torch.arange(n) for n in lengths]).view(2, 20)
    borders = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32)
    return {
        "plain": {},
        "left padding": {"attention_mask": padded},
        "right padding": {"attention_mask": padded.flip(1)},
        "position_ids": {"position_ids": positions},
        "one packed row": {"position_ids": positions[:1]},
        "seq_idx": {"seq_idx": (positions == 0).cumsum(1) - 1},
        "cu_seq_lens_q": {"cu_seq_lens_q": borders},
        "all of flash attention's arguments": {
            "cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": 17, "max_length_k": 17,
        },
    }  # fmt: skip


@pytest.mark.parametrize("function", ["flash", "flex"])
@pytest.mark.parametrize("case", cases())
@torch.no_grad()
def test_logits_are_those_of_sdpa(function, case, request):
    """With another attention function a hybrid would see padding, other documents or beyond its window, or fail."""
    inputs, x = cases()[case], tokens(2, 20)
    if case == "one packed row":
        x = x[:1]
    logits = []
    for name in ("sdpa", request.getfixturevalue(function)):
        model = tiny_model(layer_types=[LINEAR, SLIDING, LINEAR, FULL], attn_implementation=name)
        logits.append(
            model(x, use_cache=False, **inputs).logits[inputs.get("attention_mask", torch.ones_like(x)).bool()]
        )
    torch.testing.assert_close(*logits, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("function", ["flash", "flex"])
@pytest.mark.parametrize("padded", [False, True])
def test_generation_is_that_of_sdpa(function, padded, request):
    """Decoding from a cache would put the new token elsewhere than behind the cached ones."""
    x, texts = tokens(2, 9), []
    mask = torch.ones_like(x)
    mask[0, : 3 * padded] = 0
    for name in ("sdpa", request.getfixturevalue(function)):
        model = tiny_model(attn_implementation=name)
        texts.append(model.generate(x, attention_mask=mask, max_new_tokens=12, do_sample=False))
    assert torch.equal(*texts)


def test_gradients_through_flash_attention_are_those_of_sdpa(flash):
    """Training with flash attention would learn something else."""
    x, gradients = tokens(2, 20), []
    for name in ("sdpa", flash):
        model = tiny_model(attn_implementation=name).train()
        gradients.append(output_and_gradients(model, input_ids=x, labels=x, **cases()["position_ids"])[1])
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, atol=1e-5, rtol=1e-4, msg=key)
