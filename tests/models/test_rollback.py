"""Going back in a text: snapshots of a cache, and prompt-lookup decoding, which needs them."""

import pytest
import torch
from tiny import FULL, LINEAR, SLIDING, tiny_model, tokens
from transformers import DynamicCache, StaticCache

from modeling_deltanet import prompt_lookup, restore_cache, snapshot_cache


CASES = {
    "hybrid": {},
    "all_linear": {"layer_types": [LINEAR] * 2},
    "no_convolution": {"layer_types": [LINEAR, FULL], "linear_conv_kernel_dim": None},
    "all_softmax": {"layer_types": [SLIDING, FULL]},
}
cases = pytest.mark.parametrize("case", CASES)


@cases
@pytest.mark.parametrize("read_before", [0, 9])
@torch.no_grad()
def test_a_snapshot_is_where_the_text_goes_on(case, read_before):
    """What was tried and taken back would stay in the memory; or a second way back would be gone after the first."""
    model, x, wrong = tiny_model(**CASES[case]), tokens(2, 20), tokens(2, 6, seed=1)
    cache = DynamicCache(config=model.config)
    if read_before:
        model(x[:, :read_before], past_key_values=cache)
    snapshot = snapshot_cache(cache, model.config)
    expected = model(x).logits[:, read_before:]
    for _ in range(2):
        for token in (wrong[:, :4], wrong[:, 4:5], wrong[:, 5:]):
            model(token, past_key_values=cache)
        restore_cache(cache, snapshot)
        assert int(cache.get_seq_length()) == read_before
        pieces = [
            model(piece, past_key_values=cache).logits
            for piece in x[:, read_before:].split([1, 1, 9 + 9 - read_before], 1)
        ]
        torch.testing.assert_close(torch.cat(pieces, dim=1), expected, atol=5e-5, rtol=1e-4)
        restore_cache(cache, snapshot)


def test_a_static_cache_has_no_snapshot():
    """A roll back would be silently incomplete: a static layer overwrites what it holds."""
    model = tiny_model()
    with pytest.raises(ValueError, match="only a dynamic cache.*StaticCache"):
        snapshot_cache(StaticCache(config=model.config, max_cache_len=8), model.config)


def repetitive_prompt(model):
    """A text with the model's own continuation in it, so that drafts are right for a while; and then wrong."""
    start = tokens(1, 5)
    text = model.generate(start, max_new_tokens=12, do_sample=False)
    return torch.cat((text, tokens(1, 3, seed=4), text[:, :11]), dim=1)


@cases
@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}, {"min_new_tokens": 30}], ids=str)
def test_prompt_lookup_is_greedy_decoding(case, options):
    """Speculation would change the text."""
    model = tiny_model(**CASES[case])
    prompt = repetitive_prompt(model)
    # (the mask: what is generated may be the padding token)
    options = {"max_new_tokens": 40, "do_sample": False, "attention_mask": torch.ones_like(prompt), **options}
    expected = model.generate(prompt, **options)
    assert torch.equal(model.generate(prompt, custom_generate=prompt_lookup, **options), expected)


def test_prompt_lookup_saves_passes_where_a_text_repeats():
    """Speculation would cost more than it saves."""
    model, lengths = tiny_model(), []
    for (
        layer
    ) in model.model.layers:  # the next token then depends on the last one alone: the text soon goes in circles
        getattr(layer, "linear_attn", getattr(layer, "self_attn", None)).o_proj.weight.data.zero_()
    prompt = tokens(1, 5)
    options = {"max_new_tokens": 120, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    expected = model.generate(prompt, **options)
    model.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    assert torch.equal(model.generate(prompt, custom_generate=prompt_lookup, **options), expected)
    assert len(lengths) < 60  # greedy decoding needs 120


def test_the_cache_after_prompt_lookup_goes_on():
    """The next turn of a conversation would begin with rejected drafts in the memory."""
    model = tiny_model()
    prompt = repetitive_prompt(model)
    options = {"max_new_tokens": 15, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    options["return_dict_in_generate"] = True
    greedy, lookup = (
        model.generate(prompt, **options),
        model.generate(prompt, custom_generate=prompt_lookup, **options),
    )
    assert int(lookup.past_key_values.get_seq_length()) == int(greedy.past_key_values.get_seq_length())
    with torch.no_grad():
        logits = [model(tokens(1, 4, seed=9), past_key_values=o.past_key_values).logits for o in (greedy, lookup)]
    torch.testing.assert_close(*logits, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "rows, options, words",
    [
        (2, {}, "2 sequences"),
        (1, {"do_sample": True}, "do_sample=True"),
        (1, {"use_cache": False}, "needs a cache"),
        (1, {"cache_implementation": "static"}, "only a dynamic cache"),
    ],
)
def test_what_prompt_lookup_does_not_do_is_refused(rows, options, words):
    """A batch or a sample would come out as something else than was asked for."""
    with pytest.raises(ValueError, match=words):
        tiny_model().generate(tokens(rows, 5), custom_generate=prompt_lookup, max_new_tokens=4, **options)
