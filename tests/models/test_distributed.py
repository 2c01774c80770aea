"""More than one process, on the engines that exist: tensor and pipeline parallelism of Transformers, accelerate's DDP
and FSDP2. Each is compared with one process on the same global batch.

`run` starts this file twice, as `torchrun` would (gloo on the loopback device): both processes go through the
functions that it names, and what they return comes back by rank. (`device_map` and offload hooks: test_modeling.py.)

Two starts in all, because each takes many times as long as what it is for: one for Transformers' engines and one for
accelerate's, whose state is the process's.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from tiny import FULL, LINEAR, VARIANTS, output_and_gradients, tiny_model, tokens
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, DynamicCache, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

import modeling_deltanet
from modeling_deltanet.modeling_deltanet import DeltaNetDecoderLayer


PROCESSES = 2
# fp32, summed in another order: 3e-5 was seen, in logits of standard deviation 6.
TOLERANCE = {"atol": 5e-5, "rtol": 1e-4}


def run(folder: Path, *functions) -> list[dict]:
    """function -> what `function(folder)`, one of this file's, returns; of each of two processes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(PROCESSES),
        "LOCAL_WORLD_SIZE": str(PROCESSES),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(Path(modeling_deltanet.__file__).parents[1]),
    }
    command = [sys.executable, __file__, str(folder), *(function.__name__ for function in functions)]
    logs = [folder / f"rank{rank}.log" for rank in range(PROCESSES)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            ranked = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with log.open("w") as file:
                processes.append(subprocess.Popen(command, env=ranked, stdout=file, stderr=subprocess.STDOUT))
        codes = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    output = "\n".join(log.read_text() for log in logs)
    assert codes == [0] * PROCESSES, output
    assert "not be applied" not in output and "not applied" not in output, output  # Transformers' word on its plans
    ranks = [torch.load(folder / f"rank{rank}.pt") for rank in range(PROCESSES)]
    return [{function: results[function.__name__] for function in functions} for results in ranks]


def full(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a whole tensor, whose parts may lie in several processes."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def held(model) -> dict[str, int]:
    """How many numbers of each parameter this process holds."""
    parameters = model.named_parameters()
    return {name: (p.to_local() if isinstance(p, DTensor) else p).numel() for name, p in parameters}


def assert_same_tensors(actual: dict, expected: dict, **tolerance) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, **tolerance, msg=lambda m, name=name: f"{name}: {m}")


# Tensor parallelism

TENSOR_PARALLEL = {
    "hybrid": {},
    "all_linear": {"layer_types": [LINEAR] * 3, "linear_use_output_gate": True, "tie_word_embeddings": True},
    "grouped_value_heads": VARIANTS["grouped_value_heads"] | {"linear_use_output_gate": True},
    "decay": VARIANTS["decay"],
    "fixed_beta": {"layer_types": [LINEAR] * 2, "linear_use_beta": False},
    "no_convolution": {"layer_types": [LINEAR, FULL], "linear_conv_kernel_dim": None},
    "softmax_extras": VARIANTS["softmax_extras"],
}
INDIVISIBLE = {
    "linear_num_key_heads": {"linear_num_key_heads": 1, "linear_num_value_heads": 4},
    "num_key_value_heads": {"num_key_value_heads": 1},
}


def use(model) -> dict:
    """What one would do with a model: read a padded batch, generate, and learn."""
    x, mask = tokens(4, 14), torch.ones(4, 14, dtype=torch.long)
    mask[1, :5] = mask[3, :2] = 0
    inputs = {"input_ids": x, "attention_mask": mask}
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        logits = model.eval()(**inputs, past_key_values=cache).logits
        generated = [model.generate(**inputs, max_new_tokens=6, do_sample=False, num_beams=n) for n in (1, 3)]
    labels = x.masked_fill(mask == 0, -100)
    output, gradients = output_and_gradients(model.train(), **inputs, labels=labels)
    return {
        "logits": logits,
        "generated": generated,
        "loss": output.loss.detach(),
        "gradients": {name: full(gradient) for name, gradient in gradients.items()},
        "held": held(model),
        "states": [tuple(cache.layers[i].recurrent_states[0].shape) for i in linear_layers(model)],
    }


def linear_layers(model) -> list[int]:
    return [i for i, layer_type in enumerate(model.config.layer_types) if layer_type == LINEAR]


def use_tensor_parallel(folder: Path) -> dict:
    results = {}
    for variant in TENSOR_PARALLEL:
        plan = DistributedConfig(tp_plan="auto")
        model = AutoModelForCausalLM.from_pretrained(folder / variant, distributed_config=plan)
        results[variant] = use(model)
        model.save_pretrained(folder / f"{variant}-saved")
    for name in INDIVISIBLE:
        with pytest.raises(ValueError) as error:
            AutoModelForCausalLM.from_pretrained(folder / name, distributed_config=DistributedConfig(tp_plan="auto"))
        results[name] = str(error.value)
    return results


@pytest.mark.parametrize("variant", TENSOR_PARALLEL)
def test_tensor_parallel_equals_one_process(transformers_engines, variant):
    """A model that is too large for one device would say, or learn, something else on two."""
    folder, ranks = transformers_engines
    expected = use(AutoModelForCausalLM.from_pretrained(folder / variant))
    for actual in (rank[use_tensor_parallel][variant] for rank in ranks):
        torch.testing.assert_close(actual["logits"], expected["logits"], **TOLERANCE)
        assert all(map(torch.equal, actual["generated"], expected["generated"]))
        torch.testing.assert_close(actual["loss"], expected["loss"], **TOLERANCE)
        assert_same_tensors(actual["gradients"], expected["gradients"], **TOLERANCE)


@pytest.mark.parametrize("variant", TENSOR_PARALLEL)
def test_tensor_parallel_splits_what_is_large(transformers_engines, variant):
    """Two devices would each hold whole mixers and whole states: the model would need as much memory as on one."""
    folder, ranks = transformers_engines
    model = AutoModelForCausalLM.from_pretrained(folder / variant)
    for actual in (rank[use_tensor_parallel][variant] for rank in ranks):
        for name, size in held(model).items():
            is_whole = "norm" in name or name.endswith("o_proj.bias")
            assert actual["held"][name] == (size if is_whole else size // PROCESSES), name
        heads, K, V = (
            getattr(model.config, f"linear_{field}") for field in ("num_value_heads", "key_head_dim", "value_head_dim")
        )
        assert actual["states"] == [(4, heads // PROCESSES, K, V)] * len(linear_layers(model))


@pytest.mark.parametrize("variant", TENSOR_PARALLEL)
def test_tensor_parallel_saves_a_whole_model(transformers_engines, variant):
    """A model trained on two devices would be saved as the half that one of them holds."""
    folder, _ = transformers_engines
    saved, original = (
        dict(AutoModelForCausalLM.from_pretrained(folder / name).named_parameters())
        for name in (f"{variant}-saved", variant)
    )
    assert_same_tensors(saved, original, atol=0, rtol=0)


@pytest.mark.parametrize("name", INDIVISIBLE)
def test_tensor_parallel_refuses_to_split_a_head(transformers_engines, name):
    """One head over two devices would end in a shape error somewhere in the first forward."""
    _, ranks = transformers_engines
    for rank in ranks:
        assert rank[use_tensor_parallel][name] == f"{name} (1) must be a multiple of the tensor-parallel size (2)"


# Pipeline parallelism: Transformers' engine (5.23) is for inference, it returns no loss.

PIPELINE = {
    "pipeline-hybrid": {},
    "pipeline-all_linear": {"layer_types": [LINEAR] * 4},
    "pipeline-uneven": {"layer_types": [FULL] + [LINEAR] * 2},
}


def read_and_generate(model) -> tuple[torch.Tensor, torch.Tensor]:
    x, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    inputs = {"input_ids": x, "attention_mask": mask}
    with torch.no_grad():
        return model.eval()(**inputs).logits, model.generate(**inputs, max_new_tokens=8, do_sample=False)


def use_pipeline(folder: Path) -> dict:
    results = {}
    for variant in PIPELINE:
        plan = DistributedConfig(pp_size=PROCESSES)
        model = AutoModelForCausalLM.from_pretrained(folder / variant, distributed_config=plan)
        results[variant] = *read_and_generate(model), sum(held(model).values())
    return results


def test_pipeline_equals_one_process(transformers_engines):
    """A model whose layers lie on two devices one after the other would fail, or generate something else."""
    folder, ranks = transformers_engines
    for variant in PIPELINE:
        model = AutoModelForCausalLM.from_pretrained(folder / variant)
        expected_logits, expected_tokens = read_and_generate(model)
        for logits, generated, _ in (rank[use_pipeline][variant] for rank in ranks):
            torch.testing.assert_close(logits, expected_logits, **TOLERANCE)
            assert torch.equal(generated, expected_tokens)
        assert sum(rank[use_pipeline][variant][2] for rank in ranks) == sum(held(model).values())


# Data parallelism: the loop that a user of accelerate writes


def two_steps(
    model, optimizer, share=0, shares=1, backward=torch.Tensor.backward, clip=torch.nn.utils.clip_grad_norm_
):
    """The losses of two training steps on this process's share of the batch."""
    losses = []
    for step in range(2):
        x = tokens(4, 12, seed=step).chunk(shares)[share]
        loss = model.train()(x, labels=x, use_cache=False).loss
        backward(loss)
        clip(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


DATA_PARALLEL = {"linear_use_decay": True, "linear_use_output_gate": True, "use_qk_norm": True}


def learned(losses, model) -> tuple:
    return losses, {name: full(p) for name, p in model.named_parameters()}, sum(held(model).values())


def learn_fsdp2_transformers(folder: Path) -> tuple:
    plan = DistributedConfig(fsdp_size=PROCESSES)
    model = AutoModelForCausalLM.from_pretrained(folder / "data_parallel", distributed_config=plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return learned(two_steps(model, optimizer, torch.distributed.get_rank(), PROCESSES), model)


def learn_ddp(folder: Path, plugin: FullyShardedDataParallelPlugin | None = None) -> tuple:
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    if plugin is not None:
        # accelerate (1.15) takes a plugin for accelerators only, and on CPUs goes on with DDP without a word
        # (AcceleratorState.__init__). From here on it is its own FSDP2, which does work on a CPU.
        accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    model = AutoModelForCausalLM.from_pretrained(folder / "data_parallel")
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    rank = accelerator.process_index
    losses = two_steps(model, optimizer, rank, PROCESSES, accelerator.backward, accelerator.clip_grad_norm_)
    return learned(losses, accelerator.unwrap_model(model))


def learn_fsdp2(folder: Path) -> tuple:
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    return learn_ddp(folder, plugin)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "fsdp2-transformers"])
def test_data_parallel_equals_one_process(request, engine):
    """More devices would change what a model learns, not only how fast."""
    engines, learn = {
        "ddp": ("accelerate_engines", learn_ddp),
        "fsdp2": ("accelerate_engines", learn_fsdp2),
        "fsdp2-transformers": ("transformers_engines", learn_fsdp2_transformers),
    }[engine]
    folder, ranks = request.getfixturevalue(engines)
    model = AutoModelForCausalLM.from_pretrained(folder / "data_parallel")
    size = sum(held(model).values())
    losses = two_steps(model, torch.optim.SGD(model.parameters(), lr=0.1))
    weights = {name: full(p) for name, p in model.named_parameters()}

    ranks = [rank[learn] for rank in ranks]
    torch.testing.assert_close(torch.stack([rank[0] for rank in ranks]).mean(0), losses, atol=1e-5, rtol=0)
    for _, actual, numbers in ranks:
        assert_same_tensors(actual, weights, atol=1e-5, rtol=0)
        assert numbers == (size if engine == "ddp" else size // PROCESSES)


def train(folder: Path, batch_size: int) -> tuple[list[float], dict]:
    """Train with the Trainer on examples that have different numbers of labels."""
    examples = []
    for i in range(24):
        ids = tokens(16, seed=i)
        labels = ids.clone()
        labels[: 3 * i % 16] = -100
        examples.append({"input_ids": ids, "labels": labels})
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=batch_size, learning_rate=0.1,
        lr_scheduler_type="constant", optim="sgd", max_grad_norm=0.5, logging_steps=1, save_strategy="no",
        report_to="none", use_cpu=True, disable_tqdm=True, seed=3,
    )  # fmt: skip
    trainer = Trainer(model=tiny_model(), args=arguments, train_dataset=examples)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: full(p) for name, p in trainer.model.named_parameters()}


def train_half_batches(folder: Path) -> tuple[list[float], dict]:
    AcceleratorState._reset_state(reset_partial_state=True)
    return train(folder / "trainer", 4)


def test_trainer_equals_one_process(accelerate_engines, tmp_path):
    """A Trainer in two processes would weigh tokens by how many labels their process happened to get."""
    _, ranks = accelerate_engines
    losses, weights = train(tmp_path, 8)
    for actual_losses, actual_weights in (rank[train_half_batches] for rank in ranks):
        assert actual_losses in ([], pytest.approx(losses, abs=1e-5))  # only the first process keeps a log
        assert_same_tensors(actual_weights, weights, atol=1e-5, rtol=0)
    assert len(losses) == 3


# What two processes make of the saved models, by rank, beside the folder of the models


@pytest.fixture(scope="module")
def transformers_engines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transformers_engines")
    for name, overrides in (TENSOR_PARALLEL | INDIVISIBLE | PIPELINE | {"data_parallel": DATA_PARALLEL}).items():
        tiny_model(**overrides).save_pretrained(folder / name)
    return folder, run(folder, use_tensor_parallel, use_pipeline, learn_fsdp2_transformers)


@pytest.fixture(scope="module")
def accelerate_engines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("accelerate_engines")
    tiny_model(**DATA_PARALLEL).save_pretrained(folder / "data_parallel")
    return folder, run(folder, learn_ddp, learn_fsdp2, train_half_batches)


if __name__ == "__main__":
    torch.set_num_threads(1)
    # Both processes compute again in backward what a GPU would; the one that they are compared with keeps everything.
    decide, on_gpu = DeltaNetDecoderLayer._recomputes, SimpleNamespace(is_cuda=True)
    DeltaNetDecoderLayer._recomputes = lambda layer, x, cache: decide(layer, on_gpu, cache)
    folder, *functions = sys.argv[1:]
    results = {name: globals()[name](Path(folder)) for name in functions}
    torch.save(results, Path(folder) / f"rank{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()
