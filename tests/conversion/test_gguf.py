"""GGUF files as teachers: quantised by the package `gguf`, read by Transformers, and refused by name where they are
not what a conversion needs.
"""

import shutil
import sys

import pytest
import torch
from tiny import FULL, LINEAR, redraw
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config, Qwen3Config
from transformers.convert_slow_tokenizer import bytes_to_unicode

from deltanet_conversion import convert_checkpoint, inspect_checkpoint


gguf = pytest.importorskip("gguf")

SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>"]
VOCABULARY = [*bytes_to_unicode().values(), *SPECIAL, "he", "hel", "lo", "hello", "Ġw"]
MERGES = ["h e", "he l", "l o", "hel lo", "Ġ w"]
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
KINDS = {
    "llama": (LlamaConfig, {}),
    "llama tied, stretched": (LlamaConfig, {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 32}),
}


def write_gguf(file, kind="llama", quantisation="Q8_0", fields=None, tensors=None, drop=()):
    """A tiny model as llama.cpp's converter would write it; returns what it was before it was quantised."""
    config_class, more = KINDS[kind]
    torch.manual_seed(0)
    config = config_class(**{
        "vocab_size": len(VOCABULARY), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 16384,
    } | more)  # fmt: skip
    model = redraw(AutoModelForCausalLM.from_config(config)).eval()
    architecture, head_dim = config.model_type, getattr(config, "head_dim", None) or 16
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_key_length(head_dim)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in VOCABULARY])
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(VOCABULARY.index("<|end|>"))
    writer.add_eot_token_id(VOCABULARY.index("<|user|>"))
    writer.add_chat_template(TEMPLATE)
    for key, value in (fields or {}).items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    state = {n: x for n, x in model.state_dict().items() if not (config.tie_word_embeddings and n == "lm_head.weight")}
    weights = {names.get_name(name, try_suffixes=(".weight", ".bias")): x for name, x in state.items()}
    if architecture == "llama":  # llama.cpp rotates neighbouring channels
        for name, x in weights.items():
            if ".attn_q." in name or ".attn_k." in name:
                weights[name] = x.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)
    if kind == "llama tied, stretched":
        plain = 1e4 ** -(torch.arange(0, 16, 2) / 16)
        weights["rope_freqs.weight"] = plain / model.model.rotary_emb.inv_freq
    for name, x in (weights | (tensors or {})).items():
        if name in drop:
            continue
        kind_of_it = gguf.GGMLQuantizationType[quantisation if x.ndim == 2 and x.shape[1] % 32 == 0 else "F32"]
        writer.add_tensor(name, gguf.quantize(x.numpy(), kind_of_it), raw_dtype=kind_of_it)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.mark.parametrize("kind, quantisation", [("llama", "Q8_0"), ("qwen2", "Q4_1"), ("llama", "F16")])
@torch.no_grad()
def test_with_every_layer_kept_the_student_is_transformers_own_load(tmp_path, kind, quantisation):
    """A student of a GGUF file would differ from its teacher before a layer was exchanged: heads whose channels are
    permuted as llama.cpp does, biases dropped, or weights of another precision.
    """
    write_gguf(tmp_path / "model.gguf", kind, quantisation)
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
    result = convert_checkpoint(tmp_path / "model.gguf", tmp_path / "student", keep="all", verify=True)
    assert (result["from"], result["to"], result["logits"]["verdict"]) == (kind, "deltanet", "equal")
    ids = torch.randint(len(VOCABULARY), (2, 40))
    wanted = teacher(ids).logits
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "student")(ids).logits
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    assert wanted.std() > 0.1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "student"]


@pytest.mark.parametrize("kind", ["llama tied, stretched", "qwen3"])
@torch.no_grad()
def test_what_transformers_passes_over_is_read(tmp_path, kind):
    """Llama 3's stretched rotation, or a head size that is not the default, would be lost without a word."""
    model = write_gguf(tmp_path / "model.gguf", kind, "F32")
    convert_checkpoint(tmp_path / "model.gguf", tmp_path / "teacher", to="transformers")
    ids = torch.randint(len(VOCABULARY), (1, 3000))
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")(ids, logits_to_keep=100).logits
    torch.testing.assert_close(got, model(ids, logits_to_keep=100).logits, atol=1e-4, rtol=1e-4)


