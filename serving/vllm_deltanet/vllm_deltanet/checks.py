"""What vLLM can be asked for that this plugin does not do: refused by name, before anything is loaded."""

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from .configuration import FULL, LINEAR, SLIDING


# By length, a request's angles would change under those of the requests beside it.
CHANGING_ROPES = ("dynamic", "longrope")


class ServedDeltaNet(VerifyAndUpdateConfig):
    """vLLM calls this once, in the process of the user, with all that the user has asked for."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        model, cache = vllm_config.model_config, vllm_config.cache_config
        parallel, config = vllm_config.parallel_config, model.hf_config
        if model.runner_type != "generate":
            _refuse("runner", model.runner_type, "generate: there is no pooling or classification")
        if vllm_config.speculative_config is not None:
            _refuse("speculative decoding", vllm_config.speculative_config.method, "none")
        if cache.mamba_ssm_cache_dtype not in ("auto", "float32"):
            _refuse("mamba_ssm_cache_dtype", cache.mamba_ssm_cache_dtype, "float32, in which states are kept")
        if cache.mamba_cache_dtype != "auto":
            _refuse(
                "mamba_cache_dtype", cache.mamba_cache_dtype, "auto: a convolution's inputs have the model's dtype"
            )
        if cache.mamba_cache_mode not in ("none", "align"):
            _refuse("mamba_cache_mode", cache.mamba_cache_mode, "none or align")
        if config.uses_rope and config.rope_parameters["rope_type"] in CHANGING_ROPES:
            _refuse(
                "rope_type", config.rope_parameters["rope_type"],
                "one whose angles do not change with the length of a request",
            )  # fmt: skip
        if LINEAR not in config.layer_types and SLIDING in config.layer_types:
            _refuse("layer_types", config.layer_types, f"a {LINEAR} layer, or none but {FULL}")
        _check_heads(config, parallel.tensor_parallel_size)
        _check_softmax_head(config)
        if current_platform.is_cpu() and vllm_config.lora_config is not None and vllm_config.lora_config.max_loras < 2:
            _refuse(
                "max_loras", vllm_config.lora_config.max_loras,
                "at least 2 on a CPU, and more than there are adapters: vLLM 0.32 applies the adapter in the last "
                "place there to requests without one, too",
            )  # fmt: skip
        if current_platform.is_cpu() and parallel.pipeline_parallel_size > 1 and model.enforce_eager:
            _refuse(
                "enforce_eager", True, "False for a pipeline on a CPU, whose later stages vLLM 0.32 only then prepares"
            )
        dim = 2 * config.linear_num_key_heads * config.linear_key_head_dim
        dim = (dim + config.linear_num_value_heads * config.linear_value_head_dim) // parallel.tensor_parallel_size
        taps = config.linear_conv_kernel_dim
        if taps is not None and (taps - 1) * dim % 2 and model.dtype != torch.float32:
            _refuse("dtype", model.dtype, f"float32: the {dim} channels of a convolution are odd in number")
        # States in fp32 whatever the model's dtype. vLLM reads it here when it counts the memory that they take.
        cache.mamba_ssm_cache_dtype = "float32"


def _check_heads(config, tp_size: int) -> None:
    names = []
    if LINEAR in config.layer_types:
        names += ["linear_num_key_heads"]  # the value heads are a multiple
    if set(config.layer_types) != {LINEAR}:
        names += ["num_attention_heads"]
        kv_heads = config.num_key_value_heads
        if kv_heads % tp_size and tp_size % kv_heads:
            _refuse("tensor_parallel_size", tp_size, f"a divisor or multiple of num_key_value_heads ({kv_heads})")
    for name in names:
        if getattr(config, name) % tp_size:
            _refuse("tensor_parallel_size", tp_size, f"a divisor of {name} ({getattr(config, name)})")


def _check_softmax_head(config) -> None:
    if not current_platform.is_cpu() or set(config.layer_types) == {LINEAR}:
        return
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    sizes = CPUAttentionBackend.get_supported_head_sizes()
    if config.head_dim not in sizes:
        _refuse("head_dim", config.head_dim, f"one of {', '.join(map(str, sizes))}: vLLM's softmax attention on a CPU")


def _refuse(what: str, came: object, wanted: str) -> None:
    raise ValueError(f"vllm-deltanet does not support {what} = {came!r}: it must be {wanted}")
