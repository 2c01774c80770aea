"""Any text as blocks of tokens to train on: a dataset's name, a folder, files, or a pattern such as `lib/*.py`."""

import glob
from functools import partial
from itertools import chain
from pathlib import Path

from jinja2 import TemplateError


try:
    from datasets import Dataset, concatenate_datasets, load_dataset
    from datasets.exceptions import DatasetsError
except ImportError as error:
    raise ImportError("datasets is not installed, which reads the text: pip install datasets") from error

from .files import local_folder


TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
# How `datasets` reads the others.
BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def load_text(
    sources: list[str], text_column: str = "text", split: str = "train", tokenizer=None, completion_only: bool = False
) -> Dataset:
    """All documents of `sources`, one per row, in a column `text`.

    A source is a file, a folder (read with all that lies below), a pattern, or the name of a dataset on the Hub, if
    need be with its configuration (`"wikitext:wikitext-2-raw-v1"`). A text file is one document; JSON lines, parquet
    and CSV have one in each row: in `text_column`, as a chat in `messages`, or in `prompt` and `completion` (texts, or
    messages). Messages are written out by the tokenizer's chat template.

    With `completion_only`, a column `answers` says from where to where in the text somebody answers: the assistant's
    messages, and completions.

    Raises:
        ValueError: a source is not there, cannot be read, holds no text or has no such column; messages that the
            tokenizer cannot write out.
    """
    parts = []
    for source in sources:
        files = _files(source)
        if not files and (Path(source).exists() or glob.has_magic(source)):
            raise ValueError(f"{source} holds no text: wanted files in {', '.join((*TEXT_SUFFIXES, *BUILDERS))}")
        if files:
            try:
                loaded = [load_dataset(kind, data_files=names, split="train", **more) for kind, names, more in files]
            except Exception as error:  # noqa: BLE001 (whatever a parser raises, it is about the file)
                raise ValueError(
                    f"{source} cannot be read: {str(error.__cause__ or error) or 'it is empty'}"
                ) from error
        else:
            name, _, configuration = source.partition(":")
            local_folder(name)  # a path that is mistyped is none of the Hub's names
            try:
                loaded = [load_dataset(name, configuration or None, split=split)]
            except (DatasetsError, ConnectionError) as error:
                raise ValueError(f"no such file or folder: {source}; as a dataset on the Hub: {error}") from error
        parts += [_documents(source, rows, text_column, tokenizer, completion_only) for rows in loaded]
    return concatenate_datasets(parts)


def unanswered(sources: list[str], tokenizer, text_column: str = "text", split: str = "train") -> list[str]:
    """Of chats, and of prompts with completions, what comes before the first answer; errors as in `load_text`."""
    documents = load_text(sources, text_column, split, tokenizer, completion_only=True)
    texts = [text[: answers[0][0]] for text, answers in zip(documents["text"], documents["answers"]) if answers]
    if not any(texts):
        raise ValueError(f"{', '.join(sources)} holds no chat that somebody answers")
    return texts


def _documents(source: str, rows: Dataset, text_column: str, tokenizer, completion_only: bool) -> Dataset:
    """Rows of a source as a column `text`, with `completion_only` also `answers`."""
    names = rows.column_names
    column = text_column if text_column in names else "text"
    if column in names:
        if completion_only:
            raise ValueError(f"{source} is plain text: completion_only needs 'messages', or 'prompt' and 'completion'")
        if getattr(rows.features[column], "dtype", None) not in ("string", "large_string"):
            raise ValueError(f"{source} has {rows.features[column]} in {column!r}: wanted texts")
        if missing := rows.data.column(column).null_count:
            raise ValueError(f"{source} has no {column!r} in {missing} of {len(rows)} rows")
        return rows.select_columns([column]).rename_column(column, "text") if column != "text" else (
            rows.select_columns(["text"])
        )  # fmt: skip
    if "messages" in names:
        kind = ["messages"]
    elif {"prompt", "completion"} <= set(names):
        kind = ["prompt", "completion"]
    else:
        raise ValueError(
            f"{source} has columns {', '.join(names)}, but no {text_column!r}, no 'messages', and no 'prompt' and "
            "'completion'"
        )
    write_out = partial(_write_out, source=source, tokenizer=tokenizer)
    written = rows.select_columns(kind).map(write_out, remove_columns=kind, desc="chats")
    return written if completion_only else written.select_columns(["text"])


