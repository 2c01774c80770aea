"""`deltanet evaluate`: the figures are what they are named after, repeatable, and cards can read them."""

import builtins
import json
import math
import re
import shlex
import time
from types import SimpleNamespace

import pytest
import torch
import yaml
from lm_eval.tasks import TaskManager
from peft import LoraConfig, get_peft_model
from test_cli import deltanet  # noqa: F401  a fixture
from tiny import tiny_model, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from deltanet_conversion import Evaluation, evaluate_checkpoint, inspect_checkpoint
from deltanet_conversion.card import make_card
from deltanet_conversion.card_check import card_problems
from deltanet_conversion.evaluate import share_right, time_decoding
from deltanet_conversion.recall_tasks import KEYS, WRITES, RecallTasks
from deltanet_conversion.text import unanswered


TEXT = "The delta rule writes what is new. It leaves alone what is known already, and forgets the rest. " * 60
SMALL = {"length": 32, "blocks": 6, "recall_lengths": (512,), "episodes": 4, "seed": 3}


@pytest.fixture(scope="module")
def tokenizer():
    """Every byte is a token: it writes whatever recall asks for."""
    alphabet = {letter: i for i, letter in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def folder(tmp_path, tokenizer):
    """A student, its teacher, and held-out text."""
    for seed, name in enumerate(("student", "teacher")):
        tiny_model(seed=seed, vocab_size=len(tokenizer)).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def evaluate(folder, **settings) -> dict:
    return evaluate_checkpoint(Evaluation(str(folder / "student"), **SMALL | settings))


def figures(result: dict) -> dict:
    return {(row["metric"], row.get("of", "")): row["value"] for row in result["results"]}


class Oracle(torch.nn.Module):
    """A model that has learned each text by heart, but for the tokens in `wrong`: text -> places."""

    device = "cpu"

    def __init__(self, vocab_size: int, wrong=()):
        super().__init__()
        self.vocab_size, self.wrong = vocab_size, wrong

    def forward(self, input_ids, use_cache, logits_to_keep):
        following = input_ids.roll(-1, dims=1)
        for row, place in self.wrong:
            following[row, place - 1] += 1
        return SimpleNamespace(logits=F.one_hot(following[:, logits_to_keep], self.vocab_size))


@pytest.mark.parametrize("filler", [None, TEXT])
def test_recall_asks_for_the_last_value(tokenizer, filler):
    """The recall figure would measure another task than the one that it is named after."""
    tasks = RecallTasks(tokenizer, filler and tokenizer.encode(filler))
    for length in (tasks.shortest(), 1000):
        for episode in tasks.overwriting(length, 5, seed=0):
            assert len(episode.ids) == length and episode.ids[0] == tokenizer.bos_token_id
            text, _, end = tokenizer.decode(episode.ids[1:]).partition("\n\nIn the end:")
            writes = re.findall(r" ([A-Z]) is (\d\d)\.", text)
            assert len(writes) == KEYS * WRITES and len(dict(writes)) == KEYS
            for key in dict(writes):
                values = [value for other, value in writes if other == key]
                assert len(values) == WRITES and all(a != b for a, b in zip(values, values[1:]))
            asked = re.findall(r" ([A-Z]) is (\d\d)\.", end)
            assert dict(asked) == dict(writes) and len(asked) == KEYS
            answers = [tokenizer.decode([episode.ids[i] for i in answer]) for answer in episode.answers]
            assert answers == [f" {value}" for _, value in asked]
    with pytest.raises(ValueError, match=f"does not fit into 99 tokens; it does into {tasks.shortest()}"):
        next(tasks.overwriting(99, 1, seed=0))


def test_the_needle_lies_at_every_depth(tokenizer):
    """A model that sees only the end of a text would pass for one that remembers all of it."""
    depths = []
    for episode in RecallTasks(tokenizer).needle(900, 8, seed=1):
        text = tokenizer.decode(episode.ids[1:])
        secret, question = re.findall(r"The secret number of (\w+) is (\d{4})", text)
        [answer] = episode.answers
        assert len(episode.ids) == 900 and secret == question
        assert tokenizer.decode([episode.ids[i] for i in answer]) == f" {secret[1]}" and answer.stop == 900
        depths.append(text.index("The secret number") / len(text))
    assert depths == sorted(depths) and depths[0] < 0.1 and depths[-1] > 0.8


def test_an_answer_counts_if_each_of_its_tokens_is_right(tokenizer):
    """A model would score for half an answer, or an answer would be looked for one token off."""
    episodes = list(RecallTasks(tokenizer).overwriting(600, 3, seed=0))
    assert share_right(Oracle(len(tokenizer)), episodes, 2, "") == 1.0
    answer = episodes[0].answers[2]
    assert share_right(Oracle(len(tokenizer), [(0, answer[-1])]), episodes[:1], 2, "") == 1 - 1 / KEYS
    after = [(0, answer[-1] + 1), (0, answer[0] - 1)]  # tokens that nobody asked for
    assert share_right(Oracle(len(tokenizer), after), episodes[:1], 2, "") == 1.0


@torch.no_grad()
def test_perplexity_and_kl_are_those_of_the_models(folder, tokenizer):
    """A card would state another perplexity, or a distance from the teacher in the other direction."""
    found = figures(evaluate(folder, teacher=str(folder / "teacher"), data=(str(folder / "text.txt"),), batch_size=4))
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    ids = torch.tensor([ids[i : i + 32] for i in range(0, 6 * 32, 32)])
    student, teacher = (
        tiny_model(seed=seed, vocab_size=len(tokenizer))(ids).logits[:, :-1].double().log_softmax(-1)
        for seed in range(2)
    )
    for of, log_p in (("", student), ("teacher", teacher)):
        loss = -log_p.gather(-1, ids[:, 1:, None]).mean()
        assert math.isclose(found["perplexity", of], loss.exp(), rel_tol=1e-4)
    kl = (teacher.exp() * (teacher - student)).sum(-1).mean()
    assert math.isclose(found["KL to the teacher, nats per token", ""], kl, rel_tol=1e-4)
    recall = {(metric, of) for metric in ("overwriting recall", "needle retrieval") for of in ("", "teacher")}
    assert recall < found.keys() and len(found) == 9


def test_what_a_length_costs_once_is_not_the_price_of_a_token(monkeypatch):
    """cuDNN plans for each new length: the model that comes first, the teacher, would look three times too slow."""
    model, seen = tiny_model(), set()
    forward = model.forward

    def plan(*args, past_key_values=None, **kwargs):
        length = past_key_values.get_seq_length() if past_key_values is not None else 0
        if length not in seen:
            time.sleep(0.3)
        seen.add(length)
        return forward(*args, past_key_values=past_key_values, **kwargs)

    monkeypatch.setattr(model, "forward", plan)
    seconds, _ = time_decoding(model, torch.zeros(2, 8, dtype=torch.long), 3, part=4)
    assert seconds < 0.3 and {0, 4, 8, 9, 10} == seen


@torch.no_grad()
def test_students_stand_beside_each_other(folder, tokenizer, deltanet):  # noqa: F811
    """A user who chooses between layers or stages would read one student's figures under another's name."""
    for seed, name in ((1, "same"), (5, "other")):
        tiny_model(seed=seed, vocab_size=len(tokenizer)).save_pretrained(folder / name)
    settings = {"teacher": str(folder / "teacher"), "data": (str(folder / "text.txt"),), "speed_lengths": (24, 48)}
    beside = (f"copy={folder / 'same'}", str(folder / "other"))
    result = evaluate(folder, **settings, beside=beside)
    found = figures(result)
    columns = [row.get("of", "") for row in result["results"] if row["metric"] == "perplexity"]
    assert columns == ["teacher", "copy", "other", ""]
    assert "--beside copy=same --beside other=other" in result["command"] and str(folder) not in result["command"]
    alone = figures(
        evaluate(folder, teacher=settings["teacher"], data=settings["data"], output=str(folder / "x.json"))
    )
    assert all(found[key] == value for key, value in alone.items())
    kl, agreement = "KL to the teacher, nats per token", "greedy agreement with the fp32 teacher, first 32 tokens"
    assert found[kl, "copy"] == pytest.approx(0, abs=1e-6) and found[kl, "other"] > 0.1
    assert found[agreement, "teacher"] == found[agreement, "copy"] == 1

    shares, ids = [], tokenizer.encode(TEXT, add_special_tokens=False)
    for i in range(0, 6 * 32, 32):
        one, other = (
            tiny_model(seed=seed, vocab_size=len(tokenizer)).generate(
                torch.tensor([ids[i : i + 16]]), max_new_tokens=32, do_sample=False, eos_token_id=1, pad_token_id=1
            )[0, 16:].tolist()
            for seed in (1, 0)
        )  # fmt: skip
        same = [a == b for a, b in zip(one, other)]
        shares.append(same.index(False) / len(one) if False in same else 1)
    assert found[agreement, ""] == pytest.approx(sum(shares) / 6, abs=1e-4)

    memory = inspect_checkpoint(folder / "student")
    for length in (24, 48):
        expected = memory["state_bytes"] + length * memory["kv_bytes_per_token"]
        weighed = [row for row in result["speed"] if row["what"] == f"cache after {length} tokens"]
        assert [row.get("of", "") for row in weighed] == columns
        assert all(row["value"] * 1e6 == pytest.approx(expected, abs=8) for row in weighed)
    card = make_card(folder / "student", "me/x", license="mit", summary="x", limits="x")
    assert "| the next token after 48, teacher |" in card.content and "| cache after 48 tokens |" in card.content
    with pytest.raises(ValueError, match="names two models 'other'"):
        evaluate(folder, **settings, beside=(str(folder / "other"), f"other={folder / 'same'}"))
    with pytest.raises(ValueError, match="give it .--teacher"):
        evaluate(folder, chats=("x.jsonl",))


def test_answers_to_chats_are_compared(folder, tokenizer):
    """Agreement would be measured on what users say, or on questions with their answers."""
    (folder / "chats.jsonl").write_text('{"prompt": "Who writes", "completion": " it?"}\n' * 3)
    assert unanswered([str(folder / "chats.jsonl")], tokenizer) == ["Who writes"] * 3
    chats = {"teacher": str(folder / "teacher"), "chats": (str(folder / "chats.jsonl"),), "blocks": 2}
    rows = [row for row in evaluate(folder, **chats)["results"] if "agreement" in row["metric"]]
    one, other = (
        tiny_model(seed=seed, vocab_size=len(tokenizer)).generate(
            torch.tensor([tokenizer.encode("Who writes", add_special_tokens=False)]), max_new_tokens=32,
            do_sample=False, eos_token_id=1, pad_token_id=1,
        )[0, 10:].tolist()
        for seed in (1, 0)
    )  # fmt: skip
    same = [a == b for a, b in zip(one, other)]
    assert rows[1]["value"] == pytest.approx(same.index(False) / 32, abs=1e-4)
    assert {row["dataset"] for row in rows} == {"chats.jsonl, 2 prompts"}


def test_the_file_is_repeatable_and_fills_a_card(folder):
    """A figure could not be measured again, or `card` would refuse what `evaluate` wrote."""
    settings = {"teacher": str(folder / "teacher"), "data": (str(folder / "text.txt"),)}
    once = evaluate(folder, **settings)
    file = folder / "student" / "evaluation.json"
    text = file.read_text()
    assert evaluate(folder, **settings) == once and file.read_text() == text
    assert str(folder) not in text
    assert json.loads(text)["command"] == (
        "deltanet evaluate student --teacher teacher --data text.txt --length 32 --blocks 6 --recall-lengths 512 "
        "--episodes 4 --seed 3"
    )
    (folder / "student" / "conversion.json").write_text('{"teacher": "them/teacher"}')
    card = make_card(folder / "student", "me/x", license="mit", summary="x", limits="x")
    assert "| one number within 512 tokens of text.txt | needle retrieval |" in card.content
    assert not [what for _, what in card_problems(card.content, "me/x", set()) if "recall" in what]


def test_an_adapter_is_measured_on_its_base(folder, tokenizer):
    """The figures on an adapter's page would be its base's."""
    model = get_peft_model(
        tiny_model(vocab_size=len(tokenizer)), LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False)
    )
    model.peft_config["default"].base_model_name_or_path = str(folder / "student")
    model.save_pretrained(folder / "lora")
    data = (str(folder / "text.txt"),)
    adapted = figures(evaluate_checkpoint(Evaluation(str(folder / "lora"), data=data, **SMALL)))
    assert adapted["perplexity", ""] != pytest.approx(figures(evaluate(folder, data=data))["perplexity", ""], rel=1e-3)
    model.merge_and_unload().save_pretrained(folder / "student")
    assert adapted == pytest.approx(figures(evaluate(folder, data=data)), rel=1e-4)


