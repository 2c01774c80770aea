"""vLLM with its plugin answers as `generate` does (`make test-vllm`).

Folders and expected tokens are made here; vLLM runs in an environment of its own, whose interpreter `VLLM_PYTHON`
names, because it asks for another release of Transformers.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import FULL, LINEAR, SLIDING, VOCAB, redraw, tiny_llama, tiny_model, tiny_tokenizer, tokens
from transformers import AutoModelForCausalLM

from deltanet_conversion import convert_from_llama


pytestmark = pytest.mark.serving

HERE = Path(__file__).parent
NEW_TOKENS = 64
LENGTHS = (1, 2, 3, 17, 63, 64, 65, 130, 300, 1)
# vLLM's softmax attention takes no smaller head on a CPU.
COMMON = {"max_position_embeddings": 512, "head_dim": 32}
MODELS = {
    "all_linear": {"layer_types": [LINEAR] * 3},
    "sliding": {"layer_types": [LINEAR, SLIDING] * 2, "sliding_window": 48},
    "global": {"layer_types": [LINEAR, FULL, LINEAR, FULL], "use_qk_norm": True, "attention_bias": True},
    "gate": {"linear_use_output_gate": True, "linear_use_decay": True, "tie_word_embeddings": True},
    "grouped": {
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 12,
        "linear_allow_neg_eigval": True,
    },
    "no_convolution": {"linear_conv_kernel_dim": None, "linear_qk_activation": "elu", "linear_qk_norm": "sum"},
}  # fmt: skip
CONFIGURATIONS = [*MODELS, "converted_llama"]
CHUNKED = {"max_num_batched_tokens": 64}


def interpreter() -> str:
    """Of vLLM's environment. Its absence is a failure: a test that is skipped looks like one that has passed."""
    python = os.environ.get("VLLM_PYTHON", "")
    if not shutil.which(python):
        pytest.fail(f"VLLM_PYTHON must name the interpreter of an environment with vLLM, got {python!r}")
    return python


def run_beside(script: str, jobs: dict, folder: Path, **variables: str) -> dict:
    """What a script of this folder answers in vLLM's environment."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    clean = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CACHE_ROOT": str(folder / "cache")}
    command = [interpreter(), HERE / script, folder / "jobs.json", folder / "results.json"]
    with open(folder / "log.txt", "w") as log:
        environment = clean | quiet | variables
        code = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=1800).returncode
    if code:
        pytest.fail(f"{script} ended with {code}:\n" + (folder / "log.txt").read_text()[-6000:])
    return json.loads((folder / "results.json").read_text())


def continuation(model, prompt: torch.Tensor) -> list[int]:
    return model.generate(input_ids=prompt, max_new_tokens=NEW_TOKENS, do_sample=False)[0, prompt.shape[1] :].tolist()


def converted_llama(folder: Path):
    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }  # fmt: skip
    torch.manual_seed(0)
    redraw(tiny_llama(**COMMON, rope_parameters=rope)).save_pretrained(folder / "teacher")
    convert_from_llama(folder / "teacher", folder / "converted_llama", keep="2")
    model = AutoModelForCausalLM.from_pretrained(folder / "converted_llama").eval()
    assert model.config.linear_use_rope
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders with models; their continuations of prompts of all lengths, and of prompts that begin alike."""
    interpreter()
    folder = tmp_path_factory.mktemp("vllm")
    models = {name: tiny_model(**COMMON | fields) for name, fields in MODELS.items()}
    for name, model in models.items():
        model.save_pretrained(folder / name)
    models["converted_llama"] = converted_llama(folder)
    return folder, models


@pytest.fixture(scope="module")
def served(made):
    """What vLLM answers to all jobs of this file, from one process, and what `generate` answers."""
    folder, models = made
    prompts = [tokens(1, n, seed=i) for i, n in enumerate(LENGTHS)]
    beginning = tokens(1, 256, seed=99)
    alike = [torch.cat((beginning, tokens(1, n, seed=n)), dim=1) for n in (1, 3, 40)] + [beginning, prompts[0]]
    jobs, wanted = {}, {}

    def add(job, name, prompts, batches, **options):
        requests = [{"prompt": prompt[0].tolist()} for prompt in prompts]
        jobs[job] = {
            "folder": str(folder / name),
            "batches": [requests] * batches,
            "new_tokens": NEW_TOKENS,
            "options": CHUNKED | options,
        }
        wanted[job] = [[continuation(models[name], prompt) for prompt in prompts]] * batches

    for name in CONFIGURATIONS:
        # Twice: states of the first batch must not be seen by the second.
        add(name, name, prompts, batches=2)
    for name in ("all_linear", "sliding"):
        add(f"{name}_prefix", name, alike, batches=2, enable_prefix_caching=True, block_size=32)

    # An adapter, for every other request of a batch.
    adapted = get_peft_model(tiny_model(**COMMON | MODELS["gate"]), LoraConfig(r=4, lora_alpha=8))
    torch.manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.eval().save_pretrained(folder / "adapter")
    add("adapter", "gate", prompts, batches=1, enable_lora=True, max_loras=2)
    (batch,), (answers,) = jobs["adapter"]["batches"], wanted["adapter"]
    for i in range(0, len(prompts), 2):
        batch[i]["adapter"] = str(folder / "adapter")
        answers[i] = continuation(adapted, prompts[i])
    for job, (name, change, options, _) in REFUSED.items():
        if change is not None:
            shutil.copytree(folder / name, folder / job)
            config = json.loads((folder / job / "config.json").read_text())
            (folder / job / "config.json").write_text(json.dumps(config | change))
            name = job
        jobs[job] = {"folder": str(folder / name), "batches": [], "new_tokens": 1, "options": options}
    return run_beside("vllm_side.py", jobs, folder), wanted


