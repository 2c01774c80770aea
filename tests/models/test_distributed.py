"""More than one process, on the engines that exist: tensor and pipeline parallelism of Transformers, accelerate's DDP and
FSDP2. Each is compared with one process on the same global batch.

`run` starts this file twice, as `torchrun` would (gloo on the loopback device): both processes go through the function
that it names, and what they return comes back by rank. (`device_map` and offload hooks: test_modeling.py.)
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
from accelerate.utils import DistributedType
from tiny import FULL, LINEAR, VARIANTS, tiny_model, tokens
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, DynamicCache, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

import modeling_deltanet
from modeling_deltanet.modeling_deltanet import DeltaNetDecoderLayer


PROCESSES = 2
# fp32, summed in another order: 3e-5 was seen, in logits of standard deviation 6.
TOLERANCE = {"atol": 5e-5, "rtol": 1e-4}


def run(function, folder: Path, *arguments: str) -> list:
    """What `function(folder, *arguments)`, one of this file's, returns in each of two processes."""
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
    command = [sys.executable, __file__, function.__name__, str(folder), *arguments]
    logs = [folder / f"rank{rank}.log" for rank in range(PROCESSES)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            ranked = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with log.open("w") as file:
                processes.append(subprocess.Popen(command, env=ranked, stdout=file, stderr=subprocess.STDOUT))
        codes = [process.wait(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    output = "\n".join(log.read_text() for log in logs)
    assert codes == [0] * PROCESSES, output
    assert "not be applied" not in output and "not applied" not in output, output  # Transformers' word on its plans
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(PROCESSES)]


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
    loss = model.train()(**inputs, labels=x.masked_fill(mask == 0, -100), use_cache=False).loss
    loss.backward()
    return {
        "logits": logits,
        "generated": generated,
        "loss": loss.detach(),
        "gradients": {name: full(p.grad) for name, p in model.named_parameters()},
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


@pytest.fixture(scope="module")
def tensor_parallel(tmp_path_factory):
    """The folder of the saved models, and what each of two processes made of them."""
    folder = tmp_path_factory.mktemp("tensor_parallel")
    for name, overrides in (TENSOR_PARALLEL | INDIVISIBLE).items():
        tiny_model(**overrides).save_pretrained(folder / name)
    return folder, run(use_tensor_parallel, folder)


@pytest.mark.parametrize("variant", TENSOR_PARALLEL)
def test_tensor_parallel_equals_one_process(tensor_parallel, variant):
    """A model that is too large for one device would say, or learn, something else on two."""
    folder, ranks = tensor_parallel
    expected = use(AutoModelForCausalLM.from_pretrained(folder / variant))
    for actual in (rank[variant] for rank in ranks):
        torch.testing.assert_close(actual["logits"], expected["logits"], **TOLERANCE)
        assert all(map(torch.equal, actual["generated"], expected["generated"]))
        torch.testing.assert_close(actual["loss"], expected["loss"], **TOLERANCE)
        assert_same_tensors(actual["gradients"], expected["gradients"], **TOLERANCE)


@pytest.mark.parametrize("variant", TENSOR_PARALLEL)
def test_tensor_parallel_splits_what_is_large(tensor_parallel, variant):
    """Two devices would each hold whole mixers and whole states: the model would need as much memory as on one."""
    folder, ranks = tensor_parallel
    model = AutoModelForCausalLM.from_pretrained(folder / variant)
    for actual in (rank[variant] for rank in ranks):
        for name, size in held(model).items():
            is_whole = "norm" in name or name.endswith("o_proj.bias")
            assert actual["held"][name] == (size if is_whole else size // PROCESSES), name
        heads, K, V = (
            getattr(model.config, f"linear_{field}") for field in ("num_value_heads", "key_head_dim", "value_head_dim")
        )
        assert actual["states"] == [(4, heads // PROCESSES, K, V)] * len(linear_layers(model))


@pytest.mark.parametrize("variant", TENSOR_PARALLEL)
def test_tensor_parallel_saves_a_whole_model(tensor_parallel, variant):
    """A model trained on two devices would be saved as the half that one of them holds."""
    folder, _ = tensor_parallel
    saved, original = (
        dict(AutoModelForCausalLM.from_pretrained(folder / name).named_parameters())
        for name in (f"{variant}-saved", variant)
    )
    assert_same_tensors(saved, original, atol=0, rtol=0)


@pytest.mark.parametrize("name", INDIVISIBLE)
def test_tensor_parallel_refuses_to_split_a_head(tensor_parallel, name):
    """One head over two devices would end in a shape error somewhere in the first forward."""
    _, ranks = tensor_parallel
    for rank in ranks:
        assert rank[name] == f"{name} (1) must be a multiple of the tensor-parallel size (2)"


# Pipeline parallelism: Transformers' engine (5.23) is for inference, it returns no loss.

PIPELINE = {
    "hybrid": {},
    "all_linear": {"layer_types": [LINEAR] * 4},
    "uneven": {"layer_types": [FULL] + [LINEAR] * 2},
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


def test_pipeline_equals_one_process(tmp_path):
    """A model whose layers lie on two devices one after the other would fail, or generate something else."""
    models = {variant: tiny_model(**overrides) for variant, overrides in PIPELINE.items()}
    for variant, model in models.items():
        model.save_pretrained(tmp_path / variant)
    ranks = run(use_pipeline, tmp_path)
    for variant, model in models.items():
        expected_logits, expected_tokens = read_and_generate(model)
        for logits, generated, _ in (rank[variant] for rank in ranks):
            torch.testing.assert_close(logits, expected_logits, **TOLERANCE)
            assert torch.equal(generated, expected_tokens)
        assert sum(rank[variant][2] for rank in ranks) == sum(held(model).values())


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


def learn(folder: Path, engine: str) -> tuple:
    if engine == "fsdp2-transformers":
        plan = DistributedConfig(fsdp_size=PROCESSES)
        model = AutoModelForCausalLM.from_pretrained(folder / "model", distributed_config=plan)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = two_steps(model, optimizer, torch.distributed.get_rank(), PROCESSES)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder / "model")
        plugin = None
        if engine == "fsdp2":
            plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
            )
        accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
        if engine == "fsdp2":
            # accelerate (1.15) takes a plugin for accelerators only, and on CPUs goes on with DDP without a word
            # (AcceleratorState.__init__). From here on it is its own FSDP2, which does work on a CPU.
            accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        rank = accelerator.process_index
        losses = two_steps(model, optimizer, rank, PROCESSES, accelerator.backward, accelerator.clip_grad_norm_)
        model = accelerator.unwrap_model(model)
    return losses, {name: full(p) for name, p in model.named_parameters()}, sum(held(model).values())


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "fsdp2-transformers"])
def test_data_parallel_equals_one_process(tmp_path, engine):
    """More devices would change what a model learns, not only how fast."""
    model = tiny_model(linear_use_output_gate=True, use_qk_norm=True)
    model.save_pretrained(tmp_path / "model")
    size = sum(held(model).values())
    losses = two_steps(model, torch.optim.SGD(model.parameters(), lr=0.1))
    weights = {name: full(p) for name, p in model.named_parameters()}

    ranks = run(learn, tmp_path, engine)
    torch.testing.assert_close(torch.stack([rank[0] for rank in ranks]).mean(0), losses, atol=1e-5, rtol=0)
    for _, actual, numbers in ranks:
        assert_same_tensors(actual, weights, atol=1e-5, rtol=0)
        assert numbers == (size if engine == "ddp" else size // PROCESSES)


def train(folder: Path, batch_size: str) -> tuple[list[float], dict]:
    """Train with the Trainer on examples that have different numbers of labels."""
    examples = []
    for i in range(24):
        ids = tokens(16, seed=i)
        labels = ids.clone()
        labels[: 3 * i % 16] = -100
        examples.append({"input_ids": ids, "labels": labels})
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=int(batch_size), learning_rate=0.1,
        lr_scheduler_type="constant", optim="sgd", max_grad_norm=0.5, logging_steps=1, save_strategy="no",
        report_to="none", use_cpu=True, disable_tqdm=True, seed=3,
    )  # fmt: skip
    trainer = Trainer(model=tiny_model(), args=arguments, train_dataset=examples)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: full(p) for name, p in trainer.model.named_parameters()}


def test_trainer_equals_one_process(tmp_path):
    """A Trainer in two processes would weigh tokens by how many labels their process happened to get."""
    losses, weights = train(tmp_path, "8")
    for actual_losses, actual_weights in run(train, tmp_path, "4"):
        assert actual_losses in ([], pytest.approx(losses, abs=1e-5))  # only the first process keeps a log
        assert_same_tensors(actual_weights, weights, atol=1e-5, rtol=0)
    assert len(losses) == 3


if __name__ == "__main__":
    torch.set_num_threads(1)
    # Both processes compute again in backward what a GPU would; the one that they are compared with keeps everything.
    decide, on_gpu = DeltaNetDecoderLayer._recomputes, SimpleNamespace(is_cuda=True)
    DeltaNetDecoderLayer._recomputes = lambda layer, x, cache: decide(layer, on_gpu, cache)
    result = globals()[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
    torch.save(result, Path(sys.argv[2]) / f"rank{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()
