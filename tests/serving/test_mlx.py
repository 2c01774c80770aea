"""An exported folder, run by mlx-lm in an environment of its own (`make test-mlx`): the tokens are `generate`'s."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import FULL, LINEAR, SLIDING, VARIANTS, redraw, tiny_llama, tiny_model, tiny_tokenizer, tokens
from transformers import AutoModelForCausalLM

from deltanet_conversion import convert_checkpoint, export_checkpoint
from deltanet_conversion.export import ACTIVATIONS


pytestmark = pytest.mark.serving

ROOT = Path(__file__).parents[2]
LENGTHS = (5, 64, 2, 300, 1)  # short ones beside long ones: a batch pads the former's pieces
NEW_TOKENS = 64
FOLLOW_UP = [5, 7, 11]
# Weights are drawn until no two tokens are closer than this at any step: which comes first is then no matter of
# rounding. mlx-lm's log probabilities were 2e-5 from ours at most (2026-11-27).
MARGIN, TOLERANCE = 2e-4, 1e-4

ROTATIONS = {
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128},  # scales cosines and sines, too
}
# the additive update, a baseline, is refused: tests/conversion/test_mlx_export.py
CASES = {name: fields for name, fields in VARIANTS.items() if name != "additive"} | {
    "tied_embeddings": {"tie_word_embeddings": True},
    "wider_window": {"layer_types": [SLIDING, LINEAR], "sliding_window": 50},
    "negative_eigenvalues_and_rope": {
        "layer_types": [LINEAR] * 2, "linear_use_rope": True, "head_dim": 16, "linear_allow_neg_eigval": True,
        "linear_conv_kernel_dim": None,
    },
    **{f"rotation_{kind}": {"linear_use_rope": True, "head_dim": 16, "rope_parameters": {
        "rope_type": kind, "rope_theta": 1e4, **fields,
    }} for kind, fields in ROTATIONS.items()},
    **{f"activation_{name}": {"hidden_act": name, "layer_types": [LINEAR]} for name in ACTIVATIONS},
}  # fmt: skip
CONVERTED = "converted_llama"


@pytest.fixture(scope="session")
def mlx():
    """The folder of programs beside the interpreter that has mlx-lm."""
    if "MLX_PYTHON" not in os.environ:
        pytest.fail("MLX_PYTHON must name the interpreter of an environment with mlx-lm: `make test-mlx` makes one")
    folder = Path(os.environ["MLX_PYTHON"]).absolute().parent
    if not (folder / "mlx_lm.generate").exists():
        pytest.fail(f"MLX_PYTHON is {os.environ['MLX_PYTHON']!r}, and there is no mlx_lm.generate beside it")
    return folder


def run(*command, **options) -> subprocess.CompletedProcess:
    """A program that must succeed."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{shlex.join(done.args)}\n{done.stdout}\n{done.stderr}"
    return done


@torch.no_grad()
def greedy(model, prompt: list[int], count: int = NEW_TOKENS) -> tuple[list[int], list[float], float]:
    """The tokens that our `generate` adds, the first one's log probabilities, and the least distance of two tokens."""
    made = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=count, do_sample=False,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    logits = torch.stack(made.logits, dim=1)[0]
    first, second = logits.topk(2).values.unbind(-1)
    return made.sequences[0, len(prompt) :].tolist(), logits[0].log_softmax(-1).tolist(), (first - second).min().item()


def expected(model) -> tuple[dict, float]:
    """What `mlx_side.run` shall find, and the least distance of two tokens."""
    prompts = [tokens(1, n, seed=n)[0].tolist() for n in LENGTHS]
    made = [greedy(model, prompt) for prompt in prompts]
    new, logprobs, margins = zip(*made)
    after = [greedy(model, prompt + added + FOLLOW_UP) for prompt, added in zip(prompts, new)]
    wanted = {name: list(new) for name in ("alone", "in pieces", "batched")}
    wanted |= {"logprobs": list(logprobs), "continued": [added for added, _, _ in after]}
    return wanted, min(*margins, *(margin for _, _, margin in after))


def converted(folder: Path, seed: int):
    """A hybrid whose linear layers rotate, from a small Llama with tied embeddings."""
    torch.manual_seed(seed)
    rope = {"rope_type": "llama3", "rope_theta": 1e4, **ROTATIONS["llama3"]}
    teacher = redraw(tiny_llama(tie_word_embeddings=True, rope_parameters=rope))
    teacher.save_pretrained(folder / f"teacher-{seed}")
    convert_checkpoint(folder / f"teacher-{seed}", folder / f"student-{seed}", keep="25%")
    model = AutoModelForCausalLM.from_pretrained(folder / f"student-{seed}").eval()
    assert model.config.layer_types == [LINEAR, LINEAR, LINEAR, FULL] and model.config.linear_use_rope
    return model


