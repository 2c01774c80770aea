"""Alignment and distillation at a size of seconds: they learn, touch what they should, and go on after a stop."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_llama import make_teacher
from tiny import LINEAR, tokens
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from deltanet_conversion import Distillation, Stage, align, alignment, convert_from_llama, distill, distillation
from deltanet_conversion import stage as stage_module
from deltanet_conversion.alignment import LayerwiseAlignment
from deltanet_conversion.text import blocks, load_text


@pytest.fixture(scope="module")
def tokenizer():
    words = {f"w{i}": i for i in range(90)} | {"</s>": 90, "<unk>": 91}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


@pytest.fixture
def pair(tmp_path, tokenizer):
    """A teacher, its hybrid with one of four layers kept, and text: the settings of a stage."""
    make_teacher("qwen3", tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    convert_from_llama(tmp_path / "teacher", tmp_path / "student", keep="0.25")
    (tmp_path / "text").mkdir()
    for i, row in enumerate(tokens(40, 60).tolist()):
        (tmp_path / "text" / f"{i}.txt").write_text(" ".join(f"w{token % 90}" for token in row))
    return {
        "teacher": str(tmp_path / "teacher"),
        "student": str(tmp_path / "student"),
        "output": str(tmp_path / "out"),
        "data": (str(tmp_path / "text"),),
        "tokens": 20 * 4 * 16,
        "length": 16,
        "batch_size": 4,
    }


def weights(folder) -> dict[str, torch.Tensor]:
    return {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}


def test_alignment_teaches_the_mixers_and_nothing_else(pair, tmp_path):
    """A stage would leave the mixers as they are, or spoil what was copied from the teacher."""
    summary = align(Stage(**pair, learning_rate=1e-2))
    assert summary["loss_after"] < 0.8 * summary["loss_before"]
    assert (summary["steps"], summary["trained_tokens"], summary["resumed"]) == (20, 20 * 4 * 16, False)
    before, after = weights(tmp_path / "student"), weights(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".linear_attn." in name}
    facts = (tmp_path / "out" / "conversion.json").read_text()
    assert str(tmp_path) not in facts  # which the Hub need not know
    assert json.loads(facts)["teacher"] == "teacher" and json.loads(facts)["kept_layers"] == [3]
    assert json.loads(facts)["align"]["loss_after"] == summary["loss_after"]
    assert (tmp_path / "out" / "trainer_state.json").exists()
    assert (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize("stage", ["align", "distill"])
def test_a_decay_that_starts_open_learns_like_the_rest(pair, tmp_path, stage):
    """What `convert --linear-decay` adds would stay as it began: its gradient is below Adam's usual epsilon."""
    pair["student"] = str(tmp_path / "gated")
    convert_from_llama(tmp_path / "teacher", pair["student"], keep="0.25", linear_use_decay=True, dtype=torch.bfloat16)
    pair["tokens"] //= 2
    run, make, rate = (
        (align, Stage, "learning_rate") if stage == "align" else (distill, Distillation, "mixer_learning_rate")
    )
    run(make(**pair, **{rate: 1e-2}))
    before, after = weights(tmp_path / "gated"), weights(tmp_path / "out")
    for name in before:
        if name.endswith(("A_log", "dt_bias", "a_proj.weight")):
            assert (after[name].float() - before[name].float()).abs().max() > 0.02, name  # 10 steps of up to 0.01
            assert after[name].dtype == (torch.bfloat16 if "a_proj" in name else torch.float32)


@torch.no_grad()
def test_a_mixer_is_compared_with_its_own_layers_attention(pair):
    """Inputs, rotations or outputs of another layer would be learned, and the loss would still fall."""
    teacher, student = (AutoModelForCausalLM.from_pretrained(pair[name]).eval() for name in ("teacher", "student"))
    ids = tokens(2, 16)
    hidden = teacher(ids, output_hidden_states=True).hidden_states
    positions = teacher.model.rotary_emb(hidden[0], torch.arange(16)[None])
    losses = []
    for i, layer_type in enumerate(student.config.layer_types):
        if layer_type == LINEAR:
            layer = teacher.model.layers[i]
            x = layer.input_layernorm(hidden[i])
            mask = torch.full((16, 16), -torch.inf).triu(1)[None, None]
            wanted = layer.self_attn(x, position_embeddings=positions, attention_mask=mask)[0]
            got = student.model.layers[i].linear_attn(x, position_embeddings=positions)
            losses.append((got - wanted).square().sum() / wanted.square().sum())
    alignment = LayerwiseAlignment(teacher, student)
    torch.testing.assert_close(alignment(ids)["loss"], torch.stack(losses).mean(), atol=1e-4, rtol=1e-4)
    assert len(losses) == 3


