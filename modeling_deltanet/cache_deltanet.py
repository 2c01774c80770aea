"""What Transformers' cache lacks for DeltaNet's linear layers.

A linear layer's memory is one state of fixed size and the last inputs of its short convolution. Transformers keeps
both in a `LinearAttentionLayer`, which (in 5.23) can neither be repeated nor selected along the batch, and does not
count tokens: a cache whose layers are all linear raises in `get_seq_length()`, hence in `generate`. `prepare_cache`
puts the layers below in their place, in whatever cache comes: one that `generate` or the user made, dynamic or static.

`snapshot_cache` and `restore_cache` go back to an earlier point of a text; `save_cache` and `load_cache` keep in a
file what a model has read.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, LinearAttentionLayer, StaticCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import is_torchdynamo_compiling


CACHE_FORMAT = "deltanet-cache-1"

# What `generate`, masks and outputs of this Transformers call a cache: `past_key_values` in 5.23, `cache` from 5.24
# on.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


# PEFT makes a cache of its own for it, and cannot be told to make another.
NO_PREFIX_TUNING = "prefix tuning is not for linear-attention layers, which keep no keys: use prompt tuning or LoRA"


def one_cache(past_key_values: Cache | None, cache: Cache | None, others: dict) -> Cache | None:
    """The cache among the arguments of a call, which both of its names may carry; `others` are the unknown keywords.

    Raises:
        ValueError: two caches, or one by any other name: the model would forget what came before.
    """
    for name, value in others.items():
        if isinstance(value, Cache):
            raise ValueError(f"a cache is passed as past_key_values or cache, got a {type(value).__name__} as {name}")
    if past_key_values is None:
        return cache
    if cache is not None and cache is not past_key_values:
        raise ValueError(
            "past_key_values and cache are two names of one argument, got two different caches: "
            f"a {type(past_key_values).__name__} and a {type(cache).__name__} ({NO_PREFIX_TUNING})"
        )
    return past_key_values


class DeltaNetCacheLayer(LinearAttentionLayer):
    """A linear layer's convolution inputs `[B, D, W - 1]` and its recurrent state `[B, HV, K, V]` in fp32."""

    # Iterating a cache reads these of every layer: a linear layer has none.
    keys = values = None

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, state_idx: int = 0, new_tokens: int = 0, **kwargs
    ) -> torch.Tensor:
        """Store the state after `new_tokens` more tokens. Unlike Transformers' layer, needs no convolution state."""
        self.has_previous_state[state_idx] = True
        if self.device is None:
            self.dtype, self.device = recurrent_states.dtype, recurrent_states.device
        # A decode step has moved the state on in place. Copied onto itself it would not change, but a compiled step
        # would then work on a copy, and write that back: four times the traffic of the largest tensor in decoding.
        old = self.recurrent_states[state_idx]
        if old is not None and not can_overwrite(old, recurrent_states):
            self.recurrent_states[state_idx] = recurrent_states
        elif recurrent_states is not old:
            super().update_recurrent_state(recurrent_states, state_idx, **kwargs)
        self.count(new_tokens)
        return self.recurrent_states[state_idx]

    def update_conv_state(self, conv_states: torch.Tensor, state_idx: int = 0, **kwargs) -> torch.Tensor:
        """Store the last W - 1 inputs of the convolution, those of before included."""
        old = self.conv_states[state_idx]
        if old is None or can_overwrite(old, conv_states):
            return super().update_conv_state(conv_states, state_idx, **kwargs)
        self.has_previous_state[state_idx] = True
        self.conv_states[state_idx] = conv_states
        return conv_states

    def count(self, new_tokens: int) -> None:
        """Softmax layers count the tokens that a cache has seen, where there are any."""

    def activate_past_recording(self) -> None:
        """Refused: an assistant model has its cache rolled back, and a recurrent state cannot be."""
        raise ValueError("a DeltaNet cannot be an assistant model: its recurrent state cannot be rolled back")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times along the batch."""
        self._map_states(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the sequences `indices` of the batch."""
        self._map_states(lambda state: state[indices.to(state.device)])

    def reset(self) -> None:
        """Forget what was read."""
        _leave_inference_mode(self)
        self._map_states(lambda state: state if can_overwrite(state) else torch.zeros_like(state))
        super().reset()

    def _map_states(self, change) -> None:
        for states in (self.conv_states, self.recurrent_states):
            for i, state in states.items():
                if state is not None:
                    states[i] = change(state)


