"""Checkpoints on disk: read tensor by tensor, written shard by shard, and a folder that appears only when complete.

A conversion is a list of `Output`s. Each says from which source tensors one target tensor is made, so that no more
than one target shard is in memory at a time.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import RemoteEntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import AutoTokenizer
from transformers.configuration_utils import PreTrainedConfig

from modeling_deltanet import DeltaNetConfig, DeltaNetForCausalLM

from .files import INDEX, check_named_files, hub_errors, local_folder, own_file, read_index, read_json


CONFIG, WEIGHTS, ADAPTER_CONFIG = "config.json", "model.safetensors", "adapter_config.json"
FACTS = "conversion.json"  # what a converted model came from and went through, which its card tells
# What the model computes with in fp32, whatever dtype the rest of it has (a linear layer's decay).
KEPT_WIDE = (".A_log", ".dt_bias")
# What travels unchanged to the converted folder.
TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "chat_template*",
    "generation_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is, known from its file's header."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Output:
    """One tensor of the target: its name, the source tensors it is made from, and how; as they are by default."""

    name: str
    sources: tuple[str, ...]
    make: Callable[..., torch.Tensor] = lambda tensor: tensor


class Checkpoint:
    """A local folder with `config.json` and safetensors weights, in one file or in shards. Reads headers at once,
    tensors when asked for.

    Raises:
        ValueError: something is missing, truncated, or in another format; the message names the file.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        config_file = self.folder / CONFIG
        if not self.folder.is_dir():
            raise ValueError(f"no such folder: {folder}")
        self.config = fetch_config(folder)
        if (weights := self.config.get("transformers_weights")) not in (None, WEIGHTS, INDEX):
            raise ValueError(f"{config_file} has transformers_weights: {weights!r}; only {WEIGHTS} or {INDEX} is read")
        self.tensors: dict[str, TensorInfo] = {}
        for file in self._weight_files():
            with _opened(file) as weights:
                for name in weights.offset_keys():
                    slice_ = weights.get_slice(name)
                    self.tensors[name] = TensorInfo(file, tuple(slice_.get_shape()), slice_.get_dtype())
        self._check_index()
        layers = self.config.get("num_hidden_layers")
        if isinstance(layers, int) and layers > len(self.tensors):  # before so many layers are made, to be compared
            raise ValueError(f"{config_file} has {layers} layers; the files hold {len(self.tensors)} tensors")
        dtype = self.config.get("dtype") or self.config.get("torch_dtype")
        if dtype is not None and not (
            isinstance(dtype, str) and isinstance(getattr(torch, dtype.removeprefix("torch."), None), torch.dtype)
        ):
            raise ValueError(f"{config_file} has dtype {dtype!r}, which is none of torch's")

    def _weight_files(self) -> list[Path]:
        if os.path.lexists(self.folder / INDEX):
            names = sorted(set(self._index().values()))
        elif os.path.lexists(self.folder / WEIGHTS):
            names = [WEIGHTS]
        else:
            found = sorted(p.name for pattern in ("*.bin", "*.pt", "*.safetensors") for p in self.folder.glob(pattern))
            raise ValueError(
                f"{self.folder} has neither {WEIGHTS} nor {INDEX}; it has {', '.join(found) or 'no weights'}"
            )
        return [own_file(self.folder, name) for name in names]

    def _index(self) -> dict[str, str]:
        return read_index(own_file(self.folder, INDEX))

    def _check_index(self) -> None:
        has_index = os.path.lexists(self.folder / INDEX)
        missing = sorted(set(self._index()) - set(self.tensors)) if has_index else []
        if missing:
            raise ValueError(f"{self.folder / INDEX} names tensors that its files do not hold: {', '.join(missing)}")

    def read(self, name: str) -> torch.Tensor:
        """One tensor, mapped from its file: nothing of it stays in memory once the caller has let go of it."""
        with _opened(self.tensors[name].file) as weights:
            return weights.get_tensor(name)

    @property
    def largest_shard(self) -> int:
        return max(info.file.stat().st_size for info in self.tensors.values())


@contextmanager
def reads_config():
    """Errors of a configuration that is made from a file's fields, with the file's name."""
    try:
        yield
    except (ValueError, StrictDataclassError) as error:
        raise ValueError(f"config.json: {error}") from error


@contextmanager
def _opened(file: Path):
    try:
        weights = safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or truncated ({file.stat().st_size:,} bytes): {error}") from error
    with weights:
        yield weights


def fetch(source: str | Path, revision: str | None = None) -> Path:
    """A folder with the checkpoint: `source` itself where it is one, otherwise the Hub's repository of that name.

    Raises:
        ValueError: no such folder or repository, a `revision` of a local folder, or files that name others outside
        the folder.
    """
    folder = local_folder(source, revision)
    if folder is None:
        patterns = [CONFIG, "*.safetensors", "*.safetensors.index.json", *TOKENIZER_FILES]
        with hub_errors(source):
            folder = Path(snapshot_download(str(source), revision=revision, allow_patterns=patterns))
    check_named_files(folder)
    return folder