def test_distillation_brings_the_student_nearer(pair, tmp_path):
    """The stage would train on something else than the teacher, or at one learning rate."""
    summary = distill(Distillation(**pair, learning_rate=1e-4, mixer_learning_rate=1e-2))
    assert summary["loss_after"] < 0.95 * summary["loss_before"]
    before, after = weights(tmp_path / "student"), weights(tmp_path / "out")
    moved = {name: (after[name] - before[name]).abs().max().item() for name in before}
    mixer, kept = "model.layers.0.linear_attn.q_proj.weight", "model.layers.3.self_attn.q_proj.weight"
    assert 0 < moved[kept] < 0.1 * moved[mixer]  # AdamW moves weights in proportion to their learning rate

    teacher, student = (AutoModelForCausalLM.from_pretrained(pair[name]).eval() for name in ("teacher", "student"))
    ids = torch.tensor(blocks(load_text(list(pair["data"])), _tokenizer(pair), 16).select(range(3))["input_ids"])
    with torch.no_grad():
        p, q = (model(ids).logits.double().softmax(-1) for model in (teacher, student))
    kl = (p * (p / q).log()).sum(-1).mean().item()
    assert summary["loss_before"] == pytest.approx(kl, rel=1e-3)  # 3 blocks of 150 are held out


def _tokenizer(pair):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(pair["student"])


def test_a_stage_on_long_texts_begins_where_the_last_one_ended(pair, tmp_path, capsys):
    """A third stage would train what is to stay, begin with a memory that forgets, or pass over what it says of the
    second one.
    """
    second = distill(Distillation(**pair, mixer_learning_rate=1e-2, freeze=("mlp", "embeddings")))
    assert "tok/s" in capsys.readouterr().err and second["tokens_per_second"] > 0
    before, after = weights(tmp_path / "student"), weights(tmp_path / "out")
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if any(part in name for part in (".mlp.", "embed_tokens", "lm_head"))}

    third = pair | {"student": pair["output"], "output": str(tmp_path / "long"), "length": 32, "batch_size": 2}
    plain = distill(Distillation(**third | {"output": str(tmp_path / "plain"), "tokens": 64}))
    gated = distill(Distillation(**third, linear_decay=True, mixer_learning_rate=1e-2))
    assert gated["loss_before"] == pytest.approx(plain["loss_before"], rel=1e-4)
    config = json.loads((tmp_path / "long" / "config.json").read_text())
    facts = json.loads((tmp_path / "long" / "conversion.json").read_text())
    assert config["linear_use_decay"] and facts["distill"]["length"] == 16 and facts["distill_2"]["length"] == 32
    assert weights(tmp_path / "long")["model.layers.0.linear_attn.A_log"].abs().max() > 0.02
    for options, message in (
        ({"student": str(tmp_path / "long")}, "decay .* the student has one already"),
        ({"freeze": ("heads",)}, "freeze takes embeddings, mlp, attention, norms, got heads"),
        ({"freeze": ("mlp",), "lora_rank": 2}, "freeze and lora_rank"),
    ):
        with pytest.raises(ValueError, match=message):
            distill(Distillation(**third | {"output": str(tmp_path / "other")} | options, linear_decay=True))


def test_the_divergence_and_its_gradient(monkeypatch):
    """Distillation would learn something else than the teacher's distribution, at the border of a chunk or between
    answers.
    """
    monkeypatch.setattr(distillation, "CHUNK", 7)
    torch.manual_seed(0)
    logits, wanted = (3 * torch.randn(16, 11, dtype=torch.float64) for _ in range(2))
    learned = torch.rand(16) < 0.7
    found, expected = [], []
    for store, divergence in (
        (found, distillation.KLDivergence.apply),
        (
            expected,
            lambda q, p, on: torch.nn.functional.kl_div(
                q[on].log_softmax(-1), p[on].log_softmax(-1), reduction="sum", log_target=True
            ),
        ),
    ):
        leaf = logits.clone().requires_grad_()
        loss = divergence(leaf, wanted, learned)
        (2.5 * loss).backward()
        store += [loss.detach(), leaf.grad]
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


