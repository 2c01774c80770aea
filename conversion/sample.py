"""`deltanet sample`: a model writes its own training text, so that its student needs no data set.

Without prompts a chat model writes both sides of a chat: after its template's opening of a user's message it makes one
up, and answers it. With prompts it goes on from pieces of text, or answers chats anew.

Each batch draws from a seed of its own, and `OUTPUT.progress.json` says how much of `OUTPUT.part` is whole batches.
The same call after a stop cuts off what came after them and goes on with the lines that it would have written.
"""

import dataclasses
import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed

import modeling_deltanet  # noqa: F401  makes `model_type: deltanet` known to the Auto classes
from modeling_deltanet.cache_deltanet import new_file

from .checkpoint import check_new, fetch, load_tokenizer
from .files import read_json


DTYPES = ("float32", "bfloat16", "float16")
PLACE = "DELTANET-MESSAGE"  # stands for a message while its place in the chat template is looked for


@dataclass(frozen=True)
class Sampling:
    """What to write, and how much of it.

    Args:
        teacher: local folder or name on the Hub.
        output: JSON lines to make: `messages` of chats, or `prompt` and `completion`; `Stage.data` takes both.
        tokens: how many tokens to write, prompts included; the batch that reaches them is written to its end.
        prompts: text whose pieces are gone on from, see `load_text`; none for chats that the teacher makes up.
        prompt_tokens: tokens of a piece to go on from.
        answers: `prompts` are chats, or prompts with completions, of which the first answer is written anew.
        max_new_tokens: of a completion or an answer, at most; `question_tokens` of a question that is made up.
        temperature, top_p: of the sampling; at 1, a small model writes much that makes no sense.
        batch_size: texts at a time.
        dtype: to compute in; bfloat16 on a GPU and float32 on a CPU by default.
    """

    teacher: str
    output: str
    tokens: int = 1_000_000
    prompts: tuple[str, ...] = ()
    text_column: str = "text"
    prompt_tokens: int = 32
    answers: bool = False
    max_new_tokens: int = 480
    question_tokens: int = 128
    temperature: float = 0.8
    top_p: float = 1.0
    batch_size: int = 64
    seed: int = 0
    dtype: Literal["float32", "bfloat16", "float16"] | None = None


