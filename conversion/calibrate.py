"""A start for new mixers that is computed, not trained: the output projections, by least squares on some text.

What a linear layer reads out of its memory is other than what softmax attention gives, but much of that can be told
from it linearly. The projection after the heads is the one part of a mixer whose best values have a closed form: for
each layer, on the teacher's own inputs, the ridge regression of the attention's output on the heads' outputs.

A layer's error counts in proportion to the residual stream it is added to, which the next norm divides by. Otherwise
the few tokens that a transformer gives huge activations would decide alone.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from modeling_deltanet import DeltaNetConfig
from modeling_deltanet.cache_deltanet import new_file
from modeling_deltanet.linear_attention_deltanet import DeltaNetLinearAttention

from .checkpoint import Checkpoint, Output, load_tokenizer
from .files import public_name, read_json


# Read twice, since what a linear memory loses is what copies from afar, and text as it comes hardly asks for that: of
# SmolLM2-135M's layers 16 to 20, which are worth 0.2 to 0.9 nats at a second reading, a first one keeps two
# (`benchmarks/quality/layer_worth.py`).
MEASURE = "KL to the teacher, nats per token, when this layer alone is linear, on text that is read twice in a row"
# How much projections are drawn to zero, times the mean square of what they read. SmolLM2-135M, a quarter evenly kept,
# fitted to 4096 tokens: KL to the teacher on other text 2.59; drawn to where they start 2.68, and there with a tenth
# and ten times as much 2.86 and 3.31.
RIDGE = 1e-2


class Mixer(nn.Module):
    """A linear mixer in the place of a teacher's attention."""

    def __init__(self, mixer: DeltaNetLinearAttention):
        super().__init__()
        self.mixer = mixer

    def forward(self, hidden_states, position_embeddings=None, **kwargs):
        return self.mixer(hidden_states, position_embeddings=position_embeddings), None


def start_of(checkpoint: Checkpoint, config: DeltaNetConfig, outputs: list[Output], layer: int):
    """The mixer that a conversion without calibration starts with."""
    with torch.device("meta"):
        mixer = DeltaNetLinearAttention(config, layer)
    prefix = f"model.layers.{layer}.linear_attn."
    state = {
        output.name.removeprefix(prefix): output.make(*map(checkpoint.read, output.sources)).float()
        for output in outputs
        if output.name.startswith(prefix)
    }
    mixer.load_state_dict(state, assign=True)
    return mixer.eval().requires_grad_(False)


