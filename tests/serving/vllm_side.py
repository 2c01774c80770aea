"""What vLLM's interpreter runs for test_vllm.py: jobs come as JSON, results go to a file as JSON.

    python vllm_side.py JOBS RESULTS

A job is a folder, the options of `vllm.LLM`, and batches of requests. Its result is the tokens of each request, or the
error that refused it.
"""

import gc
import json
import os
import sys
import traceback


def run(job: dict) -> dict:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    options = {
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "kv_cache_memory_bytes": 2**26,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
    } | job.get("options", {})
    llm = LLM(job["folder"], **options)
    tokens, cached = [], 0
    for batch in job["batches"]:
        adapters = [request.get("adapter") for request in batch]
        outputs = llm.generate(
            [{"prompt_token_ids": request["prompt"]} for request in batch],
            SamplingParams(temperature=0, max_tokens=job["new_tokens"], ignore_eos=True, detokenize=False),
            lora_request=[None if path is None else LoRARequest("adapter", 1, path) for path in adapters],
            use_tqdm=False,
        )
        tokens.append([list(output.outputs[0].token_ids) for output in outputs])
        cached += sum(output.num_cached_tokens or 0 for output in outputs)
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    return {"tokens": tokens, "cached_tokens": cached}


# One process for all jobs: each of vLLM's own would import everything anew, 15 s a job.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def main(jobs_file: str, results_file: str) -> None:
    with open(jobs_file) as file:
        jobs = json.load(file)
    results = {}
    for name, job in jobs.items():
        try:
            results[name] = run(job)
        except Exception as error:
            # A job that is to be refused tells how; for any other one, the test shows this.
            traceback.print_exc()
            results[name] = {"error": f"{type(error).__name__}: {error}"}
        with open(results_file + ".part", "w") as file:
            json.dump(results, file)
    os.replace(results_file + ".part", results_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
