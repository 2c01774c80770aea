"""Real flash-linear-attention models of random weights, converted, against ours on one GPU.

    python benchmarks/fla_parity.py
    python benchmarks/fla_parity.py --only pure-128 gate --out benchmarks/results/fla_parity.json

Each of fla's models is saved, converted by `convert_from_fla`, and loaded as ours. In fp32, on prompts of up to 64
tokens (where fla computes token by token, its only path in fp32): the largest logit difference, and whether greedy
continuations of 64 tokens are equal. In bf16, on 2048 tokens: how far fla and we are from our own fp32 run on the same
weights, which are rounded to bf16 first.

Needs fla 0.6.0 and a GPU. fla's softmax layers need flash-attn; where it is not installed, torch's attention stands in
for it, which computes the same (and in fp32, which flash-attn does not).
"""

import argparse
import datetime
import json
import platform
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from results_file import write
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import modeling_deltanet  # noqa: F401  makes `model_type: deltanet` known to the Auto classes
from deltanet_conversion import convert_from_fla
from deltanet_conversion.check_run import tune_nothing


LOGITS, RATIO = 1e-4, 1.2  # the bars
PROMPTS, NEW_TOKENS, LENGTH = (1, 7, 64), 64, 2048
VOCAB = 1024
SIZES = {"hidden_size": 512, "num_heads": 8, "num_hidden_layers": 2, "vocab_size": VOCAB, "intermediate_size": 1024}
FULL = {"layers": [1], "num_heads": 8}
SLIDING = FULL | {"num_kv_heads": 2, "window_size": 100}
CASES = {
    "pure-64": {},
    "pure-128": {"num_heads": 4},
    "gate": {"use_gate": True},
    "negative eigenvalues": {"allow_neg_eigval": True},
    "sum norm": {"qk_norm": "sum", "qk_activation": "elu"},
    "relu": {"qk_activation": "relu"},
    "hybrid full": {"attn": FULL},
    "hybrid sliding, grouped heads": {"attn": SLIDING},
    "hybrid list, bias": {
        "num_hidden_layers": 3,
        "attn": [FULL | {"qkv_bias": True}, FULL | {"qkv_bias": True, "layers": [2], "window_size": 100}],
    },
    "legacy MLP": {},
    "legacy norms": {},
    "tied": {"tie_word_embeddings": True},
    # Gated DeltaNet, by its own fields; 8 heads of 64 too, but for what the case is about.
    "gated": {"head_dim": 64, "expand_v": 1.0},
    "gated, no output gate": {"head_dim": 64, "expand_v": 1.0, "use_gate": False},
    "gated, negative eigenvalues": {"head_dim": 64, "expand_v": 1.0, "allow_neg_eigval": True},
    "gated, grouped values": {"head_dim": 64, "expand_v": 1.0, "num_heads": 4, "num_v_heads": 8},
    "gated, 128 and 256": {"head_dim": 128, "expand_v": 2.0, "num_heads": 3},
    "gated, 96 and 192": {"head_dim": 96, "expand_v": 2.0, "num_heads": 4, "allow_neg_eigval": True},
    "gated, hybrid sliding, tied": {"head_dim": 64, "expand_v": 1.0, "attn": SLIDING, "tie_word_embeddings": True},
}
console = Console(width=140)


def flash_attn_func(q, k, v, causal=True, window_size=(-1, -1)):
    """flash-attn's function on torch's attention: q `[B, T, H, D]`, k and v `[B, S, G, D]`, aligned at their ends."""
    T, S = q.shape[1], k.shape[1]
    distance = torch.arange(S - T, S, device=q.device)[:, None] - torch.arange(S, device=q.device)
    mask = distance >= 0
    if window_size[0] >= 0:
        mask &= distance <= window_size[0]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


def flash_attn_varlen_func(*args, **kwargs):
    raise NotImplementedError("this benchmark packs and pads nothing")


def import_fla():
    """fla's config and model classes by whether they are gated, its version, and what computes its softmax layers."""
    import fla
    from fla.layers import attn
    from fla.models import DeltaNetConfig, DeltaNetForCausalLM, GatedDeltaNetConfig, GatedDeltaNetForCausalLM

    tune_nothing()
    attention = "flash-attn"
    if attn.flash_attn_func is None:
        attn.flash_attn_func, attn.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
        attention = "torch's attention in flash-attn's place"
    classes = {False: (DeltaNetConfig, DeltaNetForCausalLM), True: (GatedDeltaNetConfig, GatedDeltaNetForCausalLM)}
    return classes, fla.__version__, attention