def test_what_cannot_be_measured_is_refused_first(folder, tokenizer, monkeypatch):
    """Hours of measuring would end in an error, or in figures of something else."""
    student, refused = folder / "student", pytest.raises
    with refused(ValueError, match="no such folder: .*nowhere"):
        evaluate_checkpoint(Evaluation(str(folder / "nowhere" / "x")))
    with refused(ValueError, match="dtype must be one of float32, .*'half'"):
        evaluate(folder, dtype="half")
    with refused(ValueError, match="into 99 tokens"):
        evaluate(folder, recall_lengths=(99,))
    tiny_model(vocab_size=300).save_pretrained(folder / "other")
    with refused(ValueError, match=f"a vocabulary of {len(tokenizer)}, .*other one of 300"):
        evaluate(folder, teacher=str(folder / "other"))
    with refused(ValueError, match="other has no tokenizer"):
        evaluate_checkpoint(Evaluation(str(folder / "other")))
    (student / "evaluation.json").write_text('{"command": "python examples/quickstart.py"}')
    with refused(ValueError, match="evaluation.json is not of `deltanet evaluate`.*--output"):
        evaluate(folder, output=str(student / "evaluation.json"))
    for _ in range(2):
        assert evaluate(folder)["output"] == str(student / "evaluation-recall.json")
    tiny_tokenizer().save_pretrained(student)
    with refused(ValueError, match="writes A and B alike"):
        evaluate(folder)

    real_import = builtins.__import__

    def without_harness(name, *args, **kwargs):
        if name.split(".")[0] == "lm_eval":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_harness)
    with refused(ValueError, match="task arc_easy is lm-evaluation-harness's, which is not installed"):
        evaluate(folder, tasks=("arc_easy",))


