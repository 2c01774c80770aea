"""The cache and `generate`: whatever the route, the same text as without a cache."""

import copy

import pytest
import torch
from tiny import FULL, LINEAR, SLIDING, VARIANTS, tiny_llama, tiny_model, tokens
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.generation.streamers import BaseStreamer

from modeling_deltanet import (
    DeltaNetForCausalLM,
    DeltaNetForSequenceClassification,
    DeltaNetForTokenClassification,
    DeltaNetModel,
)
from modeling_deltanet.cache_deltanet import prepare_cache


TOLERANCE = {"atol": 5e-5, "rtol": 1e-4}

variants = pytest.mark.parametrize("variant", VARIANTS)
# What every route through `generate` is tried on.
few_variants = pytest.mark.parametrize("variant", ["hybrid", "all_linear", "no_convolution", "all_softmax"])


def greedy_without_cache(model, prompt, new_tokens):
    for _ in range(new_tokens):
        prompt = torch.cat((prompt, model(prompt, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    return prompt


def generate(model, prompt, **kwargs):
    return model.generate(prompt, **{"max_new_tokens": 12, "do_sample": False, **kwargs})


# The same text


@variants
@torch.no_grad()
def test_cached_equals_uncached(variant):
    """Generated text would differ from what the model's own logits say."""
    model, prompt = tiny_model(**VARIANTS[variant]), tokens(2, 7)
    expected = greedy_without_cache(model, prompt, 12)
    assert len(set(expected[0].tolist())) > 4  # no endless repetition, which anything would reproduce
    assert torch.equal(generate(model, prompt), expected)
    assert torch.equal(generate(model, prompt, use_cache=False), expected)


@pytest.mark.parametrize("length", [1, 2, 3, 64, 65, 130])
@torch.no_grad()
def test_prompts_of_any_length(length):
    """A prompt shorter than the convolution, or not a multiple of the rule's chunk, would be continued wrongly."""
    for variant in ("hybrid", "all_linear"):
        model, prompt = tiny_model(**VARIANTS[variant], max_position_embeddings=512), tokens(2, length)
        assert torch.equal(generate(model, prompt), greedy_without_cache(model, prompt, 12))


@variants
@torch.no_grad()
def test_left_padded_batch_equals_unpadded_singles(variant):
    """What a prompt is batched with would change its continuation."""
    model = tiny_model(**VARIANTS[variant])
    prompts = [tokens(1, length, seed=length) for length in (9, 3, 1, 14)]
    ids = torch.cat([torch.nn.functional.pad(prompt, (14 - prompt.shape[1], 0), value=0) for prompt in prompts])
    batch = generate(model, ids, attention_mask=(ids != 0).long())[:, 14:]
    for continuation, prompt in zip(batch, prompts):
        assert torch.equal(continuation, generate(model, prompt)[0, prompt.shape[1] :])


@few_variants
@pytest.mark.parametrize("chunk", [1, 4, 5, 100])
@torch.no_grad()
def test_chunked_prefill_equals_one_go(variant, chunk):
    """Saving memory on a long prompt would change the text, all the more beside padding."""
    model, prompt, mask = tiny_model(**VARIANTS[variant]), tokens(2, 17), torch.ones(2, 17, dtype=torch.long)
    mask[1, :6] = 0
    expected = generate(model, prompt, attention_mask=mask)
    assert torch.equal(generate(model, prompt, attention_mask=mask, prefill_chunk_size=chunk), expected)


@variants
@torch.no_grad()
def test_several_tokens_at_once_equal_single_steps(variant):
    """A token's result would depend on whether it came alone or in a chunk."""
    model, x = tiny_model(**VARIANTS[variant]), tokens(2, 90)
    whole = model(x).logits
    for pieces in ([20, 70], [20, 3, 1, 2, 64], [1] * 90, [89, 1]):
        cache, logits = DynamicCache(config=model.config), []
        for piece in x.split(pieces, dim=1):
            logits.append(model(piece, past_key_values=cache).logits)
            assert cache.get_seq_length() == sum(part.shape[1] for part in logits)
        torch.testing.assert_close(torch.cat(logits, dim=1), whole, **TOLERANCE)


@few_variants
def test_steps_with_and_without_gradients_agree(variant):
    """The decode step, which works in place, would give other logits than the one that can be differentiated."""
    model, x = tiny_model(**VARIANTS[variant]), tokens(2, 12)
    results = []
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            cache = DynamicCache(config=model.config)
            results.append(torch.cat([model(t, past_key_values=cache).logits for t in x.split(1, dim=1)], dim=1))
    torch.testing.assert_close(results[0], results[1].detach(), **TOLERANCE)


# Ways to generate


@few_variants
@torch.no_grad()
def test_sampling_follows_the_seed(variant):
    """A sample could not be reproduced, with or without a cache."""
    model, prompt = tiny_model(**VARIANTS[variant]), tokens(2, 7)

    def sample(seed, **kwargs):
        torch.manual_seed(seed)
        return generate(model, prompt, do_sample=True, temperature=0.8, top_k=20, **kwargs)

    assert torch.equal(sample(0), sample(0))
    assert torch.equal(sample(0), sample(0, use_cache=False))
    assert not torch.equal(sample(0), sample(1))
    assert sample(0, num_return_sequences=3).shape[0] == 6


@few_variants
@torch.no_grad()
def test_constrained_generation_of_a_padded_batch(variant):
    """Structured output would break its grammar, or a row's text depend on what it is batched with."""
    model, allowed = tiny_model(**VARIANTS[variant]), list(range(10, 40))
    constraints = {
        "prefix_allowed_tokens_fn": lambda row, ids: allowed,
        "bad_words_ids": [[11], [12, 13]],
        "no_repeat_ngram_size": 2,
    }
    prompts = [tokens(1, length, seed=length) for length in (4, 9)]
    ids = torch.cat([torch.nn.functional.pad(prompt, (9 - prompt.shape[1], 0), value=0) for prompt in prompts])
    batch = generate(model, ids, attention_mask=(ids != 0).long(), **constraints)[:, 9:]
    assert set(batch.flatten().tolist()) <= set(allowed) - {11}
    for continuation, prompt in zip(batch, prompts):
        assert torch.equal(continuation, generate(model, prompt, **constraints)[0, prompt.shape[1] :])


@few_variants
@torch.no_grad()
def test_beam_search_equals_beam_search_without_a_cache(variant):
    """Beams would go on from each other's memory."""
    model, prompt = tiny_model(**VARIANTS[variant]), tokens(2, 7)
    beams = {"num_beams": 4, "num_return_sequences": 4, "output_scores": True, "return_dict_in_generate": True}
    cached, uncached = generate(model, prompt, **beams), generate(model, prompt, use_cache=False, **beams)
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(cached.sequences_scores, uncached.sequences_scores, **TOLERANCE)
    # The beams did change places: otherwise this would pass without any reordering.
    steps = cached.beam_indices[:, :12]
    assert (steps[:, 1:] != steps[:, :-1]).any()


@variants
@torch.no_grad()
def test_state_reorder_equals_a_hand_made_one(variant):
    """`reorder_cache` would leave a layer's state, or its convolution's inputs, with the wrong beam."""
    model, x, more = tiny_model(**VARIANTS[variant]), tokens(4, 9), tokens(4, 3, seed=1)
    order = torch.tensor([2, 0, 0, 3])
    cache = model(x).past_key_values
    by_hand = copy.deepcopy(cache)
    cache.reorder_cache(order)
    for layer in by_hand.layers:
        for states in (getattr(layer, "conv_states", {}), getattr(layer, "recurrent_states", {})):
            for i, state in states.items():
                if state is not None:
                    states[i] = torch.stack([state[row] for row in order])
        if layer.keys is not None:
            layer.keys, layer.values = (torch.stack([x[row] for row in order]) for x in (layer.keys, layer.values))
    got, expected = (model(more, past_key_values=c).logits for c in (cache, by_hand))
    torch.testing.assert_close(got, expected)
    # and both equal starting anew with the reordered texts
    torch.testing.assert_close(got, model(torch.cat((x[order], more), dim=1)).logits[:, 9:], **TOLERANCE)


@few_variants
@torch.no_grad()
def test_streaming(variant):
    """A chat window would show another text than the one returned, or only at the end."""

    class Streamer(BaseStreamer):
        received, ended = [], False

        def put(self, value):
            self.received = [*self.received, value.flatten().tolist()]

        def end(self):
            self.ended = True

    model, prompt, streamer = tiny_model(**VARIANTS[variant]), tokens(1, 7), Streamer()
    expected = generate(model, prompt, streamer=streamer)[0].tolist()
    assert streamer.ended and streamer.received == [prompt[0].tolist(), *[[token] for token in expected[7:]]]


@few_variants
@torch.no_grad()
def test_every_cache_that_a_user_may_pass(variant):
    """A cache made by hand would fail, be ignored, or give another text; all-linear models have no stock one."""
    model, prompt = tiny_model(**VARIANTS[variant]), tokens(2, 7)
    expected = generate(model, prompt)
    static = StaticCache(config=model.config, max_cache_len=40)
    for cache in (None, DynamicCache(), DynamicCache(config=model.config), static):
        got = generate(model, prompt, past_key_values=cache, disable_compile=True)
        assert torch.equal(got, expected)
        if cache is not None:
            assert cache.get_seq_length() == 7 + 11  # the last token is not fed back
    assert torch.equal(generate(model, prompt, cache_implementation="static", disable_compile=True), expected)
    for cache in (DynamicCache(), DynamicCache(config=model.config)):
        logits = model(prompt, past_key_values=cache).logits
        torch.testing.assert_close(logits, model(prompt, use_cache=False).logits, **TOLERANCE)


@few_variants
@torch.no_grad()
def test_a_conversation_goes_on_from_its_cache(variant):
    """The second turn would forget the first, or read it twice."""
    model, prompt = tiny_model(**VARIANTS[variant]), tokens(1, 7)
    first = generate(model, prompt, return_dict_in_generate=True)
    second = torch.cat((first.sequences, tokens(1, 5, seed=3)), dim=1)
    mask = torch.ones_like(second)  # the padding token may well be among what was generated
    got = generate(model, second, attention_mask=mask, past_key_values=first.past_key_values)
    assert torch.equal(got, generate(model, second, attention_mask=mask))


@few_variants
@torch.no_grad()
def test_generating_from_embeddings(variant):
    """Soft prompts and multimodal wrappers could not generate."""
    model, prompt = tiny_model(**VARIANTS[variant]), tokens(2, 7)
    embeds = model.get_input_embeddings()(prompt)
    got = model.generate(inputs_embeds=embeds, max_new_tokens=12, do_sample=False)
    assert torch.equal(got, generate(model, prompt)[:, 7:])


@torch.no_grad()
def test_generate_stops_at_the_end_of_sequence():
    """A batch would run on past its end, or stop all rows with the first."""
    model = tiny_model()
    prompt = tokens(2, 7)
    free = generate(model, prompt)
    end = free[0, 10].item()
    stopped = generate(model, prompt, eos_token_id=end)
    assert (
        stopped[0, : free[0].tolist().index(end, 7) + 1].tolist()
        == free[0, : free[0].tolist().index(end, 7) + 1].tolist()
    )
    assert set(stopped[0, free[0].tolist().index(end, 7) + 1 :].tolist()) <= {0}


@pytest.mark.parametrize("variant", ["hybrid", "all_linear"])
def test_assisted_decoding_is_refused(variant):
    """A state cannot be rolled back token by token: the text would silently be wrong."""
    model = tiny_model(**VARIANTS[variant])
    for arguments in ({"assistant_model": tiny_model(layer_types=[FULL])}, {"prompt_lookup_num_tokens": 3}):
        with pytest.raises(ValueError, match="not supported with stateful models, such as DeltaNetForCausalLM"):
            generate(model, tokens(1, 7), **arguments)


@pytest.mark.parametrize("variant", ["hybrid", "all_linear"])
def test_a_quantised_cache_is_refused(variant):
    """A state in fp32 would be asked to be quantised, or silently not be."""
    with pytest.raises(ValueError, match="(?i)quantiz"):
        generate(tiny_model(**VARIANTS[variant]), tokens(1, 7), cache_implementation="quantized")


@pytest.mark.parametrize("variant", ["hybrid", "all_linear"])
def test_continuous_batching_is_refused(variant):
    """Requests would be served from memories that Transformers' paged cache does not keep."""
    with pytest.raises(Exception, match="(?i)linear"):
        tiny_model(**VARIANTS[variant]).generate_batch([[1, 2, 3]], max_new_tokens=2)


def test_a_deltanet_as_assistant_is_refused():
    """An assistant's rejected tokens would stay in its memory, and its drafts get worse without a word."""
    with pytest.raises(ValueError, match="a DeltaNet cannot be an assistant model"):
        generate(tiny_llama(), tokens(1, 7), assistant_model=tiny_model())


@torch.no_grad()
def test_a_learned_prompt_is_read_once():
    """Beside Transformers 5.24, PEFT 0.21 puts its prompt before each new token: another text, for a Llama too."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    x = tokens(2, 7)
    options = {"attention_mask": torch.ones_like(x), "do_sample": False, "max_new_tokens": 12}
    assert torch.equal(model.generate(input_ids=x, **options), model.generate(input_ids=x, use_cache=False, **options))


# The cache itself


def every_class(**overrides):
    for cls in (DeltaNetForCausalLM, DeltaNetModel, DeltaNetForTokenClassification, DeltaNetForSequenceClassification):
        yield tiny_model(cls, **overrides)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # the heads are Transformers' own
@pytest.mark.parametrize("variant", ["hybrid", "all_linear"])
@torch.no_grad()
def test_a_cache_is_read_by_either_of_its_names(variant):
    """Beside another Transformers, or by an older script, the model would forget what came before without a word."""
    x = tokens(2, 9)
    for model in every_class(**VARIANTS[variant]):
        expected = None
        for name in ("past_key_values", "cache"):
            cache = DynamicCache(config=model.config)
            model(x[:, :6], **{name: cache})
            assert cache.get_seq_length() == 6
            got = model(x[:, 6:], **{name: cache})[0]
            expected = got if expected is None else expected
            torch.testing.assert_close(got, expected)
        if not isinstance(model, DeltaNetForSequenceClassification):  # its last token alone has a result
            torch.testing.assert_close(got, model(x)[0][:, 6:], **TOLERANCE)
        cache = DynamicCache(config=model.config)
        if isinstance(model, DeltaNetForCausalLM | DeltaNetModel):
            model(x, past_key_values=cache, cache=cache)
            assert cache.get_seq_length() == 9


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["past_key_values", "cache"])
@torch.no_grad()
def test_generate_reads_a_cache_by_either_of_its_names(name):
    """A conversation would be read anew, or forgotten."""
    for variant in ("hybrid", "all_linear"):
        model, prompt = tiny_model(**VARIANTS[variant]), tokens(1, 7)
        cache = DynamicCache(config=model.config)
        model(prompt[:, :5], **{name: cache})
        assert torch.equal(generate(model, prompt, **{name: cache}), generate(model, prompt))
        assert cache.get_seq_length() == 7 + 11


@pytest.mark.parametrize("name", ["past_key_value", "cache_params", "layer_past", "anything"])
def test_a_cache_by_an_unknown_name_is_refused(name):
    """A cache that nobody reads: each step would forget what came before."""
    for model in every_class():
        with pytest.raises(ValueError, match=f"past_key_values or cache, got a DynamicCache as {name}"):
            model(tokens(1, 4), **{name: DynamicCache(config=model.config)})
    if name != "cache_params":  # 5.24's `generate` hands this one on as `cache`
        with pytest.raises(ValueError, match=name):
            generate(tiny_model(), tokens(1, 4), **{name: DynamicCache()})


@pytest.mark.parametrize("variant", ["hybrid", "all_linear"])
def test_a_checkpointed_layer_writes_to_no_cache(variant):
    """Backward runs each layer again: the cache would have read every token twice."""
    model, x = tiny_model(**VARIANTS[variant]).train(), tokens(2, 9)
    model.gradient_checkpointing_enable()
    cache = prepare_cache(DynamicCache(config=model.config), model.config)
    with pytest.raises(ValueError, match="under gradient checkpointing"):
        model(x, past_key_values=cache, labels=x)
    assert cache.get_seq_length() == 0
    model(x, use_cache=True, labels=x).loss.backward()


def test_two_caches_at_once_are_refused():
    """One of the two would be ignored."""
    for model in (tiny_model(), tiny_model(DeltaNetModel)):
        with pytest.raises(ValueError, match="two names of one argument, got two different caches"):
            model(tokens(1, 4), past_key_values=DynamicCache(config=model.config), cache=DynamicCache())


@pytest.mark.parametrize(
    "layer_types, foreign",
    [
        ([LINEAR, LINEAR], [FULL, FULL]),
        ([LINEAR, FULL], [FULL, LINEAR]),
        ([LINEAR, FULL], [LINEAR, FULL, FULL]),
        ([SLIDING, FULL], [LINEAR, FULL]),
    ],
)
def test_a_foreign_cache_is_refused_by_name(layer_types, foreign):
    """Another model's cache would end in a tensor shape, or be used in part."""
    model, other = tiny_model(layer_types=layer_types), tiny_model(layer_types=foreign)
    with pytest.raises(ValueError, match=r"cache has layers.*layer_types.*DynamicCache\(config=model.config\)"):
        model(tokens(1, 4), past_key_values=DynamicCache(config=other.config))
    with pytest.raises(ValueError, match=r"cache has layers.*layer_types.*DynamicCache\(config=model.config\)"):
        generate(model, tokens(1, 4), past_key_values=DynamicCache(config=other.config))


@variants
@torch.no_grad()
def test_selecting_and_repeating_sequences_of_a_cache(variant):
    """Contrastive and group sampling, which share a prompt's cache, would fail or mix the rows."""
    model, x, more = tiny_model(**VARIANTS[variant]), tokens(3, 9), tokens(6, 3, seed=1)
    for change, rows in (
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ):
        cache = model(x).past_key_values
        change(cache)
        got = model(more[: len(rows)], past_key_values=cache).logits
        expected = model(torch.cat((x[rows], more[: len(rows)]), dim=1)).logits[:, 9:]
        torch.testing.assert_close(got, expected, **TOLERANCE)


@variants
@torch.no_grad()
def test_a_reset_cache_is_as_good_as_new(variant):
    """The next text would remember the last."""
    model, x = tiny_model(**VARIANTS[variant]), tokens(2, 9)
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=20)):
        model(tokens(2, 5, seed=1), past_key_values=cache)
        cache.reset()
        assert cache.get_seq_length() == 0
        for _ in range(2):
            logits = [model(piece, past_key_values=cache).logits for piece in x.split([5, 1, 3], dim=1)]
            torch.testing.assert_close(torch.cat(logits, dim=1), model(x, use_cache=False).logits, **TOLERANCE)
            cache.reset()


@few_variants
@torch.no_grad()
def test_a_cache_can_be_iterated_copied_and_printed(variant):
    """Tools that look through a cache (DDP, loggers) would fail on linear layers."""
    model, x = tiny_model(**VARIANTS[variant]), tokens(2, 9)
    cache = model(x).past_key_values
    for (keys, values, _), layer_type in zip(list(cache), model.config.layer_types):
        assert (keys is None) == (values is None) == (layer_type == LINEAR)
    snapshot = copy.deepcopy(cache)
    first = model(tokens(2, 3, seed=1), past_key_values=cache).logits
    for token in tokens(2, 3, seed=1).split(1, dim=1):
        again = model(token, past_key_values=snapshot).logits
    torch.testing.assert_close(again, first[:, -1:], **TOLERANCE)
    assert "layers" in repr(cache)
    assert len(cache) == len(model.config.layer_types)


def cache_bytes(cache) -> int:
    tensors = []
    for layer in cache.layers:
        tensors += [layer.keys, layer.values]
        for name in ("conv_states", "recurrent_states"):
            tensors += getattr(layer, name, {}).values()
    return sum(t.untyped_storage().nbytes() for t in tensors if t is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_memory_of_an_all_linear_cache_does_not_grow(dtype):
    """The promise of a linear model, memory that does not grow with the text, would be broken."""
    model = tiny_model(**VARIANTS["all_linear"]).to(dtype)
    config = model.config
    sizes = {}
    for length in (64, 512):
        cache = DynamicCache(config=config)
        model(tokens(1, length), past_key_values=cache)
        for token in tokens(1, 3, seed=1).split(1, dim=1):
            model(token, past_key_values=cache)
        assert all(layer.recurrent_states[0].dtype == torch.float32 for layer in cache.layers)
        sizes[length] = cache_bytes(cache)
    state = 4 * config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim
    convolution = dtype.itemsize * 3 * config.hidden_size * (config.linear_conv_kernel_dim - 1)
    assert sizes[64] == sizes[512] == 3 * (state + convolution)


@torch.no_grad()
def test_memory_of_a_sliding_hybrid_stops_growing():
    """A window would bound what is seen, but not what is kept."""
    model = tiny_model(layer_types=[LINEAR, SLIDING], max_position_embeddings=512)
    sizes = []
    for length in (64, 512):
        cache = model(tokens(1, length)).past_key_values
        model(tokens(1, 1), past_key_values=cache)
        model(tokens(1, 1), past_key_values=cache)
        sizes.append(sum(t.numel() for t in (cache.layers[1].keys, cache.layers[1].values)))
    assert sizes[0] == sizes[1] == 2 * 2 * 8 * 4  # keys and values, 2 heads of 8, the window but for the next token


@few_variants
@torch.no_grad()
def test_a_model_reloaded_in_bf16_generates(variant, tmp_path):
    """Generation would fail on the mixed dtypes of state and weights."""
    tiny_model(**VARIANTS[variant]).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    prompt, mask = tokens(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    assert generate(model, prompt, attention_mask=mask).shape == (2, 19)
    assert generate(model, prompt, attention_mask=mask, num_beams=3).shape == (2, 19)