def sample_text(sampling: Sampling) -> dict:
    """Write the file; the same settings give the same lines on the same machine, stopped in between or not.

    Returns a summary: rows, tokens, and what was left out because it was empty or held special tokens.

    Raises:
        ValueError: an output that is there already or was begun with other settings, a teacher without a tokenizer or,
            without prompts, without a chat template; prompts that cannot be read or hold no text.
    """
    s = sampling
    if s.temperature <= 0 or not 0 < s.top_p <= 1:
        raise ValueError(
            f"temperature must be above 0 and top_p above 0 and at most 1, got {s.temperature} and {s.top_p}"
        )
    if s.answers and not s.prompts:
        raise ValueError("answers (--answers) needs prompts (--prompts): chats, or prompts with completions")
    if s.dtype not in (None, *DTYPES):
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {s.dtype!r}")
    output = Path(s.output)
    check_new(output)
    part, progress = Path(f"{s.output}.part"), Path(f"{s.output}.progress.json")
    state = _begun(s, part, progress)

    folder = fetch(s.teacher)
    tokenizer = load_tokenizer(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, s.dtype or ("bfloat16" if device == "cuda" else "float32"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    writer = Writer(model, tokenizer, s)
    batch = writer.chats() if not s.prompts else writer.answers() if s.answers else writer.completions()

    output.parent.mkdir(parents=True, exist_ok=True)
    _write(progress, {"settings": _settings(s), **state})
    with part.open("ab") as file, tqdm(
        total=s.tokens, initial=state["tokens"], unit="tok", unit_scale=True, desc="sampled", disable=None
    ) as bar:  # fmt: skip
        while state["tokens"] < s.tokens:
            set_seed(random.Random(f"{s.seed} {state['batches']}").randrange(2**31))
            rows, tokens = batch(state["batches"])
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
            file.flush()
            os.fsync(file.fileno())
            state["batches"] += 1
            state["rows"] += len(rows)
            state["left_out"] += s.batch_size - len(rows)
            state["tokens"] += tokens
            state["bytes"] = file.tell()
            _write(progress, {"settings": _settings(s), **state})
            bar.update(tokens)
            if state["batches"] >= 3 and state["rows"] == 0:
                raise ValueError(f"{s.teacher} wrote nothing in {state['left_out']} texts: is it a chat model?")
    part.replace(output)
    progress.unlink()
    return {"output": s.output, **{name: state[name] for name in ("rows", "tokens", "left_out", "batches")}}


def _settings(s: Sampling) -> dict:
    return json.loads(json.dumps({k: v for k, v in dataclasses.asdict(s).items() if k != "output"}))


def _begun(s: Sampling, part: Path, progress: Path) -> dict:
    """How far a run has come that was stopped; `part` holds nothing more after this."""
    if not progress.exists():
        check_new(part)
        return {"batches": 0, "rows": 0, "left_out": 0, "tokens": 0, "bytes": 0}
    theirs, mine = read_json(progress), _settings(s)
    state = {name: theirs[name] for name in ("batches", "rows", "left_out", "tokens", "bytes")}
    settings = theirs["settings"]
    if other := [f"{k} {settings.get(k)!r} instead of {v!r}" for k, v in mine.items() if settings.get(k) != v]:
        raise ValueError(
            f"{part} was begun with other settings ({', '.join(other)}): remove it, or name another output"
        )
    if not part.exists() or part.stat().st_size < state["bytes"]:
        raise ValueError(f"{part} lacks lines that {progress} counts: remove both, or name another output")
    os.truncate(part, state["bytes"])
    return state


def _write(file: Path, content: dict) -> None:
    with new_file(file) as unfinished:
        Path(unfinished).write_text(json.dumps(content, indent=2) + "\n")


Batch = Callable[[int], tuple[list[dict], int]]  # number of a batch -> its rows, and how many tokens they hold


class Writer:
    """The three ways to a batch of rows."""

    def __init__(self, model: PreTrainedModel, tokenizer, sampling: Sampling):
        self.model, self.tokenizer, self.s = model, tokenizer, sampling
        added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.special = [token for token in {*tokenizer.all_special_tokens, *added} if token.strip()]

    def chats(self) -> Batch:
        """A user's message that the teacher makes up, and its answer."""
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise ValueError(
                f"{self.s.teacher} has no chat template to make chats up from: give text to go on from (--prompts)"
            )
        user = [{"role": "user", "content": PLACE}]
        before, place, after = self.tokenizer.apply_chat_template(user, tokenize=False).partition(PLACE)
        if not place:
            raise ValueError(f"{self.s.teacher}: its chat template does not write a user's message as it is")
        opening = self._ids(before)

        def batch(number: int):
            questions = []
            for ids in self._go_on([opening] * self.s.batch_size, self.s.question_tokens):
                text = self.tokenizer.decode(ids)
                question = (text.split(after.strip())[0] if after.strip() else text).strip()
                if question and not self._has_special(question):
                    questions.append(question)
            asked = [[{"role": "user", "content": question}] for question in questions]
            prompts = [
                self._ids(self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
                for chat in asked
            ]
            rows, tokens = [], 0
            for chat, prompt, ids in zip(asked, prompts, self._go_on(prompts)):
                answer = self.tokenizer.decode(ids).strip()
                if answer and not self._has_special(answer):
                    rows.append({"messages": [*chat, {"role": "assistant", "content": answer}]})
                    tokens += len(prompt) + len(ids)
            return rows, tokens

        return batch

    def completions(self) -> Batch:
        """Pieces of text, and how the teacher goes on from them."""
        from .text import blocks, load_text

        documents = load_text(list(self.s.prompts), self.s.text_column, tokenizer=self.tokenizer)
        pieces = blocks(documents, self.tokenizer, self.s.prompt_tokens, self.s.seed)
        return self._from(lambda i: pieces[i % len(pieces)]["input_ids"])

    def answers(self) -> Batch:
        """What comes before the first answer of a chat, and the teacher's answer."""
        from .text import unanswered

        texts = unanswered(list(self.s.prompts), self.tokenizer, self.s.text_column)
        random.Random(self.s.seed).shuffle(texts)
        return self._from(lambda i: self._ids(texts[i % len(texts)]))

    def _from(self, prompt: Callable[[int], list[int]]) -> Batch:
        """Rows of prompt and completion, by the number of a prompt."""

        def batch(number: int):
            first = number * self.s.batch_size
            prompts = [prompt(i) for i in range(first, first + self.s.batch_size)]
            rows, tokens = [], 0
            for ids, new in zip(prompts, self._go_on(prompts)):
                # Together: some tokenizers leave out the space that a text begins with.
                begin, whole = self.tokenizer.decode(ids), self.tokenizer.decode([*ids, *new])
                completion = whole[len(begin) :]
                if whole.startswith(begin) and completion.strip() and not self._has_special(completion):
                    rows.append({"prompt": begin, "completion": completion})
                    tokens += len(ids) + len(new)
            return rows, tokens

        return batch

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def _has_special(self, text: str) -> bool:
        """Whether a text would be read as more than one message."""
        return any(token in text for token in self.special)

    def _go_on(self, prompts: list[list[int]], max_new_tokens: int | None = None) -> list[list[int]]:
        sampling = {"do_sample": True, "temperature": self.s.temperature, "top_p": self.s.top_p, "top_k": 0}
        return go_on(self.model, self.tokenizer, prompts, max_new_tokens or self.s.max_new_tokens, **sampling)


@torch.no_grad()
def go_on(model: PreTrainedModel, tokenizer, prompts: list[list[int]], max_new_tokens: int, **sampling) -> list:
    """New tokens after each of several prompts, up to the one that ends a text."""
    if not prompts:
        return []
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
    width = max(map(len, prompts))
    ids = torch.tensor([[padding] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    written = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=padding,
        **sampling,
    )
    rows = written[:, width:].tolist()
    return [row[: next((i for i, token in enumerate(row) if token in ends), len(row))] for row in rows]
