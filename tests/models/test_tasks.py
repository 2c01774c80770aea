"""Where users meet the model: pipelines, a server, the standard evaluation; each on a saved folder."""

import json
import socket
import subprocess
import sys
import time
import urllib.request

import lm_eval
import pytest
import torch
import yaml
from tiny import LINEAR, SLIDING, tiny_model, tiny_tokenizer, words
from transformers import pipeline

from modeling_deltanet import (
    DeltaNetForCausalLM,
    DeltaNetForSequenceClassification,
    DeltaNetForTokenClassification,
    DeltaNetModel,
)


TEXT = words(9)
LAYERS = {"hybrid": {}, "all_linear": {"layer_types": [LINEAR] * 2}}


def saved(folder, cls=DeltaNetForCausalLM, **fields):
    """A model and its tokenizer in a folder."""
    model = tiny_model(cls, **fields)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def ids(text):
    return tiny_tokenizer()(text, return_tensors="pt").input_ids


# pipeline(...)


@pytest.mark.parametrize("layers", LAYERS)
def test_text_generation_pipeline(tmp_path, layers):
    """The usual way to try a model would fail, or show another text than `generate`, alone or in a batch."""
    model = saved(tmp_path, **LAYERS[layers])
    generator = pipeline("text-generation", model=str(tmp_path), device="cpu")
    texts = [TEXT, words(4, seed=1)]
    results = generator(texts, max_new_tokens=6, do_sample=False, batch_size=2, return_full_text=False)
    for text, (result,) in zip(texts, results):
        expected = model.generate(ids(text), max_new_tokens=6, do_sample=False)[0, ids(text).shape[1] :]
        assert result["generated_text"].split() == tiny_tokenizer().decode(expected).split()


@torch.no_grad()
def test_feature_extraction_pipeline(tmp_path):
    """Embeddings would be another layer's, or not come at all."""
    model = saved(tmp_path, DeltaNetModel)
    features = pipeline("feature-extraction", model=str(tmp_path), device="cpu")(TEXT, return_tensors=True)
    torch.testing.assert_close(features, model(ids(TEXT)).last_hidden_state)


@torch.no_grad()
def test_classification_pipelines(tmp_path):
    """A fine-tuned classifier could not be used by name, or would give other labels."""
    model = saved(tmp_path / "text", DeltaNetForSequenceClassification, num_labels=5)
    (scores,) = pipeline("text-classification", model=str(tmp_path / "text"), device="cpu", top_k=None)([TEXT])
    expected = model(ids(TEXT)).logits.softmax(-1)[0]
    assert {s["label"]: s["score"] for s in scores} == pytest.approx(
        {model.config.id2label[i]: p.item() for i, p in enumerate(expected)}, rel=1e-4
    )
    model = saved(tmp_path / "token", DeltaNetForTokenClassification, num_labels=5)
    labels = pipeline("token-classification", model=str(tmp_path / "token"), device="cpu", ignore_labels=[])(TEXT)
    assert [label["entity"] for label in labels] == [
        model.config.id2label[i] for i in model(ids(TEXT)).logits[0].argmax(-1).tolist()
    ]


# transformers serve


@pytest.fixture
def server(tmp_path):
    """`transformers serve` on a folder, as a user would start it; its address, the folder and the model."""
    model = saved(tmp_path / "model", layer_types=[LINEAR, SLIDING])
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(tmp_path / "model")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = f"serve {tmp_path / 'model'} --device cpu --host 127.0.0.1 --port {port}"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "modeling_deltanet", *command.split()], stdout=log, stderr=log
        )
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                assert process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}", str(tmp_path / "model"), model
    finally:
        process.terminate()
        process.wait()


def test_a_server_answers_over_http(server):
    """A chat client would get an error, or another text than the model's; whole and streamed."""
    address, name, model = server
    prompt = TEXT + " "
    expected = model.generate(ids(prompt), max_new_tokens=6, do_sample=False)[0, ids(prompt).shape[1] :]
    for stream in (False, True):
        body = {
            "model": name,
            "messages": [{"role": "user", "content": TEXT}],
            "max_tokens": 6,
            "temperature": 0.0,
            "stream": stream,
        }
        request = urllib.request.Request(
            f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        answer = urllib.request.urlopen(request, timeout=120).read().decode()
        if stream:
            events = [json.loads(line[6:]) for line in answer.splitlines() if line.startswith("data: {")]
            text = "".join(event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"])
        else:
            text = json.loads(answer)["choices"][0]["message"]["content"]
        assert text.split() == tiny_tokenizer().decode(expected).split()


# lm-eval --model hf


@torch.no_grad()
def test_lm_eval_scores_a_saved_folder(tmp_path):
    """Published figures would come from a harness that reads the model wrongly, or not at all."""
    model = saved(tmp_path / "model")
    # Of each pair of endings the model prefers one: by these labels it is right in three of four questions.
    questions = []
    for i in range(8):
        context, choices = words(5, seed=i), [words(2, seed=100 + i), words(2, seed=200 + i)]
        scores = []
        for choice in choices:
            x = ids(f"{context} {choice}")
            logits = model(x).logits[0].log_softmax(-1)
            scores.append(sum(logits[t - 1, x[0, t]].item() for t in range(5, 7)))
        preferred = int(scores[1] > scores[0])
        label = preferred if i % 4 else 1 - preferred
        questions.append({"question": context, "choices": choices, "label": label})
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, questions)))
    task = {
        "task": "deltanet_test",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "task.yaml").write_text(yaml.safe_dump(task))
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tmp_path / "model"), "dtype": "float32"},
        tasks=["deltanet_test"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        batch_size=3,
        device="cpu",
        bootstrap_iters=0,
    )
    assert results["results"]["deltanet_test"]["acc,none"] == 0.75