class CountingDeltaNetCacheLayer(DeltaNetCacheLayer, CacheLayerMixin):
    """The first layer of a cache without softmax layers, which has to say how many tokens it has seen."""

    is_croppable = LinearAttentionLayer.is_croppable
    supports_early_init = False

    def __init__(self, count_on_device: bool):
        super().__init__()
        # A tensor where the step is compiled: a Python int would be a constant of the graph, compiled again per step.
        self.cumulative_length = torch.zeros((), dtype=torch.long) if count_on_device else 0

    @property
    def is_compileable(self) -> bool:
        """Whether the step may be compiled. A dynamic cache's could be, too, but then `generate` hands a dict of masks
        to whoever stands before the model, and PEFT's prompt tuning puts its own tokens in front of one mask."""
        return isinstance(self.cumulative_length, torch.Tensor)

    def lazy_initialization(self, recurrent_states: torch.Tensor | None = None, **kwargs) -> None:
        super().lazy_initialization(recurrent_states=recurrent_states, **kwargs)
        if recurrent_states is not None and isinstance(self.cumulative_length, torch.Tensor):
            self.cumulative_length = self.cumulative_length.to(recurrent_states.device)
            if not is_torchdynamo_compiling():
                # As Transformers' layers do: a step that writes to any other address is not captured in a CUDA graph.
                torch._dynamo.mark_static_address(self.cumulative_length)

    def count(self, new_tokens: int) -> None:
        if isinstance(self.cumulative_length, torch.Tensor):
            self.cumulative_length.add_(new_tokens)
        else:
            self.cumulative_length += new_tokens

    def get_seq_length(self) -> int:
        """Tokens seen so far, padding included."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what a query could see, as in a softmax layer that has kept everything."""
        return self.cumulative_length + query_length, 0

    def update(self, key_states, value_states, *args, **kwargs):
        raise ValueError("a linear-attention layer stores no keys and values: use update_recurrent_state")

    def reset(self) -> None:
        super().reset()
        self.count(-self.cumulative_length)  # in place for a tensor, whose address a compiled step knows


def can_overwrite(state: torch.Tensor, by: torch.Tensor | None = None) -> bool:
    """Whether a state may be written in place: not where a backward may yet read it, or shall go through it."""
    return not state.requires_grad and (by is None or not by.requires_grad)


def _leave_inference_mode(layer) -> None:
    """Replace what was made under `torch.inference_mode` by copies, once that is over: torch lets nobody write it
    then.
    """
    if is_torchdynamo_compiling() or torch.is_inference_mode_enabled():
        return
    for attributes in (vars(layer), *(x for x in vars(layer).values() if isinstance(x, dict))):
        for name, x in attributes.items():
            if isinstance(x, torch.Tensor) and x.is_inference():
                attributes[name] = x.clone()


def prepare_cache(cache: Cache, config) -> Cache:
    """Make `cache` fit a DeltaNet of this `config`, in place; a cache that already fits is left as it is.

    Raises:
        ValueError: a cache of another architecture.
    """
    if not cache.layers and cache.layer_class_to_replicate is not None:  # DynamicCache() without a config
        cache.layers, cache.layer_class_to_replicate = DynamicCache(config=config).layers, None
    expected = [layer_type == "linear_attention" for layer_type in config.layer_types]
    if expected != (came := [isinstance(layer, LinearAttentionLayer) for layer in cache.layers]):
        message = (
            f"the cache has layers {cache.layers}, which do not fit layer_types {config.layer_types}; "
            "make it with DynamicCache(config=model.config)"
        )
        if not any(came):
            message += f"; {NO_PREFIX_TUNING}"
        raise ValueError(message)
    for i, layer in enumerate(cache.layers):
        if type(layer) is LinearAttentionLayer:
            if i == 0 and all(expected):
                cache.layers[i] = CountingDeltaNetCacheLayer(count_on_device=isinstance(cache, StaticCache))
            else:
                cache.layers[i] = DeltaNetCacheLayer()
            if layer.record_past:  # `generate` asks an assistant's cache for it as soon as that is made
                cache.layers[i].activate_past_recording()
        else:
            _leave_inference_mode(layer)
    return cache