def test_lora_is_merged_into_the_student(pair, tmp_path):
    """The output would need PEFT to load, or the embeddings would have been trained after all."""
    summary = distill(Distillation(**pair, mixer_learning_rate=3e-3, lora_rank=4))
    assert summary["loss_after"] < summary["loss_before"]
    before, after = weights(tmp_path / "student"), weights(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("_proj.weight" in name for name in changed)
    assert before.keys() == after.keys()


class StopAt(TrainerCallback):
    """A machine that goes away in the middle of a stage: at a step that is no checkpoint."""

    def __init__(self, step, how):
        self.step, self.how = step, how

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.how()


def stop(monkeypatch, step, how):
    """Every stage stops at this step."""

    def stops(trainer):
        return lambda *args, **kwargs: trainer(
            *args, **kwargs | {"callbacks": [*kwargs["callbacks"], StopAt(step, how)]}
        )

    for module, name in ((alignment, "StageTrainer"), (distillation, "DistillationTrainer")):
        monkeypatch.setattr(module, name, stops(getattr(module, name)))


def _raises(message):
    def crash():
        raise RuntimeError(message)

    return crash


@pytest.mark.parametrize("how, kind", [("crash", "align"), ("Ctrl-C", "align"), ("crash", "distill")])
def test_a_stage_goes_on_from_its_last_checkpoint(pair, tmp_path, monkeypatch, how, kind):
    """A run that was stopped would begin anew, or go on with other data and end somewhere else."""
    pair |= {"save_steps": 5}
    run, make = align, Stage
    if kind == "distill":
        run, make = distill, Distillation
        pair |= {"freeze": ("mlp",), "linear_decay": True}
    whole = run(make(**pair | {"output": str(tmp_path / "whole")}))

    crash = _raises("the machine went away") if how == "crash" else lambda: signal.raise_signal(signal.SIGINT)
    with monkeypatch.context() as patch:
        stop(patch, 7, crash)
        with pytest.raises((RuntimeError, KeyboardInterrupt), match="went away|step 8"):
            run(make(**pair))
    assert not (tmp_path / "out").exists()
    resumed = run(make(**pair))
    assert resumed["resumed"] and resumed["steps"] == 20
    assert resumed["loss_before"] == whole["loss_before"] and resumed["loss_after"] == whole["loss_after"]
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "out")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_stage_that_trained_nothing_leaves_nothing(pair, tmp_path, monkeypatch):
    """After a typing error the corrected command would be refused for the folder of the first; checkpoints as large as
    three models would stay for good.
    """
    work = tmp_path / "out.training"
    with pytest.raises(ValueError, match="no such file or folder: .*typo|no such folder: .*typo"):
        align(Stage(**pair | {"data": (str(tmp_path / "typo"),)}))
    assert not work.exists()
    pair["tokens"] = 2 * 4 * 16
    align(Stage(**pair))
    assert not work.exists() and (tmp_path / "out" / "trainer_state.json").exists()
    summary = align(Stage(**pair | {"output": str(tmp_path / "kept")}, keep_training=True))
    assert (tmp_path / "kept.training" / "checkpoint-2").is_dir() and "keep_training" in summary

    with monkeypatch.context() as patch:
        stop(patch, 1, lambda: (tmp_path / "curves.training" / "runs" / "host").mkdir(parents=True))
        align(Stage(**pair | {"output": str(tmp_path / "curves")}))
    assert (tmp_path / "curves.runs" / "host").is_dir() and not (tmp_path / "curves.training").exists()

    work.mkdir()
    (tmp_path / "out").rename(tmp_path / "old")
    (work / "notes.txt").write_text("somebody's")
    with pytest.raises(ValueError, match="out.training is there already"):
        align(Stage(**pair))
    assert (work / "notes.txt").exists()


def test_what_a_retry_may_change(pair, tmp_path, monkeypatch):
    """A stage that ran out of memory could not be tried again with less, or would go on with other settings."""
    pair |= {"save_steps": 5}
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        stop(patch, 7, _raises("out of memory"))
        align(Stage(**pair))
    with pytest.raises(ValueError, match=r"other settings \(batch_size 4 instead of 2\)"):
        align(Stage(**pair | {"batch_size": 2}))
    resumed = align(Stage(**pair, activation_checkpointing=True))
    assert resumed["resumed"] and resumed["steps"] == 20

    # Killed from outside before its first checkpoint: there is nothing to go on from.
    work = tmp_path / "other.training"
    work.mkdir()
    (work / "settings.json").write_text('{"seed": 1}')
    again = align(Stage(**pair | {"output": str(tmp_path / "other"), "tokens": 64}))
    assert not again["resumed"] and again["loss_before"] == resumed["loss_before"]


