"""Prompt-lookup decoding for a model with recurrent states, which Transformers' own refuses.

    model.generate(**inputs, custom_generate=prompt_lookup, max_new_tokens=200)

Where the text repeats something, what followed there is a draft of what follows here; one forward pass checks all of
it. A wrong draft has changed the states, which cannot be cropped: they go back to a snapshot, and the next pass reads
the confirmed tokens again, together with the next draft. The text is that of greedy decoding. (`generate` hands no
streamer to a `custom_generate`: it comes whole.)
"""

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from .cache_deltanet import CACHE_NAME, restore_cache, snapshot_cache


@torch.no_grad()
def prompt_lookup(
    model,
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    draft_tokens: int = 10,
    ngram_size: int = 2,
    **model_kwargs,
):
    """`generate` calls this; its own arguments are two more of `generate`'s: `draft_tokens`, the length of a draft,
    and `ngram_size`, how many of the last tokens must occur before for a draft to be made.

    Raises:
        ValueError: more than one sequence, sampling, beams, or no (dynamic) cache.
    """
    cache = model_kwargs.get(CACHE_NAME)
    if input_ids.shape[0] != 1 or generation_config.do_sample or generation_config.num_beams != 1:
        raise ValueError(
            "prompt_lookup decodes one sequence greedily, got "
            f"{input_ids.shape[0]} sequences, do_sample={generation_config.do_sample}, "
            f"num_beams={generation_config.num_beams}"
        )
    if cache is None or model_kwargs.get("attention_mask") is not None:
        raise ValueError("prompt_lookup needs a cache and a prompt without padding")
    drafts = PromptLookupCandidateGenerator(
        eos_token_id=generation_config._eos_token_tensor,
        num_output_tokens=draft_tokens,
        max_matching_ngram_size=ngram_size,
        max_length=stopping_criteria.max_length,
        logits_processor=logits_processor,
        vocab_size=model.config.vocab_size,
    )

    def read(tokens, keep):
        return model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=keep).logits

    seen, finished = int(cache.get_seq_length()), False
    while not finished:
        unread = input_ids[:, seen:]
        draft = input_ids[:, :0]
        # What is read together with a wrong draft is read again: not a long prompt, and not without end.
        if unread.shape[1] <= 4 * draft_tokens:
            draft = drafts.get_candidates(input_ids)[0][:, input_ids.shape[1] :]
        snapshot = snapshot_cache(cache, model.config)
        logits = read(torch.cat((unread, draft), dim=1), draft.shape[1] + 1)
        all_right = True
        for i in range(draft.shape[1] + 1):
            scores = logits_processor(input_ids, logits[:, i].to(copy=True, dtype=torch.float32))
            token = scores.argmax(-1, keepdim=True)
            input_ids = torch.cat((input_ids, token), dim=1)
            finished = bool(stopping_criteria(input_ids, None).all())
            all_right = i == draft.shape[1] or bool(token == draft[:, i])
            if finished or not all_right:
                break
        if all_right and not finished:
            seen = input_ids.shape[1] - 1
        else:
            restore_cache(cache, snapshot)
    read(input_ids[:, seen:-1], 1)  # a cache that goes on living has read what greedy decoding leaves it with
    if generation_config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=input_ids, **{CACHE_NAME: cache})
    return input_ids
