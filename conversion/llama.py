"""From a Llama-like transformer to a hybrid DeltaNet: which layers keep softmax attention, and how the others start.

Embeddings, norms, MLPs, head and the kept layers are copied to the bit. A converted layer starts from the teacher's q,
k, v and o projections as the linear attention nearest to it that needs no data:

- Grouped key and value heads are cloned, one for each query head: the delta rule addresses a memory by one query and
  one key head, and clones may part in training.
- Convolutions begin as the identity, the step size beta as 1/2 (its projection as zero).
- q and k keep the teacher's rotary embedding and biases. The teacher's q/k norms (Qwen3) become part of the
  projections: our L2 norm divides by a head's length as they do, and only their weights are left.
- v goes through SiLU, which is linear near zero: v's convolution begins as a small multiple of the identity. The
  output norm, which makes a head's output as large as 1 again, undoes this; o is scaled by how large the teacher's
  values are.
- A decay, if asked for, begins open: the new layer is the one without decay.
"""

import logging
import math
from pathlib import Path

import torch
from transformers import AutoConfig

from modeling_deltanet import DeltaNetConfig

from .calibrate import Calibration, calibrated_start
from .checkpoint import Checkpoint, Output, convert, expected_tensors, reads_config, unread_head


logger = logging.getLogger(__name__)

TEACHERS = ("llama", "mistral", "qwen2", "qwen3")
CONV_SIZE = 4
# SiLU(x) = x / 2 (1 + x / 2 + ...): at a tenth, values of size 1 are off the linear by 5 %.
VALUE_TAP = 0.1
# With A = exp(A_log) = 1 and a_proj = 0, each token leaves exp(-softplus(dt_bias)) of the memory: 1 - 1.5e-8, which is
# 1 in fp32; 32,768 tokens leave 0.9995. Logits are within 3e-6 of those without decay (at -16: 2e-5).
OPEN_DT_BIAS = -18.0


