"""A GGUF file (llama.cpp's format) as a folder that Transformers reads: configuration, weights, tokenizer, template.

Transformers reads the file. What it passes over in silence is read or refused here: tensors that its model has no
place for or that are missing, the stretched rotation of Llama 3, the size of a head, and the tokens that end a text.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import save_torch_state_dict
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .checkpoint import WEIGHTS, named
from .files import INDEX, own_file


ARCHITECTURES = ("llama", "qwen2", "qwen3")  # as GGUF names them: a Mistral is a llama there
SPLIT = "split.count"
# What changes a model's logits, and Transformers does not read.
UNREAD = ("attention.sliding_window", "attention.clamp_kqv", "logit_scale", "rope.scale_linear")


def find_gguf(source: str | os.PathLike) -> Path | None:
    """The GGUF file that `source` names: itself, or the only one in a folder without safetensors. None for others.

    Raises:
        ValueError: a folder with several GGUF files, or whose file is a link to elsewhere.
    """
    path = Path(source)
    if path.is_file():
        return path if path.suffix.lower() == ".gguf" else None
    if not path.is_dir() or any(os.path.lexists(path / name) for name in (WEIGHTS, INDEX)):
        return None
    names = sorted(name for name in os.listdir(path) if name.lower().endswith(".gguf"))
    if len(names) > 1:
        raise ValueError(f"{path} holds several GGUF files, name one: {', '.join(names)}")
    return own_file(path, names[0]) if names else None


@dataclass(frozen=True)
class GGUF:
    """A file whose header was read and whose model is one that can be converted.

    Raises:
        ValueError: no GGUF file or a truncated one, part of a split model, another architecture, tensors that the
        architecture lacks or has one too many, or a field that changes the logits and that Transformers does not read.
        ImportError: the package `gguf` is not installed.
    """

    file: Path

    def __post_init__(self):
        architecture = self._field("general.architecture")
        if architecture not in ARCHITECTURES:
            raise ValueError(
                f"{self.file} is {architecture!r}, which cannot be converted: what can of GGUF is "
                f"{', '.join(ARCHITECTURES)}"
            )
        if (parts := self._field(SPLIT)) not in (None, 1):
            raise ValueError(
                f"{self.file} is one of {parts} files of a split model: merge them by `llama-gguf-split --merge`"
            )
        scaling = self._field(f"{architecture}.rope.scaling.type")
        if scaling not in (None, "none"):
            raise ValueError(f"{self.file} stretches its rotation by {scaling!r}, which Transformers does not read")
        for key in UNREAD:
            if (value := self._field(f"{architecture}.{key}")) not in (None, 0, 1.0):
                raise ValueError(f"{self.file} has {key} {value!r}, which Transformers does not read")
        self._check_tensors()

    @cached_property
    def reader(self):
        try:
            from gguf import GGUFReader
        except ImportError as error:
            raise ImportError("gguf is not installed, which reads GGUF files: pip install gguf") from error
        try:
            return GGUFReader(self.file)
        except Exception as error:  # noqa: BLE001 (NumPy's errors, an IndexError, ...: it is about the file)
            raise ValueError(
                f"{self.file} is no GGUF file, or a damaged or truncated one ({self.file.stat().st_size:,} bytes): "
                f"{error}"
            ) from error

    def _field(self, key: str):
        field = self.reader.get_field(key)
        return None if field is None else field.contents()

    @cached_property
    def config(self):
        """Transformers' configuration of the model, completed."""
        architecture = self._field("general.architecture")
        try:
            config = AutoConfig.from_pretrained(self.file.parent, gguf_file=self.file.name)
        except Exception as error:  # noqa: BLE001 (a field of another type is found wherever it is computed with)
            raise ValueError(f"{self.file} describes no {architecture} that Transformers can read: {error}") from error
        if (head_dim := self._field(f"{architecture}.attention.key_length")) is not None:
            config.head_dim = head_dim
        turned = self._field(f"{architecture}.rope.dimension_count")
        if turned not in (None, head_dim := getattr(config, "head_dim", None)):
            raise ValueError(f"{self.file} rotates {turned} of {head_dim} channels of a head; our heads rotate all")
        ends = [self._field(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
        ends = list(dict.fromkeys(token for token in ends if token is not None))
        config.eos_token_id = ends if len(ends) > 1 else ends[0] if ends else None
        config.bos_token_id = self._field("tokenizer.ggml.bos_token_id")
        config.pad_token_id = self._field("tokenizer.ggml.padding_token_id")
        for tensor in self.reader.tensors:
            if tensor.name == "rope_freqs.weight":
                config.rope_parameters = self._llama3_rotation(config, torch.from_numpy(tensor.data.copy()))
        return config

    def _llama3_rotation(self, config, factors: torch.Tensor) -> dict:
        """Llama 3 stretches its rotation, which a GGUF tells by what each frequency is divided by; Transformers passes
        it over. The same by the numbers of `config.json`, which all of Llama 3.1 to 3.3 share but for the factor.
        """
        theta = config.rope_parameters["rope_theta"]
        rotation = {
            "rope_type": "llama3", "rope_theta": theta, "factor": round(factors.max().item(), 4),
            "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        }  # fmt: skip
        config.rope_parameters = rotation
        frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        plain = theta ** -(torch.arange(0, 2 * len(frequencies), 2) / (2 * len(frequencies)))
        if factors.shape != frequencies.shape or not torch.allclose(plain / frequencies, factors, rtol=1e-3):
            raise ValueError(f"{self.file} stretches its rotation (rope_freqs.weight) otherwise than Llama 3 does")
        return rotation

    def _check_tensors(self) -> None:
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        config = self.config  # made here: it computes with the file's numbers
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
        except (RuntimeError, TypeError, ZeroDivisionError) as error:
            raise ValueError(f"{self.file} describes a model that cannot be built: {error}") from error
        architecture = self._field("general.architecture")
        kind = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
        names = get_tensor_name_map(kind, config.num_hidden_layers)
        expected = {
            names.get_name(name, try_suffixes=(".weight", ".bias")): tuple(tensor.shape)
            for name, tensor in model.state_dict().items()
            if not (config.tie_word_embeddings and name == "lm_head.weight")
        }
        found = {tensor.name: tuple(map(int, reversed(tensor.shape))) for tensor in self.reader.tensors}
        found.pop("rope_freqs.weight", None)
        if missing := sorted(expected.keys() - found.keys()):
            raise ValueError(f"{self.file} lacks {named(missing)}")
        if unknown := sorted(found.keys() - expected.keys()):
            raise ValueError(f"{self.file} has tensors that no {architecture} of Transformers has: {named(unknown)}")
        for name, shape in expected.items():
            if found[name] != shape:
                raise ValueError(
                    f"{self.file}: {name} must be {list(shape)} by its header, and is {list(found[name])}"
                )

    def unpack(self, folder: Path, dtype: torch.dtype | None = None, max_shard_size: int | None = None) -> None:
        """Write the model into `folder`, in float32 by default: quantised weights are numbers of no narrower dtype."""
        try:
            model = AutoModelForCausalLM.from_pretrained(
                self.file.parent, gguf_file=self.file.name, config=self.config, dtype=dtype or torch.float32
            )
        except NotImplementedError as error:
            raise ValueError(f"{self.file} cannot be read: {error}") from error
        tensors = model.state_dict()
        if self.config.tie_word_embeddings:
            del tensors["lm_head.weight"]
        save_torch_state_dict(tensors, folder, max_shard_size=max_shard_size or "5GB")
        model.config.architectures = [type(model).__name__]
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.config.save_pretrained(folder)
        ids = {name: getattr(self.config, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        GenerationConfig(**{f"{name}_token_id": token for name, token in ids.items()}).save_pretrained(folder)
        if self._field("tokenizer.ggml.tokens") is not None:
            AutoTokenizer.from_pretrained(self.file.parent, gguf_file=self.file.name).save_pretrained(folder)


@contextmanager
def unpacked(source: GGUF, beside: str | os.PathLike, dtype: torch.dtype | None = None) -> Iterator[Path]:
    """A folder with the file's model, beside the one that is to be made, which is gone when the block ends."""
    parent = Path(beside).absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{source.file.stem}.", dir=parent) as folder:
        source.unpack(Path(folder), dtype)
        yield Path(folder)