def snapshot_cache(cache: Cache, config) -> list[dict]:
    """What a model of this `config` has read so far, for `restore_cache` to go back to.

    Linear layers' states are copied (they are written in place), the keys and values of softmax layers are not (each
    update makes new ones): the cost does not grow with the text.

    Raises:
        ValueError: a static cache, or one of another architecture.
    """
    cache = prepare_cache(cache, config)
    if isinstance(cache, StaticCache):
        raise ValueError(f"only a dynamic cache can be rolled back, got a {type(cache).__name__}")
    snapshot = []
    for layer in cache.layers:
        if isinstance(layer, DeltaNetCacheLayer):
            snapshot.append({name: dict(value) for name, value in vars(layer).items() if isinstance(value, dict)})
            layer._map_states(lambda state: state.clone())  # the cache goes on with copies
        else:
            snapshot.append({"keys": layer.keys, "values": layer.values, "is_initialized": layer.is_initialized})
        if hasattr(layer, "cumulative_length"):
            snapshot[-1]["cumulative_length"] = layer.cumulative_length
    return snapshot


def restore_cache(cache: Cache, snapshot: list[dict]) -> None:
    """Forget what was read since `snapshot`, which can be restored again."""
    for layer, attributes in zip(cache.layers, snapshot, strict=True):
        for name, value in attributes.items():
            if isinstance(value, dict):
                value = {i: x.clone() if isinstance(x, torch.Tensor) else x for i, x in value.items()}
            setattr(layer, name, value)


def save_cache(cache: Cache, file: str | os.PathLike, config) -> None:
    """Write what a model of this `config` has read so far to a safetensors file.

    Linear and sliding layers take the same room whatever was read, full-attention layers grow with it. The file is
    written under another name first: one that stands there already is replaced whole or not at all.

    Raises:
        ValueError: a static cache, one that has read nothing yet, one process's part of a tensor-parallel model's, or
            one of another architecture.
    """
    cache = prepare_cache(cache, config)
    if isinstance(cache, StaticCache):
        raise ValueError(f"only a dynamic cache can be saved, got a {type(cache).__name__}")
    tensors = {f"{i}.{name}": x for i, layer in enumerate(cache.layers) for name, x in _tensors_of(layer).items()}
    if not tensors:
        raise ValueError("the cache is empty: there is nothing to save before the model has read something")
    for i, layer_type in enumerate(config.layer_types):
        name, heads = (
            (f"{i}.recurrent_state", config.linear_num_value_heads)
            if layer_type == "linear_attention"
            else (f"{i}.keys", config.num_key_value_heads)
        )
        if tensors[name].shape[1] != heads:
            raise ValueError(
                f"layer {i} holds {tensors[name].shape[1]} of {heads} heads: a tensor-parallel model's cache, of "
                "which each process has a part, cannot be saved"
            )
    # Sliding layers keep a window of what they have read: how much that was is needed for positions and masks.
    metadata = {"format": CACHE_FORMAT, "config": _fingerprint(config), "tokens": str(int(cache.get_seq_length()))}
    with new_file(file) as unfinished:
        save_file({name: x.contiguous() for name, x in tensors.items()}, unfinished, metadata)


@contextlib.contextmanager
def new_file(file: str | os.PathLike) -> Iterator[Path]:
    """A file to write, which becomes `file` when the block ends: what stands there is replaced whole or not at all."""
    file = Path(file)
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        yield unfinished
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def load_cache(file: str | os.PathLike, config, device: str | torch.device = "cpu") -> Cache:
    """Read a cache that `save_cache` wrote, ready to be passed to the model as `past_key_values` or `cache`.

    Raises:
        ValueError: a file that is truncated, not a cache, of a model with another `config`, or that holds anything
            other than what such a model has after that many tokens: a tensor of another name, shape or dtype, or a
            value that is not finite.
    """
    if Path(file).exists() and not Path(file).is_file():
        raise ValueError(f"{file} is not a file")
    try:
        with safe_open(file, framework="pt", device=str(device)) as f:
            slices = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118 (safe_open is no dict)
            tokens = _check_metadata(file, f.metadata() or {}, config)
            _check_header(file, {name: (x.get_dtype(), x.get_shape()) for name, x in slices.items()}, config, tokens)
            tensors = {name: f.get_tensor(name) for name in slices}
    except SafetensorError as error:
        raise ValueError(f"{file} is not a complete safetensors file: {error}") from error
    for name, x in tensors.items():
        if not x.isfinite().all():
            raise ValueError(f"{file}: {name} holds values that are not finite")
    cache = prepare_cache(DynamicCache(config=config), config)
    for i, layer in enumerate(cache.layers):
        _restore(layer, {name.split(".")[1]: x for name, x in tensors.items() if name.startswith(f"{i}.")}, tokens)
    return cache


