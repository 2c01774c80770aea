"""What mlx-lm makes of exported folders: run by the interpreter that has it, `python mlx_side.py JOBS RESULTS`.

JOBS holds for each name a folder, prompts (lists of tokens), how many tokens to add to each, and a follow-up that
comes after those. RESULTS holds for each name what was added, or the traceback.
"""

import json
import sys
import traceback

import mlx.core as mx
from mlx_lm import load
from mlx_lm.generate import BatchGenerator, generate_step


PIECE = 7  # tokens of a prompt that are read at once: none of the prompts' lengths, nor of the windows, is a multiple


def alone(model, prompts, new_tokens, **options):
    """Each prompt by itself: its new tokens, and the log probabilities that the first was chosen by."""
    made = []
    for prompt in prompts:
        steps = list(generate_step(mx.array(prompt), model, max_tokens=new_tokens, **options))
        made.append(([token for token, _ in steps], steps[0][1].tolist()))
    return [tokens for tokens, _ in made], [logprobs for _, logprobs in made]


def batched(model, prompts, new_tokens, caches=None):
    """All prompts as a server takes them: more than fit in a batch, of different lengths, in pieces. Returns the new
    tokens, the caches, and how many tokens each cache has read.
    """
    generator = BatchGenerator(
        model, stop_tokens=[], prefill_step_size=PIECE, prefill_batch_size=3, completion_batch_size=4
    )
    uids = generator.insert(prompts, [new_tokens] * len(prompts), caches=caches)
    tokens, ends = {uid: [] for uid in uids}, {}
    while responses := generator.next_generated():
        for response in responses:
            tokens[response.uid].append(response.token)
            if response.finish_reason is not None:
                ends[response.uid] = response
    generator.close()
    return (
        [tokens[uid] for uid in uids],
        [ends[uid].prompt_cache for uid in uids],
        [len(ends[uid].all_tokens) for uid in uids],
    )


def run(folder, prompts, new_tokens, follow_up):
    model, _ = load(folder, trust_remote_code=True)
    found = {}
    found["alone"], found["logprobs"] = alone(model, prompts, new_tokens)
    found["in pieces"], _ = alone(model, prompts, new_tokens, prefill_step_size=PIECE)
    found["batched"], caches, read = batched(model, prompts, new_tokens)
    rest = [(prompt + new)[n:] + follow_up for prompt, new, n in zip(prompts, found["batched"], read)]
    found["continued"], _, _ = batched(model, rest, new_tokens, caches)
    return found


def main(jobs, results):
    with open(jobs) as file:
        cases = json.load(file)
    found = {}
    for name, case in cases.items():
        try:
            found[name] = run(**case)
        except Exception:  # each case is a test of its own
            found[name] = {"error": traceback.format_exc()}
    with open(results, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