def config_file(source: str | Path, revision: str | None = None) -> Path:
    """The `config.json` of a folder or of a repository on the Hub, or an adapter's `adapter_config.json`; no weights.

    Errors are those of `fetch`, and ValueError where there is neither.
    """
    folder = local_folder(source, revision)
    if folder is None:
        with hub_errors(source):
            try:
                return Path(hf_hub_download(str(source), CONFIG, revision=revision))
            except RemoteEntryNotFoundError:
                return Path(hf_hub_download(str(source), ADAPTER_CONFIG, revision=revision))
    for name in (CONFIG, ADAPTER_CONFIG):
        if os.path.lexists(folder / name):
            return own_file(folder, name)
    raise ValueError(f"{folder} is no checkpoint: it has no {CONFIG}")


def fetch_config(source: str | Path, revision: str | None = None) -> dict:
    """The `config.json` of a folder or repository; errors are `config_file`'s, and ValueError for an adapter."""
    file = config_file(source, revision)
    config = read_json(file)
    if file.name == ADAPTER_CONFIG:
        base = config.get("base_model_name_or_path")
        raise ValueError(f"{source} is an adapter and no model of its own: take its base, {base!r}, or merge both")
    return config


def load_tokenizer(source: str | Path, revision: str | None = None):
    """Transformers' tokenizer of a folder or repository.

    Raises:
        ValueError: a folder that has none.
    """
    if Path(source).is_dir() and not has_tokenizer(os.listdir(source)):
        raise ValueError(
            f"{source} has no tokenizer (tokenizer.json): save one there with `tokenizer.save_pretrained(folder)`"
        )
    with hub_errors(source):
        return AutoTokenizer.from_pretrained(source, revision=revision)


def has_tokenizer(names: Iterable[str]) -> bool:
    """Whether a folder's files are enough for a tokenizer."""
    return not {"tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json"}.isdisjoint(names)


def check_new(path: str | Path) -> None:
    """Refuse a path that cannot be made a new folder; an empty folder is taken for a new one.

    Raises:
        ValueError: it is there already, or lies below a file.
    """
    path = Path(path).absolute()
    if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path} is there already: name another output, or remove it")
    for parent in path.parents:
        if parent.exists() and not parent.is_dir():
            raise ValueError(f"{path} cannot be made: {parent} is a file, not a folder")


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder to write into, which becomes `path` when the block ends. If the block fails, nothing is left.

    It lies beside `path`, so that the last step is a rename.

    Raises:
        ValueError: what `check_new` refuses.
    """
    path = Path(path).absolute()
    check_new(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.parent / f".{path.name}.unfinished-{os.getpid()}"
    unfinished.mkdir()
    try:
        yield unfinished
        unfinished.rename(path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def convert(
    source: Checkpoint,
    outputs: list[Output],
    expected: dict[str, tuple[int, ...]],
    config: PreTrainedConfig | dict,
    target: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_size: int | None = None,
    unread: tuple[str, ...] = (),
    facts: dict | None = None,
) -> None:
    """Check a plan, carry it out in a new folder, and read every tensor back before the folder gets its name.

    Arguments and errors are those of the three steps, `check_outputs`, `write_checkpoint` and `compare`. `facts` are
    written beside the weights, for the model card.
    """
    check_outputs(source, outputs, expected, unread)
    tokenizer_files(source.folder)  # what may not travel is refused before anything is written
    with new_folder(target) as folder:
        write_checkpoint(folder, source, outputs, config, dtype, max_shard_size)
        compare(source, outputs, Checkpoint(folder), dtype)
        if facts is not None:
            (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def expected_tensors(config: DeltaNetConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a checkpoint of this configuration.

    Raises:
        ValueError: sizes that no tensor can have.
    """
    try:
        with torch.device("meta"):
            model = DeltaNetForCausalLM(config)
    except (RuntimeError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"config.json describes a model that cannot be built: {error}") from error
    return {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in unread_head(config)
    }


def unread_head(config: DeltaNetConfig) -> tuple[str, ...]:
    """A head that is the embeddings: files may hold it, and need not."""
    return ("lm_head.weight",) if config.tie_word_embeddings else ()