def _write_out(row: dict, source: str, tokenizer) -> dict:
    """The text of a chat, or of a prompt with its completion, and where the answers in it begin and end."""
    if "messages" in row:
        before, messages = [], row["messages"]
    else:
        before, messages = row["prompt"], row["completion"]
    if isinstance(before, str) and isinstance(messages, str):
        return {"text": before + messages, "answers": [[len(before), len(before) + len(messages)]]}
    if not isinstance(before, list) or not isinstance(messages, list):
        raise ValueError(f"{source} has {row!r}: wanted texts or lists of messages")
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"{source} holds chats, and the tokenizer has no chat template to write them out: set "
            "`tokenizer.chat_template` and save it with the student, or give texts"
        )
    # Datasets gives every message the fields of all, as None.
    messages = [{k: x for k, x in message.items() if x is not None} for message in before + messages]
    try:
        text, answers = tokenizer.apply_chat_template(messages, tokenize=False), []
        for i, message in enumerate(messages):
            if i >= len(before) and message.get("role") == "assistant":
                start = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
                end = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
                if not (text.startswith(end) and end.startswith(start)):
                    raise ValueError(
                        f"{source}: the tokenizer's chat template writes an answer otherwise once the chat goes on; "
                        "give a row per answer, as 'prompt' and 'completion'"
                    )
                answers.append([len(start), len(end)])
    except TemplateError as error:
        raise ValueError(f"{source}: the tokenizer's chat template refuses a chat: {error}") from error
    return {"text": text, "answers": answers}


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

    Returns rows of `input_ids`, `labels` (the same, or -100 outside the `answers` of a document that has them), and
    `shift_labels` (what comes after each token, across the border of a block, too). A block without an answer is left
    out.

    Raises:
        ValueError: the documents do not fill one block.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def cut(batch):
        answers = batch["answers"] if "answers" in documents.column_names else [None] * len(batch["text"])
        pieces = [_pieces(*document) for document in zip(batch["text"], answers)]
        texts = [text for document in pieces for text, _ in document]
        ids = iter(tokenizer(texts, add_special_tokens=False, verbose=False).input_ids)
        stream, labels = [], []
        for document in pieces:
            for _, is_learned in document:
                tokens = next(ids)
                stream += tokens
                labels += tokens if is_learned else [-100] * len(tokens)
            stream += end
            labels += end if document[-1][1] else [-100] * len(end)
        nexts = [*labels[1:], -100]
        columns = {"input_ids": stream, "labels": labels, "shift_labels": nexts}
        starts = range(0, len(stream) - length + 1, length)
        starts = [i for i in starts if any(label != -100 for label in nexts[i : i + length])]
        return {name: [column[i : i + length] for i in starts] for name, column in columns.items()}

    cut_documents = documents.shuffle(seed=seed).map(
        cut, batched=True, batch_size=1000, remove_columns=documents.column_names, desc=f"blocks of {length} tokens"
    )
    if len(cut_documents) == 0:
        raise ValueError(f"{len(documents)} documents do not fill one block of {length} tokens")
    return cut_documents


def _pieces(text: str, answers: list | None) -> list[tuple[str, bool]]:
    """A document cut into what is learned and what is not: all of it is, without `answers`."""
    if answers is None:
        return [(text, True)]
    borders = [0, *chain.from_iterable(answers), len(text)]
    return [(text[a:b], i % 2 == 1) for i, (a, b) in enumerate(zip(borders, borders[1:])) if a < b or i == 0]