def _check_metadata(file, metadata: dict[str, str], config) -> int:
    """How many tokens the cache has read, from a file of the right format and of a model of this `config`."""
    if metadata.get("format") != CACHE_FORMAT:
        raise ValueError(
            f"{file} is not a DeltaNet cache: its format is {metadata.get('format')!r}, not {CACHE_FORMAT!r}"
        )
    if metadata.get("config") != _fingerprint(config):
        raise ValueError(
            f"{file} holds the cache of another model: {metadata.get('config')}, wanted {_fingerprint(config)}"
        )
    tokens = metadata.get("tokens", "")
    if not re.fullmatch("[1-9][0-9]{0,17}", tokens):  # positions are int64
        raise ValueError(f"{file}: tokens must be a number from 1 to 10^18, got {tokens[:40]!r}")
    return int(tokens)


def _check_header(file, header: dict[str, tuple[str, list[int]]], config, tokens: int) -> None:
    """Refuse tensors that a model of this `config` does not have, or has otherwise, after so many `tokens`."""
    wanted = _shapes(config, tokens)
    missing, unknown = sorted(wanted.keys() - header.keys()), sorted(header.keys() - wanted.keys())
    if missing or unknown:
        raise ValueError(
            f"{file} must hold {', '.join(wanted)}; missing: {', '.join(missing) or 'none'}; "
            f"unknown: {', '.join(unknown) or 'none'}"
        )
    batch = max([1, *header[next(iter(wanted))][1][:1]])
    for name, shape in wanted.items():
        dtype, got = header[name]
        if got != [batch, *shape]:
            raise ValueError(
                f"{file}: {name} has shape {got}, wanted {[batch, *shape]} ({batch} sequences, {tokens} tokens)"
            )
        dtypes = ("F32", "F64") if name.endswith(".recurrent_state") else ("F32", "F64", "BF16", "F16")
        if dtype not in dtypes:
            raise ValueError(f"{file}: {name} has dtype {dtype}, wanted one of {', '.join(dtypes)}")


def _shapes(config, tokens: int) -> dict[str, list[int]]:
    """Name and shape, without the batch, of every tensor in the cache of a model that has read `tokens`."""
    heads, key_dim, value_dim = (
        config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim
    )  # fmt: skip
    shapes = {}
    for i, layer_type in enumerate(config.layer_types):
        if layer_type == "linear_attention":
            if config.linear_conv_kernel_dim is not None:
                channels = 2 * config.linear_num_key_heads * key_dim + heads * value_dim
                shapes[f"{i}.conv_state"] = [channels, config.linear_conv_kernel_dim - 1]
            shapes[f"{i}.recurrent_state"] = [heads, key_dim, value_dim]
        else:
            sliding = layer_type == "sliding_attention"
            length = min(tokens, config.sliding_window - 1) if sliding else tokens
            for name in ("keys", "values"):
                shapes[f"{i}.{name}"] = [config.num_key_value_heads, length, config.head_dim]
    return shapes


def _fingerprint(config) -> str:
    """What two configs must share for a cache of one to fit the other."""
    fields = (
        "layer_types", "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim",
        "linear_value_head_dim",
        "linear_conv_kernel_dim", "num_key_value_heads", "head_dim", "sliding_window", "hidden_size", "vocab_size",
    )  # fmt: skip
    return json.dumps({name: getattr(config, name) for name in fields})


def _tensors_of(layer) -> dict[str, torch.Tensor]:
    if isinstance(layer, DeltaNetCacheLayer):
        states = {"conv_state": layer.conv_states[0], "recurrent_state": layer.recurrent_states[0]}
    else:
        states = {"keys": layer.keys, "values": layer.values}
    return {name: x for name, x in states.items() if x is not None}


def _restore(layer, tensors: dict[str, torch.Tensor], tokens: int) -> None:
    """Fill an empty cache layer with what `_tensors_of` gave."""
    if isinstance(layer, DeltaNetCacheLayer):
        if "conv_state" in tensors:
            conv_state = tensors["conv_state"]
            layer.update_conv_state(conv_state, conv_kernel_size=conv_state.shape[-1])
        layer.update_recurrent_state(tensors["recurrent_state"], new_tokens=tokens)
    else:
        layer.update(tensors["keys"], tensors["values"])
        if layer.is_sliding:
            layer.cumulative_length = tokens