def check_outputs(
    source: Checkpoint, outputs: list[Output], expected: dict[str, tuple[int, ...]], unread: tuple[str, ...] = ()
) -> None:
    """Refuse a plan that does not fit, before anything is written.

    Args:
        outputs: the plan, one `Output` for each of `expected`.
        expected: name and shape of every tensor of the target.
        unread: source tensors that the target has no use for, such as the head of tied embeddings.

    Raises:
        ValueError: source tensors that are missing, unknown, or of another shape; the message names each.
    """
    missing = sorted({name for output in outputs for name in output.sources if name not in source.tensors})
    if missing:
        raise ValueError(f"{source.folder} lacks {named(missing)}")
    read = {name for output in outputs for name in output.sources}
    unknown = sorted(set(source.tensors) - read - set(unread))
    if unknown:
        raise ValueError(f"{source.folder} has tensors that its config.json does not explain: {named(unknown)}")
    for output in outputs:
        inputs = [torch.empty(source.tensors[name].shape, device="meta") for name in output.sources]
        try:
            shape = tuple(output.make(*inputs).shape)
        except (RuntimeError, ValueError) as error:
            shape = f"what cannot be converted ({error})"
        if shape != expected[output.name]:
            shapes = ", ".join(f"{name} {list(source.tensors[name].shape)}" for name in output.sources)
            got = list(shape) if isinstance(shape, tuple) else shape
            raise ValueError(
                f"{output.name} must be {list(expected[output.name])} by config.json; {shapes} gives {got}"
            )


def named(names: list[str]) -> str:
    """At most twelve names: a wrong architecture has hundreds, and the first ones tell."""
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def write_checkpoint(
    folder: Path,
    source: Checkpoint,
    outputs: list[Output],
    config: PreTrainedConfig | dict,
    dtype: torch.dtype | None = None,
    max_shard_size: int | None = None,
) -> None:
    """Make every output and write it, with `config`, the index and the tokenizer's files.

    The configuration names the dtype: `dtype` if tensors are cast to it, otherwise what the source's says. A linear
    layer's decay is cast to wider dtypes only.

    Memory holds the outputs of one shard. Shards take at most `max_shard_size` bytes, by default what the source's
    largest takes. Outputs are made in the order in which the source's files hold their inputs.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    if max_shard_size is None:
        max_shard_size = source.largest_shard
    order = {name: i for i, name in enumerate(source.tensors)}
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    pending_size = total_size = 0

    def flush():
        nonlocal pending, pending_size
        file = folder / f"shard-{len(shards)}"
        try:
            save_file(pending, file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(
                f"could not write {pending_size:,} bytes of weights beside {folder.parent}: {error}"
            ) from error
        shards.append(list(pending))
        pending, pending_size = {}, 0

    for output in tqdm(sorted(outputs, key=lambda o: order[o.sources[0]]), desc="tensors", unit="", disable=None):
        tensor = _made(output, source, dtype)
        if pending and pending_size + tensor.nbytes > max_shard_size:
            flush()
        pending[output.name] = tensor
        pending_size += tensor.nbytes
        total_size += tensor.nbytes
    del tensor
    flush()
    _name_shards(folder, shards, total_size)
    fields = config if isinstance(config, dict) else config.to_diff_dict()
    named_dtype = source.config.get("dtype") or source.config.get("torch_dtype") if dtype is None else dtype
    if named_dtype is not None:
        fields = fields | {"dtype": str(named_dtype).removeprefix("torch.")}
    (folder / CONFIG).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    copy_tokenizer(source.folder, folder)


def _made(output: Output, source: Checkpoint, dtype: torch.dtype | None) -> torch.Tensor:
    tensor = output.make(*(source.read(name) for name in output.sources))
    if dtype is not None:
        wide = output.name.endswith(KEPT_WIDE)
        tensor = tensor.to(torch.promote_types(tensor.dtype, dtype) if wide else dtype)
    return tensor.contiguous()


def compare(source: Checkpoint, outputs: list[Output], target: Checkpoint, dtype: torch.dtype | None = None) -> None:
    """Make every output anew and compare it with what `target` holds, bit by bit.

    Raises:
        ValueError: a tensor differs, is missing, or is one too many.
    """
    if set(target.tensors) != {output.name for output in outputs}:
        raise ValueError(f"{target.folder} holds other tensors than {source.folder} converts to")
    for output in tqdm(outputs, desc="compare", unit="", disable=None):
        if not _same_bits(_made(output, source, dtype), target.read(output.name)):
            raise ValueError(f"{output.name} in {target.folder} is not what {source.folder} converts to")


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8))


def _name_shards(folder: Path, shards: list[list[str]], total_size: int) -> None:
    """Their names hold their number, which is known only now."""
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / WEIGHTS)
        return
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"shard-{i}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the files beside the weights that a converted model goes on using."""
    for file in tokenizer_files(source):
        shutil.copy(file, target / file.name)


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer's files and the generation config. Raises ValueError for a link that leads out of the folder."""
    found = sorted({file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)})
    return [own_file(folder, file.name) for file in found if not file.is_dir()]
