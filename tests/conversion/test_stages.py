"""Alignment and distillation at a size of seconds: they learn, touch what they should, and go on after a stop."""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file
from test_llama import make_teacher
from tiny import LINEAR, tokens
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from deltanet_conversion import Distillation, Stage, align, convert_from_llama, distill
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


@pytest.mark.parametrize("how", ["crash", "Ctrl-C"])
def test_a_stage_goes_on_from_its_last_checkpoint(pair, tmp_path, monkeypatch, how):
    """A run that was stopped would begin anew, or go on with other data and end somewhere else."""
    pair |= {"save_steps": 5}
    whole = align(Stage(**pair | {"output": str(tmp_path / "whole")}))

    def crash():
        raise RuntimeError("the machine went away")

    from deltanet_conversion import alignment

    trainer = alignment.Trainer
    stop = StopAt(7, crash if how == "crash" else lambda: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr(
        alignment, "Trainer", lambda **kwargs: trainer(**kwargs | {"callbacks": [*kwargs["callbacks"], stop]})
    )
    with pytest.raises((RuntimeError, KeyboardInterrupt), match="went away|step 8"):
        align(Stage(**pair))
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(alignment, "Trainer", trainer)
    resumed = align(Stage(**pair))
    assert resumed["resumed"] and resumed["steps"] == 20
    assert resumed["loss_before"] == whole["loss_before"] and resumed["loss_after"] == whole["loss_after"]
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "out")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_settings_that_do_not_fit_are_refused(pair, tmp_path):
    """A stage would go on from another run's checkpoint, replace a checkpoint, or train on a pair that is none."""
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="there already"):
        align(Stage(**pair))
    (tmp_path / "out").rmdir()
    work = tmp_path / "out.training"
    work.mkdir()
    (work / "settings.json").write_text('{"seed": 1}')
    with pytest.raises(ValueError, match='other settings.*"seed": 1'):
        align(Stage(**pair))
    (work / "settings.json").unlink()
    with pytest.raises(ValueError, match="student must be a deltanet, got 'qwen3'"):
        align(Stage(**pair | {"student": pair["teacher"]}))
    make_teacher("qwen3", tmp_path / "other", hidden_size=48)
    with pytest.raises(ValueError, match="hidden_size 32, the teacher 48"):
        align(Stage(**pair | {"teacher": str(tmp_path / "other"), "output": str(tmp_path / "out2")}))
    convert_from_llama(pair["teacher"], tmp_path / "all", keep="all")
    with pytest.raises(ValueError, match="nothing to align"):
        align(Stage(**pair | {"student": str(tmp_path / "all"), "output": str(tmp_path / "out3")}))


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

    rows = blocks(texts, tokenizer, 4, seed=1)["input_ids"][:]
    assert {len(row) for row in rows} == {4} and rows == blocks(texts, tokenizer, 4, seed=1)["input_ids"][:]
    stream = [token for row in rows for token in row]
    assert stream.count(90) >= 2  # documents end
    assert any(stream[i : i + 4] == [1, 2, 3, 90] for i in range(len(stream)))
    with pytest.raises(ValueError, match="do not fill one block of 100 tokens"):
        blocks(texts, tokenizer, 100)