def choose_layers(keep: str, num_hidden_layers: int) -> list[int]:
    """The layers that keep softmax attention, by `keep`: `"all"`, `"none"`, a ratio such as `"0.25"` or `"25%"`, or a
    list such as `"3,7"`, counted from 0.

    A ratio is spread evenly, each kept layer the last of its group: a quarter of 8 is 3 and 7. Between two numbers of
    layers it is the lesser: a quarter of 30 is 7. Which layers keep softmax matters more than anything else in a
    conversion: `"auto:25%"`, which only a conversion takes, measures it.
    """
    words = keep.strip().lower()
    if words in ("all", "none"):
        return list(range(num_hidden_layers)) if words == "all" else []
    try:
        if words.endswith("%") or "." in words:
            ratio = float(words[:-1]) / 100 if words.endswith("%") else float(words)
            if not 0 <= ratio <= 1:
                raise ValueError
            count = math.ceil(ratio * num_hidden_layers - 0.5)
            return [(i + 1) * num_hidden_layers // count - 1 for i in range(count)]
        layers = sorted({int(word) for word in words.split(",")})
    except ValueError:
        raise ValueError(
            f"keep must be 'all', 'none', a ratio from 0 to 1 ('0.25' or '25%') or layers ('3,7'), got {keep!r}"
        ) from None
    if layers[0] < 0 or layers[-1] >= num_hidden_layers:
        raise ValueError(f"keep must name layers from 0 to {num_hidden_layers - 1}, got {keep!r}")
    return layers


def is_auto(keep: str) -> tuple[bool, str]:
    """Whether layers are to be measured (`"auto:25%"`), and what is left of `keep`.

    Raises:
        ValueError: `"auto"` without a ratio.
    """
    word, _, ratio = keep.strip().lower().partition(":")
    if word != "auto":
        return False, keep
    if not (ratio.endswith("%") or "." in ratio):
        raise ValueError(f"keep must say how many layers are to be chosen, such as 'auto:25%', got {keep!r}")
    return True, ratio


def convert_from_llama(
    source: str | Path,
    target: str | Path,
    keep: str = "0.25",
    linear_use_rope: bool = True,
    dtype: torch.dtype | None = None,
    max_shard_size: int | None = None,
    linear_use_decay: bool = False,
    teacher_name: str | None = None,
    calibration: Calibration | None = None,
) -> DeltaNetConfig:
    """Convert a folder with a Llama, Mistral, Qwen2 or Qwen3 (SmolLM and others are Llamas) into a hybrid DeltaNet.

    Args:
        keep: which layers keep softmax attention, see `choose_layers`.
        linear_use_rope: whether converted layers go on rotating their queries and keys.
        dtype: the dtype to write, the source's by default.
        max_shard_size: bytes of a file of weights, those of the source's largest by default.
        linear_use_decay: whether converted layers let their memory decay (Gated DeltaNet). The decay starts open, and
            its gradient is in proportion to log alpha, which is 1.5e-8: Adam needs an epsilon far below its default of
            1e-8, which the stages `align` and `distill` see to.
        teacher_name: what `conversion.json` calls the teacher, by default the folder's name.
        calibration: text that the start of the converted layers is computed from, and that `keep="auto:..."` needs;
            the teacher is then held in memory, in fp32, on a GPU where there is one.

    Returns the new configuration.

    Raises:
        ValueError: the source is damaged, incomplete, or has parts that our model does not; nothing is written.
        OSError: the disk is full; nothing is left.
    """
    checkpoint = Checkpoint(source)
    is_measured, ratio = is_auto(keep)
    if is_measured and calibration is None:
        raise ValueError(f"keep {keep!r} measures layers on text: calibration (--calibrate) must say which")
    config = config_from_llama(checkpoint.config, ratio, linear_use_rope, linear_use_decay)
    start = None
    if calibration is not None:
        kept = choose_layers(ratio, config.num_hidden_layers)
        none_kept = config_from_llama(checkpoint.config, "none", linear_use_rope, linear_use_decay)
        names = [f"model.layers.{i}" for i in range(config.num_hidden_layers)]
        outputs = [output for name in names for output in _start_of_mixer(none_kept, name, _has_qk_norm(checkpoint))]
        start = calibrated_start(checkpoint, none_kept, outputs, calibration, len(kept) if is_measured else kept)
        keep = ",".join(map(str, start.keep)) or "none"
        config = config_from_llama(checkpoint.config, keep, linear_use_rope, linear_use_decay)
    expected = expected_tensors(config)
    outputs = []
    for name in expected:
        if ".linear_attn." not in name:
            outputs.append(Output(name, (name,)))
        elif name.endswith(".q_proj.weight"):
            layer = name.removesuffix(".linear_attn.q_proj.weight")
            o_proj = None if start is None else start.o_proj[int(layer.split(".")[-1])]
            outputs += _start_of_mixer(config, layer, _has_qk_norm(checkpoint), o_proj)
    old = tuple(name for name in checkpoint.tensors if name.endswith(".rotary_emb.inv_freq"))  # computed, not learned
    facts = (
        {
            "teacher": teacher_name or Path(source).name,
            "kept_layers": [i for i, name in enumerate(config.layer_types) if name != "linear_attention"],
            "linear_use_rope": config.linear_use_rope,
        }
        | ({"linear_use_decay": True} if config.linear_use_decay else {})
        | ({} if start is None else start.facts)
    )
    unread = unread_head(config) + old
    convert(checkpoint, outputs, expected, config, target, dtype, max_shard_size, unread, facts)
    return config


def config_from_llama(
    theirs: dict, keep: str = "0.25", linear_use_rope: bool = True, linear_use_decay: bool = False
) -> DeltaNetConfig:
    """The configuration of the hybrid for a teacher's `config.json`; arguments and errors as in
    `convert_from_llama`.
    """
    model_type = theirs.get("model_type")
    if model_type not in TEACHERS:
        raise ValueError(f"model_type must be one of {', '.join(TEACHERS)}, got {model_type!r}")
    teacher = _teacher_config(model_type, theirs)
    heads, hidden_size = teacher.num_attention_heads, teacher.hidden_size
    head_dim = getattr(teacher, "head_dim", None) or hidden_size // heads
    qkv_bias = model_type == "qwen2" or getattr(teacher, "attention_bias", False)
    out_bias = model_type != "qwen2" and getattr(teacher, "attention_bias", False)
    if getattr(teacher, "mlp_bias", False):
        raise ValueError("the teacher has mlp_bias: True; our MLP has no biases")

    teacher_types = getattr(teacher, "layer_types", None)
    if teacher_types is None:
        slides = getattr(teacher, "sliding_window", None) is not None
        teacher_types = ["sliding_attention" if slides else "full_attention"] * teacher.num_hidden_layers
    if len(teacher_types) != teacher.num_hidden_layers:
        raise ValueError(
            f"config.json has layer_types of {len(teacher_types)} layers, but num_hidden_layers "
            f"{teacher.num_hidden_layers}"
        )
    kept = choose_layers(keep, teacher.num_hidden_layers)
    layer_types = [t if i in kept else "linear_attention" for i, t in enumerate(teacher_types)]
    if out_bias and "linear_attention" in layer_types:
        raise ValueError(
            "the teacher's o_proj has a bias (attention_bias: True), which our linear layers cannot take over"
        )
    with reads_config():
        return DeltaNetConfig(
            architectures=["DeltaNetForCausalLM"],
            vocab_size=teacher.vocab_size,
            hidden_size=hidden_size,
            intermediate_size=teacher.intermediate_size,
            num_hidden_layers=teacher.num_hidden_layers,
            layer_types=layer_types,
            linear_num_key_heads=heads,
            linear_num_value_heads=heads,
            linear_key_head_dim=head_dim,
            linear_value_head_dim=head_dim,
            linear_conv_kernel_dim=CONV_SIZE,
            linear_qk_activation="identity",
            linear_attention_bias=qkv_bias,
            linear_use_rope=linear_use_rope and "linear_attention" in layer_types,
            linear_use_decay=linear_use_decay and "linear_attention" in layer_types,
            num_attention_heads=heads,
            num_key_value_heads=teacher.num_key_value_heads or heads,
            head_dim=head_dim,
            sliding_window=teacher.sliding_window if "sliding_attention" in layer_types else None,
            rope_parameters=teacher.rope_parameters,
            use_qk_norm=model_type == "qwen3",
            attention_bias=qkv_bias,
            attention_out_bias=out_bias,
            attention_dropout=teacher.attention_dropout,
            max_position_embeddings=teacher.max_position_embeddings,
            hidden_act=teacher.hidden_act,
            rms_norm_eps=teacher.rms_norm_eps,
            initializer_range=teacher.initializer_range,
            use_cache=teacher.use_cache,
            tie_word_embeddings=teacher.tie_word_embeddings,
            pad_token_id=teacher.pad_token_id,
            bos_token_id=teacher.bos_token_id,
            eos_token_id=teacher.eos_token_id,
        )


def _teacher_config(model_type: str, theirs: dict):
    """Transformers' configuration of the teacher, with the fields that are computed with in order."""
    try:
        teacher = AutoConfig.for_model(**theirs)
    except Exception as error:  # noqa: BLE001 (a wrong type is found wherever Transformers first computes with it)
        raise ValueError(f"config.json is not that of a {model_type}: {error}") from error
    for name in ("hidden_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "head_dim"):
        value = getattr(teacher, name, None)
        optional = value is None and name in ("num_key_value_heads", "head_dim")
        if not optional and (type(value) is not int or not 0 < value < 2**31):
            raise ValueError(f"config.json has {name}: {value!r}; wanted a number of at least 1")
    return teacher


def _has_qk_norm(checkpoint: Checkpoint) -> bool:
    return "model.layers.0.self_attn.q_norm.weight" in checkpoint.tensors


def _start_of_mixer(
    config: DeltaNetConfig, layer: str, qk_norm: bool, o_proj: torch.Tensor | None = None
) -> list[Output]:
    """How the new mixer of a layer (`model.layers.3`) is made from the teacher's attention; `o_proj` if that was
    computed.
    """
    heads, head_dim = config.num_attention_heads, config.head_dim
    clones = heads // config.num_key_value_heads
    dim = heads * head_dim

    def per_query_head(x):
        """Clone the key or value heads along the first dimension."""
        return x.unflatten(0, (-1, head_dim)).repeat_interleave(clones, dim=0).flatten(0, 1)

    def scaled(x, norm):
        """The q/k norm's weight, one for every head, on a projection's weight or bias."""
        scale = norm.float().repeat(x.shape[0] // head_dim)
        return (x.float() * (scale.unsqueeze(1) if x.ndim == 2 else scale)).to(x.dtype)

    def scaled_o(o, v, input_norm, *v_bias):
        """o_proj times each head's root mean square of the values, for inputs of size 1 in every channel."""
        if o_proj is not None:
            return o_proj.to(o.dtype)
        square = (v.float() * input_norm.float()).square().sum(1)
        square = square + sum(bias.float().square() for bias in v_bias)
        size = square.unflatten(0, (-1, head_dim)).mean(1).sqrt()
        return (o.float() * size.repeat_interleave(clones * head_dim)).to(o.dtype)

    def identity(tap):
        def make(projection):
            weight = projection.new_zeros(dim, 1, CONV_SIZE)
            weight[..., -1] = tap
            return weight

        return make

    old, new = f"{layer}.self_attn", f"{layer}.linear_attn"
    outputs = []
    for kind in ("weight", "bias") if config.linear_attention_bias else ("weight",):
        for name in "qkv":
            sources = [f"{old}.{name}_proj.{kind}"]
            if qk_norm and name != "v":
                sources.append(f"{old}.{name}_norm.weight")

            def make(x, *norm, grouped=name != "q"):
                x = scaled(x, *norm) if norm else x
                return per_query_head(x) if grouped else x

            outputs.append(Output(f"{new}.{name}_proj.{kind}", tuple(sources), make))
    q, v = f"{old}.q_proj.weight", f"{old}.v_proj.weight"
    v_bias = (f"{old}.v_proj.bias",) * config.linear_attention_bias
    if config.linear_use_decay:
        outputs += [
            Output(f"{new}.a_proj.weight", (q,), lambda q: q.new_zeros(heads, q.shape[1])),
            Output(f"{new}.A_log", (q,), lambda q: torch.zeros(heads, device=q.device)),
            Output(f"{new}.dt_bias", (q,), lambda q: torch.full((heads,), OPEN_DT_BIAS, device=q.device)),
        ]
    return [
        *outputs,
        Output(f"{new}.b_proj.weight", (q,), lambda q: q.new_zeros(heads, q.shape[1])),
        Output(f"{new}.q_conv1d.weight", (q,), identity(1.0)),
        Output(f"{new}.k_conv1d.weight", (q,), identity(1.0)),
        Output(f"{new}.v_conv1d.weight", (q,), identity(VALUE_TAP)),
        Output(f"{new}.o_norm.weight", (q,), lambda q: q.new_ones(head_dim)),
        Output(
            f"{new}.o_proj.weight", (f"{old}.o_proj.weight", v, f"{layer}.input_layernorm.weight", *v_bias), scaled_o
        ),
    ]