def test_the_text_of_a_stage_is_made_once(pair, tmp_path, monkeypatch):
    """Each stage would write out all chats and make tokens of all text again, minutes for each on a GPU that waits."""
    made = []

    def blocks_only(*arguments):
        made.append(blocks(*arguments)._fingerprint)
        raise RuntimeError("enough")

    monkeypatch.setattr(stage_module, "blocks", blocks_only)
    shutil.copytree(pair["student"], tmp_path / "aligned")
    for student in (pair["student"], tmp_path / "aligned"):
        with pytest.raises(RuntimeError, match="enough"):
            align(Stage(**pair | {"student": str(student)}))
    assert made[0] == made[1]


def test_settings_that_do_not_fit_are_refused(pair, tmp_path):
    """A stage would replace a checkpoint, or train on a pair that is none."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").touch()
    with pytest.raises(ValueError, match="there already"):
        align(Stage(**pair))
    (tmp_path / "out" / "config.json").unlink()
    with pytest.raises(ValueError, match="student must be a deltanet, got 'qwen3'"):
        align(Stage(**pair | {"student": pair["teacher"]}))
    make_teacher("qwen3", tmp_path / "other", hidden_size=48)
    with pytest.raises(ValueError, match="hidden_size 32, the teacher 48"):
        align(Stage(**pair | {"teacher": str(tmp_path / "other"), "output": str(tmp_path / "out2")}))
    convert_from_llama(pair["teacher"], tmp_path / "all", keep="all")
    with pytest.raises(ValueError, match="nothing to align"):
        align(Stage(**pair | {"student": str(tmp_path / "all"), "output": str(tmp_path / "out3")}))
    for options, message in (
        ({"precision": "float16", "device": "cpu"}, "'float16' needs a GPU"),
        ({"precision": "int8"}, "precision must be .* got 'int8'"),
        ({"device": "tpu"}, "device must be .* got 'tpu'"),
        ({"report_to": "dvclive"}, "report_to is 'dvclive', which is not installed here"),
        ({"report_to": "nothing"}, "nothing is not supported"),
    ):
        with pytest.raises(ValueError, match=message):
            align(Stage(**pair, **options))
    with pytest.raises(ValueError, match="is plain text: completion_only needs"):
        distill(Distillation(**pair, completion_only=True))
    assert not (tmp_path / "out.training").exists()


@pytest.mark.parametrize("stage", ["align", "distill", "LoRA"])
def test_checkpointing_saves_activations_and_changes_nothing(pair, tmp_path, stage, monkeypatch, recwarn):
    """`--activation-checkpointing` would be taken and do nothing, or train something else."""
    from modeling_deltanet.modeling_deltanet import DeltaNetLinearAttention

    pair["tokens"] = 2 * 4 * 16
    run, make = (align, Stage) if stage == "align" else (distill, Distillation)
    more = {"lora_rank": 2} if stage == "LoRA" else {}
    forwards, forward = [], DeltaNetLinearAttention.forward

    def counted(self, *args, **kwargs):
        forwards.append(torch.is_grad_enabled())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(DeltaNetLinearAttention, "forward", counted)
    found = []
    for checkpointing in (False, True):
        forwards.clear()
        output = tmp_path / str(checkpointing)
        run(make(**pair | {"output": str(output)}, activation_checkpointing=checkpointing, **more))
        found.append((sum(forwards), weights(output)))
    (whole, one), (again, other) = found
    assert again == 2 * whole
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-6, rtol=1e-5)
    assert [str(warning.message) for warning in recwarn if "deprecated" in str(warning.message)] == []


def test_one_process_takes_one_gpu(pair, tmp_path, monkeypatch):
    """On a machine with several GPUs batches would be spread over them, and the teacher be on one."""

    class OnFour(stage_module.TrainingArguments):
        def __post_init__(self):
            super().__post_init__()
            self._n_gpu = 4

    monkeypatch.setattr(stage_module, "TrainingArguments", OnFour)
    config = AutoModelForCausalLM.from_pretrained(pair["student"]).config
    args = Stage(**pair)._training_arguments(tmp_path, False, "float32", config)
    assert (args.n_gpu, args.train_batch_size) == (1, 4)


@pytest.mark.parametrize("stage", ["align", "distill"])
def test_bfloat16_on_a_cpu(pair, tmp_path, stage, monkeypatch):
    """`--precision bfloat16` would be taken and compute in fp32, or the result would be stored in another dtype."""
    seen = set()
    monkeypatch.setattr(
        torch.nn.Linear, "forward", _spied(torch.nn.Linear.forward, lambda output: seen.add(output.dtype))
    )
    pair["tokens"] = 2 * 4 * 16
    run, make = (align, Stage) if stage == "align" else (distill, Distillation)
    summary = run(make(**pair, precision="bfloat16", device="cpu"))
    assert seen == {torch.bfloat16} and summary["precision"] == "bfloat16" and summary["loss_after"] < 10
    assert {x.dtype for x in weights(tmp_path / "out").values()} == {torch.float32}


def _spied(function, look):
    def spy(*args, **kwargs):
        output = function(*args, **kwargs)
        look(output)
        return output

    return spy


CHAT = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


def chats(folder, rows) -> str:
    file = folder / f"chats{len(list(folder.glob('chats*')))}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_of_chats_the_answers_alone_are_learned(tmp_path, tokenizer):
    """`--completion-only` would train on what users and systems say, or leave out what assistants do."""
    tokenizer = copy.deepcopy(tokenizer)
    talk = [
        {"role": "system", "content": "w1"},
        {"role": "user", "content": "w2 w3"},
        {"role": "assistant", "content": "w4 w5"},
        {"role": "user", "content": "w6"},
        {"role": "assistant", "content": "w7"},
    ]
    messages = chats(tmp_path, [{"messages": talk}])
    with pytest.raises(ValueError, match="holds chats, and the tokenizer has no chat template"):
        load_text([messages], tokenizer=tokenizer)
    tokenizer.chat_template = CHAT
    prompts = chats(tmp_path, [{"prompt": "w10 w11", "completion": " w12 w13"}])
    both = chats(tmp_path, [{"prompt": talk[:4], "completion": talk[4:]}])

    def learned(source) -> list[int]:
        (row,) = blocks(load_text([source], tokenizer=tokenizer, completion_only=True), tokenizer, length[source])
        assert row["shift_labels"] == [*row["labels"][1:], -100]
        assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"]))
        return [label for label in row["labels"] if label != -100]

    length = {messages: 18, prompts: 5, both: 18}
    assert learned(messages) == [4, 5, 90, 7, 90, 90]  # </s> of an answer, and between documents
    assert learned(prompts) == [12, 13, 90]
    assert learned(both) == [7, 90, 90]
    everything = blocks(load_text([messages], tokenizer=tokenizer), tokenizer, 18)
    assert everything["labels"][:] == everything["input_ids"][:]

    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    with pytest.raises(ValueError, match="writes an answer otherwise once the chat goes on"):
        load_text([messages], tokenizer=tokenizer, completion_only=True)
    tokenizer.chat_template = "{{ raise_exception('no systems') }}"
    with pytest.raises(ValueError, match="chat template refuses a chat: no systems"):
        load_text([messages], tokenizer=tokenizer)


def test_a_step_on_answers_is_a_mean_over_them(pair, tmp_path):
    """Accumulated over batches, or where a block has few answers, some tokens would count more than others."""
    draw = tokens(64, 24).tolist()
    rows = [
        {
            "prompt": " ".join(f"w{t % 90}" for t in row[: 3 + i % 17]),
            "completion": " " + " ".join(f"w{t % 90}" for t in row[3 + i % 17 :]),
        }
        for i, row in enumerate(draw)
    ]
    settings = pair | {"data": (chats(tmp_path, rows),), "tokens": 8 * 16, "completion_only": True}
    parts = distill(Distillation(**settings | {"batch_size": 2, "output": str(tmp_path / "parts")}, accumulation=4))
    whole = distill(Distillation(**settings | {"batch_size": 8, "output": str(tmp_path / "whole")}))
    assert parts["steps"] == whole["steps"] == 1
    one, other = (
        (json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"])
        for name in ("parts", "whole")
    )
    assert _logged(one) == pytest.approx(_logged(other), rel=1e-5)

    teacher, student = (AutoModelForCausalLM.from_pretrained(pair[name]).eval() for name in ("teacher", "student"))
    documents = load_text(list(settings["data"]), completion_only=True)
    held_out = blocks(documents, _tokenizer(pair), 16)[:1]
    learned = torch.tensor(held_out["shift_labels"]) != -100
    ids = torch.tensor(held_out["input_ids"])
    with torch.no_grad():
        p, q = (model(ids).logits.double().softmax(-1) for model in (teacher, student))
    kl = (p * (p / q).log()).sum(-1)
    assert 0 < learned.sum() < learned.numel()
    assert whole["loss_before"] == pytest.approx(kl[learned].mean().item(), rel=1e-3)


def test_two_processes_learn_what_one_does(pair, tmp_path):
    """`accelerate launch` would train as many students as there are processes, and save one of them."""
    pair |= {"tokens": 3 * 4 * 12, "length": 12}  # of whose blocks 4 are held out
    one = distill(Distillation(**pair))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "deltanet_conversion.cli",
        "distill", pair["teacher"], pair["student"], str(tmp_path / "two"), "--data", pair["data"][0],
        "--tokens", "144", "--length", "12", "--batch-size", "2", "--device", "cpu", "--json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads(done.stdout)
    assert (two["steps"], two["trained_tokens"]) == (one["steps"], one["trained_tokens"])
    for folder in (tmp_path / "out", tmp_path / "two"):
        assert not Path(f"{folder}.training").exists()
    histories = [
        json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"] for name in ("out", "two")
    ]
    assert _logged(histories[1]) == pytest.approx(_logged(histories[0]), rel=1e-4)
    assert two["loss_after"] == pytest.approx(one["loss_after"], rel=1e-4)
    assert "find_unused_parameters" not in done.stderr


def _logged(history) -> list[float]:
    return [value for entry in history if "loss" in entry for value in (entry["loss"], entry["grad_norm"])]


def test_text_of_every_kind(tmp_path, tokenizer):
    """A user's data would be refused or read as something else."""
    (tmp_path / "a.txt").write_text("w1 w2\nw3")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.py").write_bytes(b"w4 \xff w5")  # not UTF-8
    (tmp_path / "c.jsonl").write_text('{"body": "w6 w7"}\n{"body": "w8"}\n')
    (tmp_path / "ignored.bin").write_bytes(b"\0")
    texts = load_text([str(tmp_path / "a.txt"), str(tmp_path / "sub"), str(tmp_path / "*.jsonl")], text_column="body")
    assert texts["text"][:] == ["w1 w2\nw3", "w4  w5", "w6 w7", "w8"]
    assert len(load_text([str(tmp_path)], text_column="body")) == 4
    with pytest.raises(ValueError, match="body.*'text'"):
        load_text([str(tmp_path / "c.jsonl")])
    with pytest.raises(ValueError, match="holds no text"):
        load_text([str(tmp_path / "ignored.bin")])
    for name, content, message in (
        ("broken.jsonl", '{"text": "w1"\n', "cannot be read"),
        ("empty.jsonl", "", "cannot be read"),
        ("blank.jsonl", "\n", "cannot be read"),
        ("empty.csv", "", "cannot be read"),
        ("broken.parquet", "x", "cannot be read"),
        ("alpaca.json", '[{"instruction": "w1", "output": ""}]', "has columns instruction, output, but no 'text', no"),
        ("numbers.jsonl", '{"text": 5}', r"has Value\('int64'\) in 'text': wanted texts"),
        ("mixed.jsonl", '{"text": "w1"}\n{"txt": "w1"}', "has no 'text' in 1 of 2 rows"),
        ("messages.jsonl", '{"messages": "w1"}', "has .*wanted texts or lists of messages"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=f"{name} {message}"):
            load_text([str(tmp_path / name)])
    with pytest.raises(ValueError, match=r"no such .*\./typo"):
        load_text(["./typo"])

    rows = blocks(texts, tokenizer, 4, seed=1)["input_ids"][:]
    assert {len(row) for row in rows} == {4} and rows == blocks(texts, tokenizer, 4, seed=1)["input_ids"][:]
    stream = [token for row in rows for token in row]
    assert stream.count(90) >= 2  # documents end
    assert any(stream[i : i + 4] == [1, 2, 3, 90] for i in range(len(stream)))
    with pytest.raises(ValueError, match="do not fill one block of 100 tokens"):
        blocks(texts, tokenizer, 100)
