"""`deltanet sample`: a teacher writes text that the stages take, and writes the same after a stop."""

import json

import pytest
import torch
from test_cli import deltanet  # noqa: F401  a fixture
from tiny import tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, GenerationMixin, PreTrainedTokenizerFast

from deltanet_conversion import Sampling, sample_text
from deltanet_conversion.text import blocks, load_text


TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


@pytest.fixture
def settings(tmp_path):
    """A chat model of random weights, and little to write."""
    names = ["</s>", "<unk>", "<user>", "<assistant>", *(f"w{i}" for i in range(92))]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>",
        extra_special_tokens={"user": "<user>", "assistant": "<assistant>"}, chat_template=TEMPLATE,
    )  # fmt: skip
    tokenizer.save_pretrained(tmp_path / "teacher")
    torch.manual_seed(0)
    tiny_llama(eos_token_id=0).save_pretrained(tmp_path / "teacher")
    (tmp_path / "text.txt").write_text(" ".join(f"w{i % 90}" for i in range(200)))
    (tmp_path / "chats.jsonl").write_text(
        "".join(
            json.dumps({"messages": [{"role": "user", "content": f"w{i} w2"}, {"role": "assistant", "content": "w3"}]})
            + "\n"
            for i in range(5, 8)
        )
    )
    return {
        "teacher": str(tmp_path / "teacher"), "output": str(tmp_path / "out.jsonl"), "tokens": 300, "batch_size": 4,
        "max_new_tokens": 12, "question_tokens": 20, "prompt_tokens": 5,
    }  # fmt: skip


def lines(settings) -> list[dict]:
    with open(settings["output"]) as file:
        return [json.loads(line) for line in file]


@pytest.mark.parametrize("kind", ["chats", "completions", "answers"])
def test_what_a_teacher_writes_is_what_stages_read(settings, tmp_path, kind):
    """Its text would be refused by `distill --completion-only`, or another part of it would be learned."""
    sources = {"completions": ("text.txt",), "answers": ("chats.jsonl",), "chats": ()}[kind]
    prompts = tuple(str(tmp_path / name) for name in sources)
    summary = sample_text(Sampling(**settings, prompts=prompts, answers=kind == "answers"))
    rows = lines(settings)
    assert len(rows) == summary["rows"] and 300 <= summary["tokens"] < 300 + 4 * 60
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.jsonl"]
    tokenizer = AutoTokenizer.from_pretrained(settings["teacher"])
    documents = load_text([settings["output"]], tokenizer=tokenizer, completion_only=True)
    for row, document in zip(rows, documents):
        ((start, end),) = document["answers"]
        answer = document["text"][start:end]
        if kind == "chats":
            assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
            assert answer.removesuffix(" </s> ") == row["messages"][1]["content"]
        else:
            assert answer == row["completion"]
        assert len(tokenizer(answer).input_ids) <= 13
    assert len(blocks(documents, tokenizer, 16)) > 5
    if kind == "answers":
        assert all(row["prompt"].startswith("<user> w") and row["prompt"].endswith("<assistant>") for row in rows)


@pytest.mark.parametrize("kind", ["chats", "completions"])
def test_a_stop_costs_no_line_and_changes_none(settings, tmp_path, monkeypatch, kind):
    """A run in pieces would repeat lines, lose some, or leave half a line that no reader of JSON takes."""
    settings |= {"prompts": (str(tmp_path / "text.txt"),) if kind == "completions" else ()}
    sample_text(Sampling(**settings | {"output": str(tmp_path / "whole.jsonl")}))
    generate, calls = GenerationMixin.generate, []

    def stops(self, **kwargs):
        calls.append(kwargs)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return generate(self, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(GenerationMixin, "generate", stops)
        sample_text(Sampling(**settings))
    assert not (tmp_path / "out.jsonl").exists()
    with open(tmp_path / "out.jsonl.part", "a") as file:
        file.write('{"half a li')  # killed while it wrote
    with pytest.raises(ValueError, match="begun with other settings .seed 0 instead of 1"):
        sample_text(Sampling(**settings, seed=1))
    sample_text(Sampling(**settings))
    assert (tmp_path / "out.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    sample_text(Sampling(**settings | {"output": str(tmp_path / "other.jsonl")}, seed=1))
    assert (tmp_path / "other.jsonl").read_text() != (tmp_path / "whole.jsonl").read_text()


def test_what_cannot_be_sampled_is_refused(deltanet, settings, tmp_path):  # noqa: F811
    """A user would wait for a file that stays empty, or lose one that is there."""
    (tmp_path / "out.jsonl").write_text("somebody's")
    for options, message in (
        ((), "out.jsonl is there already"),
        (("--temperature", 0), "temperature must be above 0"),
        (("--answers",), "needs prompts"),
        (("--dtype", "int8"), "got 'int8'"),
    ):
        code, _, err = deltanet("sample", settings["teacher"], settings["output"], *options)
        assert code == 1 and message in err.replace("\n", "")
    (tmp_path / "teacher" / "chat_template.jinja").unlink()
    code, _, err = deltanet("sample", settings["teacher"], tmp_path / "new.jsonl")
    assert code == 1 and "has no chat template" in err and not list(tmp_path.glob("new*"))
