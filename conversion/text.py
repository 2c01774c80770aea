"""Any text as blocks of tokens to train on: a dataset's name, a folder, files, or a pattern such as `lib/*.py`."""

import glob
from itertools import chain
from pathlib import Path

from datasets import Dataset, concatenate_datasets, load_dataset


TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
# How `datasets` reads the others.
BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def load_text(sources: list[str], text_column: str = "text", split: str = "train") -> Dataset:
    """All documents of `sources`, one per row, in a column `text`.

    A source is a file, a folder (read with all that lies below), a pattern, or the name of a dataset on the Hub, if
    need be with its configuration (`"wikitext:wikitext-2-raw-v1"`). A text file is one document; JSON lines, parquet
    and CSV have one in each row of `text_column`.

    Raises:
        ValueError: a source holds no text, or has no such column.
    """
    parts = []
    for source in sources:
        files = _files(source)
        if not files and (Path(source).exists() or glob.has_magic(source)):
            raise ValueError(f"{source} holds no text: wanted files in {', '.join((*TEXT_SUFFIXES, *BUILDERS))}")
        if files:
            loaded = [
                load_dataset(builder, data_files=names, split="train", **options) for builder, names, options in files
            ]
        else:
            name, _, configuration = source.partition(":")
            loaded = [load_dataset(name, configuration or None, split=split)]
        for documents in loaded:
            column = text_column if text_column in documents.column_names else "text"
            if column not in documents.column_names:
                raise ValueError(f"{source} has columns {', '.join(documents.column_names)}, but no {text_column!r}")
            parts.append(documents.select_columns([column]).rename_column(column, "text") if column != "text"
                         else documents.select_columns(["text"]))  # fmt: skip
    return concatenate_datasets(parts)


def _files(source: str) -> list[tuple[str, list[str], dict]]:
    """The local files of a source as calls of `load_dataset`: builder, files, options."""
    path = Path(source)
    if path.is_file():
        found = [path]
    elif path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file())
    else:
        found = sorted(Path(name) for name in glob.glob(source, recursive=True))
    texts = [str(p) for p in found if p.suffix in TEXT_SUFFIXES]
    calls = [("text", texts, {"sample_by": "document", "encoding_errors": "ignore"})] if texts else []
    for builder in dict.fromkeys(BUILDERS.values()):
        names = [str(p) for p in found if BUILDERS.get(p.suffix) == builder]
        if names:
            calls.append((builder, names, {}))
    return calls


def blocks(documents: Dataset, tokenizer, length: int, seed: int = 0) -> Dataset:
    """Documents in random order, joined with the end-of-sequence token between them and cut into blocks of `length`
    tokens.

    Returns rows of `input_ids` and `labels`, which are the same.

    Raises:
        ValueError: the documents do not fill one block.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def cut(batch):
        ids = tokenizer(batch["text"], add_special_tokens=False, verbose=False).input_ids
        stream = list(chain.from_iterable(document + end for document in ids))
        rows = [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]
        return {"input_ids": rows, "labels": rows}

    cut_documents = documents.shuffle(seed=seed).map(
        cut, batched=True, batch_size=1000, remove_columns=documents.column_names, desc=f"blocks of {length} tokens"
    )
    if len(cut_documents) == 0:
        raise ValueError(f"{len(documents)} documents do not fill one block of {length} tokens")
    return cut_documents