def test_tokenizer_and_chat_template_travel(tmp_path):
    """A converted chat model could not be talked to, or would not stop."""
    write_gguf(tmp_path / "model.gguf")
    convert_checkpoint(tmp_path, tmp_path / "teacher", to="transformers")
    convert_checkpoint(tmp_path, tmp_path / "student", keep="50%", dtype="bfloat16")
    wanted = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    chat = [{"role": "user", "content": "hello w orld 12"}]
    for folder in (tmp_path / "teacher", tmp_path / "student"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        assert text == "<|user|>hello w orld 12<|end|><|assistant|>"
        ids = tokenizer(text).input_ids
        assert ids == wanted(text).input_ids and VOCABULARY.index("hello") in ids
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.generation_config.eos_token_id == [VOCABULARY.index("<|end|>"), VOCABULARY.index("<|user|>")]
    found = inspect_checkpoint(tmp_path / "student")
    assert found["layers"] == {LINEAR: 2, FULL: 2} and set(found["parameters_by_dtype"]) == {"bfloat16"}
    with pytest.raises(ValueError, match="several GGUF files, name one: copy.gguf, model.gguf"):
        shutil.copy(tmp_path / "model.gguf", tmp_path / "copy.gguf")
        convert_checkpoint(tmp_path, tmp_path / "out", keep="50%")


def test_wrong_files_are_refused_by_name(tmp_path):
    """Half a model, or one that ours cannot be, would be converted to something that talks nonsense."""
    file = tmp_path / "wrong.gguf"

    def refused(*words, **options):
        with pytest.raises(ValueError) as error:
            convert_checkpoint(file, tmp_path / "out", **({"keep": "50%"} | options))
        assert all(word in str(error.value) for word in ("wrong.gguf", *words)), error.value
        assert [path.name for path in tmp_path.iterdir()] == ["wrong.gguf"]

    write_gguf(file)
    content = file.read_bytes()
    for damaged in (b"", b"PK\3\4" + content, content[:20_000], content[:3000], content[: len(content) // 2]):
        file.write_bytes(damaged)
        refused(f"{len(damaged):,} bytes")
    file.write_bytes(content.replace(b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0llama",
                                     b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0gemma"))  # fmt: skip
    refused("'gemma'", "llama, qwen2, qwen3")
    for options, words in (
        ({"drop": ("blk.2.attn_k.weight",)}, ("lacks blk.2.attn_k.weight",)),
        ({"tensors": {"blk.1.attn_q.bias": torch.zeros(64)}}, ("blk.1.attn_q.bias",)),
        ({"tensors": {"blk.1.attn_q.weight": torch.zeros(32, 64)}}, ("blk.1.attn_q.weight", "[64, 64]", "[32, 64]")),
        ({"fields": {"llama.rope.scaling.type": "yarn"}}, ("'yarn'",)),
        ({"fields": {"llama.attention.sliding_window": 4096}}, ("sliding_window 4096",)),
        ({"fields": {"split.count": 3}}, ("one of 3 files",)),
        ({"tensors": {"rope_freqs.weight": torch.linspace(1, 7, 8)}}, ("rope_freqs.weight",)),
    ):
        write_gguf(file, **options)
        refused(*words)
    write_gguf(file)
    refused("keep (--keep) must say", keep=None)
    refused("written for Transformers", to="transformers")
    with pytest.raises(ValueError, match="--verify"):
        convert_checkpoint(file, tmp_path / "out", to="transformers", verify=True)
    refused("local file", revision="main")
    with pytest.raises(
        ValueError, match="wrong.gguf is a file.*`deltanet convert wrong.gguf FOLDER --to transformers`"
    ):
        inspect_checkpoint(file)
    with pytest.raises(ValueError, match="no GGUF file"):
        convert_checkpoint(make_llama(tmp_path), tmp_path / "out", to="transformers")


def make_llama(folder):
    write_gguf(folder / "llama.gguf")
    convert_checkpoint(folder / "llama.gguf", folder / "llama", to="transformers")
    return folder / "llama"


def test_without_the_package_it_is_named(tmp_path, monkeypatch):
    """A user would read of an internal function's failed import."""
    write_gguf(tmp_path / "model.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match="pip install gguf"):
        convert_checkpoint(tmp_path / "model.gguf", tmp_path / "out", keep="50%")