@pytest.fixture(scope="session")
def found_and_expected(mlx, tmp_path_factory):
    """For each case what mlx-lm finds, all in one process, and what our model finds."""
    root = tmp_path_factory.mktemp("mlx")
    jobs, wanted = {}, {}
    for name in [*CASES, CONVERTED]:
        for seed in range(20):
            model = converted(root, seed) if name == CONVERTED else case(name, seed)
            wanted[name], margin = expected(model)
            if margin > MARGIN:
                break
        assert margin > MARGIN, f"{name}: two tokens are {margin} apart"
        export(model, root / name)
        prompts = [tokens(1, n, seed=n)[0].tolist() for n in LENGTHS]
        jobs[name] = {
            "folder": str(root / f"{name}-mlx"), "prompts": prompts, "new_tokens": NEW_TOKENS, "follow_up": FOLLOW_UP
        }  # fmt: skip
    return run_jobs(mlx, jobs, root), wanted


def run_jobs(mlx: Path, jobs: dict, folder: Path) -> dict:
    """What `mlx_side.py` finds."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    run(mlx / "python", Path(__file__).with_name("mlx_side.py"), folder / "jobs.json", folder / "results.json")
    return json.loads((folder / "results.json").read_text())


def case(name: str, seed: int = 0, **overrides):
    return tiny_model(seed=seed, **{"max_position_embeddings": 512} | CASES[name] | overrides)


def export(model, folder: Path) -> Path:
    """Save a model with a tokenizer, and export it beside that folder."""
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    target = folder.with_name(f"{folder.name}-mlx")
    export_checkpoint(folder, target, to="mlx")
    return target


@pytest.mark.parametrize("name", [*CASES, CONVERTED])
def test_tokens_are_those_of_generate(found_and_expected, name):
    """A model would say something else on a Mac: for some length of prompt, in a prompt that is read in pieces, among
    other requests, or after a cached conversation.
    """
    found, wanted = (results[name] for results in found_and_expected)
    assert "error" not in found, found["error"]
    for how in ("alone", "in pieces", "batched", "continued"):
        assert dict(zip(LENGTHS, found[how])) == dict(zip(LENGTHS, wanted[how])), how
    torch.testing.assert_close(
        torch.tensor(found["logprobs"]), torch.tensor(wanted["logprobs"]), atol=TOLERANCE, rtol=0
    )
    assert len({token for new in wanted["alone"] for token in new}) > 3 or name == "fixed_beta"


def test_a_quantised_model_computes_with_its_weights(mlx, tmp_path):
    """`mlx_lm.convert -q`, which a Mac's memory asks for, would leave a model that does not load, or says something
    else than its rounded weights say.
    """
    model = tiny_model(
        hidden_size=64, intermediate_size=64, linear_use_decay=True, linear_num_value_heads=4, linear_key_head_dim=32,
        linear_value_head_dim=16, max_position_embeddings=512,
    )  # fmt: skip
    exported = export(model, tmp_path / "model")
    prompts, jobs = [[5, 7, 9], tokens(1, 70)[0].tolist()], {}
    for bits in (8, 4):
        to_quantise = "--hf-path", exported, "--mlx-path", tmp_path / f"{bits}", "-q", "--q-bits", bits
        run(mlx / "mlx_lm.convert", *to_quantise, "--trust-remote-code")
        jobs[f"{bits}"] = {"folder": str(tmp_path / f"{bits}"), "prompts": prompts}
        jobs[f"{bits}"] |= {"new_tokens": NEW_TOKENS, "follow_up": FOLLOW_UP}
    found = run_jobs(mlx, jobs, tmp_path)
    for bits in ("8", "4"):
        assert "error" not in found[bits], found[bits]["error"]
        assert [len(new) for new in found[bits]["batched"]] == [NEW_TOKENS] * 2
    load_rounded(model, tmp_path / "8")
    made = [greedy(model, prompt) for prompt in prompts]
    assert min(margin for *_, margin in made) > MARGIN
    assert found["8"]["alone"] == found["8"]["in pieces"] == [new for new, *_ in made]


def load_rounded(model, folder: Path) -> None:
    """Give our model the weights of an MLX folder of 8 bits: 4 in each uint32, a scale and an offset for each 64."""
    rounded = load_file(folder / "model.safetensors")
    weights = {}
    for name, x in rounded.items():
        if x.dtype == torch.uint32:
            scales, biases = (
                rounded[name.replace(".weight", suffix)].repeat_interleave(64, dim=1)
                for suffix in (".scales", ".biases")
            )
            weights[name] = x.view(torch.uint8) * scales + biases
        elif name.endswith(".conv1d.weight"):
            sizes = [
                conv.out_channels for conv in _convolutions(model.get_submodule(name.removesuffix(".conv1d.weight")))
            ]
            for letter, part in zip("qkv", x.mT.split(sizes)):
                weights[name.replace("conv1d", f"{letter}_conv1d")] = part
        elif not name.endswith((".scales", ".biases")):
            weights[name] = x
    model.load_state_dict(weights)


def _convolutions(mixer):
    return mixer.q_conv1d, mixer.k_conv1d, mixer.v_conv1d


def test_a_cast_leaves_the_decay_in_fp32(mlx, tmp_path):
    """exp(A_log) in bf16 would be off by up to 1 %, which a memory of hundreds of tokens multiplies."""
    exported = export(case("decay"), tmp_path / "model")
    run(
        mlx / "mlx_lm.convert", "--hf-path", exported, "--mlx-path", tmp_path / "bf16", "--dtype", "bfloat16",
        "--trust-remote-code",
    )  # fmt: skip
    for name, tensor in load_file(tmp_path / "bf16" / "model.safetensors").items():
        assert tensor.dtype == (torch.float32 if name.endswith((".A_log", ".dt_bias")) else torch.bfloat16), name


def test_the_documented_commands_serve_a_model(mlx, tmp_path):
    """A new user would type what docs/serving.md says, and get an error or another text than ours."""
    section = (ROOT / "docs" / "serving.md").read_text().partition("\n## MLX")[2].partition("\n## ")[0]
    lines = [
        shlex.split(line, comments=True) for line in re.search("```bash\n(.*?)```", section, re.S)[1].splitlines()
    ]
    programs = [line[0] for line in lines]
    assert programs == ["pip", "deltanet", "mlx_lm.generate", "mlx_lm.server", "mlx_lm.convert"]
    places = {
        name: [sys.executable, "-m", "deltanet_conversion.cli"] if name == "deltanet" else [mlx / name]
        for name in programs
    }
    _, to_export, to_generate, to_serve, to_convert = ([*places[line[0]], *line[1:]] for line in lines)
    model = case("all_linear_rope")
    model.save_pretrained(tmp_path / "FOLDER")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "FOLDER")

    run(*to_export, cwd=tmp_path)
    done = run(*to_generate, "--max-tokens", 8, "--temp", 0, cwd=tmp_path)
    assert "warning" not in done.stderr.lower() and "[transformers]" not in done.stderr, done.stderr
    prompt = tokenizer(to_generate[to_generate.index("--prompt") + 1]).input_ids
    assert tokenizer.decode(greedy(model, prompt, 8)[0]) in done.stdout
    run(*to_convert, "--q-group-size", 32, cwd=tmp_path)
    run(*to_generate[:2], "FOLDER-4bit", *to_generate[3:], "--max-tokens", 8, cwd=tmp_path)

    port = _free_port()
    to_serve[to_serve.index("--port") + 1] = port
    prompts = ["w5. w7.", " ".join(f"w{i}." for i in range(3, 60)), "w5. w7. w9.", "w8."]
    server = subprocess.Popen(
        [str(word) for word in to_serve], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        _wait_for(server, f"http://127.0.0.1:{port}/health")
        with ThreadPoolExecutor(len(prompts)) as pool:
            texts = list(pool.map(lambda prompt: _complete(port, prompt), prompts))
    finally:
        server.terminate()
        server.wait()
    for text, prompt in zip(texts, prompts):
        new = greedy(model, tokenizer(prompt).input_ids, 16)[0]
        assert text.split() == tokenizer.decode(new).split()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _wait_for(server: subprocess.Popen, url: str, seconds: float = 60) -> None:
    """Until a server answers, which must not end before."""
    for _ in range(int(seconds * 5)):
        assert server.poll() is None, server.stderr.read().decode()
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(f"{url} did not answer within {seconds} s")


def _complete(port: int, prompt: str) -> str:
    """What the server's OpenAI interface adds to a prompt."""
    body = json.dumps({"prompt": prompt, "max_tokens": 16, "temperature": 0}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["choices"][0]["text"]