@torch.no_grad()
def draw(model, seed: int) -> None:
    """Weights so large that every part shows in the logits, which are of size 1; all of them bf16 numbers."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.uniform_(0.7, 1.3)
        elif name.endswith(("A_log", "dt_bias")):
            parameter.uniform_(-3.0, 0.0)
        elif "conv1d" in name or "b_proj" in name or name.endswith("bias"):
            parameter.normal_(std=0.5)
        elif "embeddings" in name:
            parameter.normal_(std=parameter.shape[-1] ** -0.5 if model.config.tie_word_embeddings else 1.0)
        else:
            parameter.normal_(std=1.2 * parameter.shape[-1] ** -0.5)
        parameter.copy_(parameter.bfloat16().float())


def make_legacy(folder: Path, case: str) -> None:
    """Bring a saved checkpoint into one of fla's old forms."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if case == "legacy MLP":
        for name in [name for name in tensors if ".gate_proj." in name]:
            tensors[name] = torch.cat((tensors[name], tensors.pop(name.replace("gate_proj", "up_proj"))))
    else:
        tensors = {
            name.replace(".attn_norm.", ".attn.norm.").replace(".mlp_norm.", ".mlp.norm."): tensor
            for name, tensor in tensors.items()
        }
        config = folder / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"norm_first": True}))
    save_file(tensors, file)


def random_tokens(*shape: int, seed: int) -> torch.Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed)).cuda()


def greedy(model, ids: torch.Tensor) -> torch.Tensor:
    """The likeliest token, 64 times, each step from the cache."""
    outputs = model(ids, use_cache=True)
    tokens = []
    for _ in range(NEW_TOKENS):
        tokens.append(outputs.logits[:, -1:].argmax(-1))
        outputs = model(tokens[-1], past_key_values=outputs.past_key_values, use_cache=True)
    return torch.cat(tokens, dim=1)


def distance(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """Root mean square of the difference over that of the reference."""
    return ((logits.float() - reference).square().mean() / reference.square().mean()).sqrt().item()


@torch.no_grad()
def compare(case: str, classes: dict, folder: Path) -> dict:
    """One case: convert, compare in fp32, compare in bf16."""
    fla_config, fla_model = classes[case.startswith("gated")]
    theirs = fla_model(fla_config(**SIZES | CASES[case]))
    draw(theirs, seed=len(case))
    theirs.save_pretrained(folder / "fla")
    if case.startswith("legacy"):
        make_legacy(folder / "fla", case)
    convert_from_fla(folder / "fla", folder / "ours")
    ours = AutoModelForCausalLM.from_pretrained(folder / "ours", dtype=torch.float32).cuda().eval()
    theirs = theirs.cuda().eval()

    result: dict = {"case": case, "logit_std": None, "fp32_max_difference": 0.0, "greedy_equal": True}
    for length in PROMPTS:
        ids = random_tokens(2, length, seed=length)
        wanted = theirs(ids, use_cache=False).logits
        result["fp32_max_difference"] = max(
            result["fp32_max_difference"], (ours(ids, use_cache=False).logits - wanted).abs().max().item()
        )
        result["greedy_equal"] &= torch.equal(greedy(ours, ids), greedy(theirs, ids))
        result["logit_std"] = wanted.std().item()

    ids = random_tokens(1, LENGTH, seed=0)
    reference = ours(ids, use_cache=False).logits
    result["bf16_ours"] = distance(ours.bfloat16()(ids, use_cache=False).logits, reference)
    result["bf16_fla"] = distance(theirs.bfloat16()(ids, use_cache=False).logits, reference)
    result["bf16_ratio"] = result["bf16_ours"] / result["bf16_fla"]
    result["met"] = (
        result["fp32_max_difference"] <= LOGITS and result["greedy_equal"] and result["bf16_ratio"] <= RATIO
    )
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="default all")
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this comparison needs a CUDA device")
    try:
        classes, version, attention = import_fla()
    except ImportError as error:
        parser.error(f"this comparison needs fla 0.6.0: {error}")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    results = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "fla": version,
        "fla_softmax_layers": attention,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "command": "python " + " ".join(sys.argv),
        "bars": {"fp32_max_difference": LOGITS, "bf16_ratio": RATIO},
        "cases": [],
    }
    for case in args.only:
        with tempfile.TemporaryDirectory() as folder:
            results["cases"].append(compare(case, classes, Path(folder)))
        console.print({k: f"{v:.3g}" if isinstance(v, float) else v for k, v in results["cases"][-1].items()})
        if args.out:
            write(args.out, results)
    table = Table(*results["cases"][0], title=f"fla {version} and ours, {results['gpu']}")
    for row in results["cases"]:
        table.add_row(*(f"{x:.3g}" if isinstance(x, float) else str(x) for x in row.values()))
    console.print(table)
    if not all(row["met"] for row in results["cases"]):
        sys.exit("not all bars are met")


if __name__ == "__main__":
    main()