ROPE = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
REFUSED = {
    "speculation": (
        "all_linear", None,
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
        "speculative decoding = 'ngram'",
    ),
    "pooling": ("all_linear", None, {"runner": "pooling"}, "runner = 'pooling'"),
    "narrow_states": ("all_linear", None, {"mamba_ssm_cache_dtype": "bfloat16"}, "mamba_ssm_cache_dtype = 'bfloat16'"),
    "too_many_devices": ("all_linear", None, {"tensor_parallel_size": 4}, "a divisor of linear_num_key_heads (2)"),
    "small_head": ("sliding", {"head_dim": 8}, {}, "head_dim = 8"),
    "changing_angles": ("sliding", {"rope_parameters": ROPE}, {}, "rope_type = 'dynamic'"),
    "one_place": ("all_linear", None, {"enable_lora": True}, "max_loras = 1"),
    "newer_model": ("all_linear", {"linear_use_magic": True}, {}, "knows no linear_use_magic"),
}  # fmt: skip


@pytest.mark.parametrize("job", [*CONFIGURATIONS, "all_linear_prefix", "sliding_prefix", "adapter"])
def test_tokens_are_those_of_generate(served, job):
    """Whoever moves from `generate` to a server would get other answers: in mixed batches, in small chunks of prompts,
    after other requests, from a cached prefix, or with an adapter.
    """
    results, wanted = served
    assert "error" not in results[job], results[job]
    assert results[job]["tokens"] == wanted[job]
    assert all(len(answer) == NEW_TOKENS for batch in wanted[job] for answer in batch)
    assert len({token for batch in wanted[job] for answer in batch for token in answer}) > VOCAB / 4  # no constants
    assert (results[job]["cached_tokens"] > 0) == job.endswith("_prefix")


def test_the_adapter_changes_answers(served):
    """A server that ignores an adapter would pass for one that applies it."""
    _, wanted = served
    without = wanted["gate"][0]
    assert all(answer != plain for answer, plain in list(zip(wanted["adapter"][0], without))[::2])


@pytest.mark.parametrize("job", REFUSED)
def test_what_is_not_supported_is_refused_by_name(served, job):
    """A server would start, and answer wrongly or fail under load."""
    results, _ = served
    assert REFUSED[job][-1] in results[job].get("error", "served"), results[job]


def test_tensor_parallel(made, served, tmp_path):
    """On two devices every mixer is split by its heads, with its convolutions and its decay: a part that is not, or at
    another place, gives other answers.
    """
    folder, _ = made
    _, wanted = served
    job = json.loads((folder / "jobs.json").read_text())["gate"]
    job["options"]["tensor_parallel_size"] = 2
    two_cores = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    results = run_beside("vllm_side.py", {"gate": job}, tmp_path, **two_cores)
    assert results["gate"].get("tokens") == wanted["gate"], results


def test_server(made, tmp_path):
    """`vllm serve`: 32 requests at once, a quarter of which go away: the others must get their answers, and what was
    held for those that left must come back.
    """
    folder, models = made
    tiny_tokenizer().save_pretrained(folder / "sliding")
    prompts = [tokens(1, (1, 2, 17, 64, 65, 130, 200, 300)[i % 8], seed=i) for i in range(32)]
    requests = [{"prompt": prompt[0].tolist(), "aborted": i % 4 == 3} for i, prompt in enumerate(prompts)]
    options = "--dtype float32 --max-model-len 512 --max-num-batched-tokens 128 --kv-cache-memory-bytes 67108864"
    job = {
        "folder": str(folder / "sliding"), "requests": requests, "new_tokens": NEW_TOKENS, "options": options.split(),
    }  # fmt: skip
    results = run_beside("vllm_http_side.py", job, tmp_path)
    wanted = [
        None if request["aborted"] else continuation(models["sliding"], prompt)
        for request, prompt in zip(requests, prompts)
    ]
    assert results["tokens"] == wanted
    assert len(results["figures"]) == 3 and not any(results["figures"].values()), results["figures"]
    assert results["again"] == wanted[:4]