def test_tasks_of_the_harness_stand_beside_the_rest(folder, deltanet, monkeypatch):  # noqa: F811
    """A published figure of a well-known task would need a second tool, or come without its name."""
    rows = [{"question": "The delta rule", "choices": [" writes", " x"], "label": i % 2} for i in range(4)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "deltanet_test", "dataset_path": "json", "output_type": "multiple_choice", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}, "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "label", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (folder / "task.yaml").write_text(yaml.safe_dump(task))
    sizes = ("--recall-lengths", "512", "--episodes", "2")
    code, out, _ = deltanet("evaluate", folder / "student", "--task", folder / "task.yaml", *sizes, "--json")
    assert code == 0
    result = json.loads(out)
    assert {"dataset": "deltanet_test", "dataset_id": "deltanet_test", "metric": "acc", "value": 0.5} in result[
        "results"
    ]
    assert "--task task.yaml" in result["command"]
    manager = TaskManager(include_path=str(folder), include_defaults=False)  # the harness's own tasks take 7 s to list
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda include_defaults: manager)
    code, _, err = deltanet("evaluate", folder / "student", "--task", "deltanet_tset", *sizes)
    assert code == 1 and "no task 'deltanet_tset'; near: deltanet_test" in err
    code, _, err = deltanet("evaluate", folder / "student", "--recall-lengths", "512,x")
    assert code == 1 and "'512,x'" in err