@torch.no_grad()
def calibrate(teacher: PreTrainedModel, mixers: dict[int, DeltaNetLinearAttention], ids: torch.Tensor) -> dict:
    """Set the output projections of `mixers` (layer -> mixer) from the teacher's attention on `ids` `[B, T]`.

    Returns, by layer, the share of the attention's output (its square, in proportion to the residual stream) that the
    mixer still misses on this text.
    """
    missed, hooks, residual, features = {}, [], {}, {}

    def fit(i: int) -> Callable:
        def hook(module, args, kwargs, output):
            mixer = mixers[i]
            mixer(kwargs["hidden_states"], position_embeddings=kwargs["position_embeddings"])
            wanted = output[0]
            size = (residual[i] + wanted).float().square().mean(-1, keepdim=True).sqrt()
            x, y = ((a.float() / size).flatten(0, 1) for a in (features.pop(i), wanted))
            weight = mixer.o_proj.weight
            weight.copy_(_ridge(x, y))
            missed[i] = ((x @ weight.float().T - y).square().sum() / y.square().sum()).item()

        return hook

    def remember(store: dict, i: int) -> Callable:
        def hook(module, args, kwargs):
            store[i] = args[0] if args else kwargs["hidden_states"]

        return hook

    for i, mixer in mixers.items():
        layer = teacher.model.layers[i]
        hooks += [
            layer.register_forward_pre_hook(remember(residual, i), with_kwargs=True),
            layer.self_attn.register_forward_hook(fit(i), with_kwargs=True),
            mixer.o_proj.register_forward_pre_hook(remember(features, i), with_kwargs=True),
        ]
    try:
        teacher.model(ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return missed


def _ridge(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The small `W` with `x W^T` nearest to `y`, `[D_out, D_in]`."""
    x, y = x.double(), y.double()
    square = x.T @ x
    square.diagonal().add_(RIDGE * square.diagonal().mean())
    return torch.linalg.solve(square, x.T @ y).T


@dataclass(frozen=True)
class Calibration:
    """Text to compute the start of new mixers from, and to measure layers by.

    Args:
        data: see `load_text`; `text_column` as there.
        tokens: how many tokens mixers are fitted to. Layers are measured on a quarter as many, of other text.
        length: tokens per block.
        work: where measured layers are kept until all are, so that the same call goes on with them.
    """

    data: tuple[str, ...]
    tokens: int = 8192
    text_column: str = "text"
    length: int = 512
    work: Path | None = None


@dataclass(frozen=True)
class Start:
    """What a calibration found: which layers keep softmax attention, the others' output projections, and the facts
    that `conversion.json` tells.
    """

    keep: list[int]
    o_proj: dict[int, torch.Tensor]
    facts: dict


@torch.no_grad()
def calibrated_start(
    checkpoint: Checkpoint,
    config: DeltaNetConfig,
    outputs: list[Output],
    calibration: Calibration,
    keep: list[int] | int,
) -> Start:
    """Fit the mixers that `outputs` start, of a `config` without a softmax layer, and choose layers.

    Args:
        keep: the layers that keep softmax attention, or how many of those that are measured to be worth most.

    Raises:
        ValueError: no tokenizer, text that is not there or too short, or a file of another measurement in the way.
    """
    try:
        from .text import blocks, load_text
    except ImportError as error:
        raise ValueError(f"calibration text needs the package `datasets`, which is not installed: {error}") from error
    tokenizer = load_tokenizer(checkpoint.folder)
    documents = load_text(list(calibration.data), calibration.text_column, tokenizer=tokenizer)
    rows = torch.tensor(blocks(documents, tokenizer, calibration.length)["input_ids"][:])
    wanted = -(-calibration.tokens // calibration.length)
    measured = -(-wanted // 4) if isinstance(keep, int) else 0
    if len(rows) < wanted + measured:
        raise ValueError(
            f"{', '.join(calibration.data)} gives {rows.numel():,} tokens in blocks of {calibration.length}; wanted "
            f"{(wanted + measured) * calibration.length:,}: give more text, or ask for fewer tokens"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32).to(device).eval()
    layers = (
        range(config.num_hidden_layers) if isinstance(keep, int) else set(range(config.num_hidden_layers)) - {*keep}
    )
    mixers = {i: start_of(checkpoint, config, outputs, i).to(device) for i in layers}
    rows = rows.to(device)
    missed = calibrate(teacher, mixers, rows[:wanted])
    facts = {"data": [public_name(source) for source in calibration.data], "tokens": wanted * calibration.length}
    more = {}
    if isinstance(keep, int):
        text = hashlib.sha256(rows.cpu().numpy().tobytes()).hexdigest()
        settings = facts | {"text": text, "teacher": checkpoint.config, "student": config.to_diff_dict()}
        texts = rows[wanted : wanted + measured]
        # Each text is read twice: half as many, or where positions do not go so far, half of each.
        fits = 2 * calibration.length <= config.max_position_embeddings
        texts = texts[: -(-measured // 2)] if fits else texts[:, : calibration.length // 2]
        scores = score_layers(teacher, mixers, texts, calibration.work, settings)
        keep = sorted(sorted(scores, key=scores.get, reverse=True)[:keep])
        more["layer_scores"] = {
            "measure": MEASURE,
            "tokens": 2 * texts.numel(),
            "scores": [round(scores[i], 5) for i in sorted(scores)],
        }
    facts["missed"] = [round(missed[i], 4) for i in sorted(missed) if i not in keep]
    o_proj = {i: mixers[i].o_proj.weight.cpu() for i in mixers if i not in keep}
    return Start(keep, o_proj, {"calibration": facts} | more)


@torch.no_grad()
def cost_of_layer(
    teacher: PreTrainedModel, i: int, mixer: nn.Module, ids: torch.Tensor, wanted: torch.Tensor
) -> torch.Tensor:
    """KL to `wanted`, the whole teacher's log-probabilities on `ids` `[1, T]`, with `mixer` in the place of layer i's
    attention: nats of each token, `[T]`.
    """
    layer = teacher.model.layers[i]
    attention, layer.self_attn = layer.self_attn, Mixer(mixer)
    try:
        got = teacher(ids, use_cache=False).logits[0].log_softmax(-1)
    finally:
        layer.self_attn = attention
    return F.kl_div(got, wanted, reduction="none", log_target=True).sum(-1)


@torch.no_grad()
def score_layers(
    teacher: PreTrainedModel,
    mixers: dict[int, DeltaNetLinearAttention],
    rows: torch.Tensor,
    work: Path | None = None,
    settings: dict | None = None,
) -> dict[int, float]:
    """What each layer's softmax attention is worth, in nats per token on `rows` `[B, T]`, each read twice (`MEASURE`).

    What was measured is written into the file `work` after each layer, and an interrupted call that is repeated with
    the same `settings` goes on from there.
    """
    settings = json.loads(json.dumps((settings or {}) | {"measure": MEASURE, "rows": len(rows)}))
    done: list[list[float]] = [[]]
    if work is not None and work.exists():
        content = read_json(work)
        if content.get("settings") != settings:
            raise ValueError(f"{work} holds another measurement: remove it, or name another output")
        done = content["done"]
    total = len(rows) * len(mixers)
    with tqdm(total=total, initial=sum(map(len, done)), desc="layers measured", disable=None) as bar:
        for r in range(len(done) - 1, len(rows)):
            ids = rows[r : r + 1].repeat(1, 2)
            wanted = teacher(ids, use_cache=False).logits[0].log_softmax(-1)
            for i in list(mixers)[len(done[r]) :]:
                done[r].append(cost_of_layer(teacher, i, mixers[i], ids, wanted).mean().item())
                bar.update()
                if len(done[r]) == len(mixers) and r + 1 < len(rows):
                    done.append([])
                if work is not None:
                    work.parent.mkdir(parents=True, exist_ok=True)
                    with new_file(work) as unfinished:
                        Path(unfinished).write_text(json.dumps({"settings": settings, "done": done}))
    return {i: sum(column) / len(rows) for i, column in zip(mixers, zip(*done))}