def test_the_command_shows_what_it_measured(deltanet, folder):  # noqa: F811
    """A user would have to read JSON, or guess which column is the teacher's."""
    code, out, _ = deltanet(
        "evaluate", folder / "student", "--teacher", folder / "teacher", "--data", folder / "text.txt", "--length", 32,
        "--blocks", 2, "--recall-lengths", "512", "--episodes", 2,
    )  # fmt: skip
    assert code == 0
    assert re.search(r"teacher .*this model", out) and "perplexity" in out and "needle retrieval" in out
    assert "deltanet card" in out


def test_the_command_in_the_file_is_the_one_that_was_given(deltanet, monkeypatch):  # noqa: F811
    """Whoever runs the command of a card would measure something else, or meet an unknown option."""
    given = Evaluation(
        "x y", teacher="them/teacher", data=("a:b", "c"), text_column="d", split="e", length=3, blocks=4,
        recall_lengths=(5, 6), episodes=7, batch_size=8, tasks=("f", "g"), limit=9, seed=10, dtype="float16",
        beside=("h=i", "j=k"), chats=("l",), speed_lengths=(11, 12), speed_batch=13,
    )  # fmt: skip
    seen = []
    result = {"results": [], "hardware": "", "output": ""}
    monkeypatch.setattr("deltanet_conversion.evaluate.evaluate_checkpoint", lambda e: seen.append(e) or result)
    for evaluation in (given, Evaluation("x")):
        assert deltanet(*shlex.split(evaluation.command())[1:])[0] == 0
    assert seen == [given, Evaluation("x")]
    code, out, _ = deltanet("evaluate", "--help")
    assert code == 0 and "deltanet evaluate " in out and "Example" in out
