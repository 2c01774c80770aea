"""A vLLM plugin: `vllm serve FOLDER` for any DeltaNet that `modeling_deltanet` has saved.

vLLM calls `register` in each of its processes (entry point group `vllm.general_plugins`). It asks for another release
of Transformers than `modeling_deltanet` does, so nothing of that package is imported here.
"""


def register() -> None:
    """Tell Transformers of the configuration, and vLLM of the model, its checks and its operator."""
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.config.compilation import CompilationConfig
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from .checks import ServedDeltaNet
    from .configuration import DeltaNetConfig

    AutoConfig.register(DeltaNetConfig.model_type, DeltaNetConfig, exist_ok=True)
    # By name: importing the model would initialise CUDA before vLLM forks.
    ModelRegistry.register_model("DeltaNetForCausalLM", "vllm_deltanet.model:DeltaNetForCausalLM")
    MODELS_CONFIG_MAP["DeltaNetForCausalLM"] = ServedDeltaNet
    # Compiled graphs are cut at the operator that depends on the batch, as at softmax attention.
    if "vllm::deltanet_mix" not in CompilationConfig._attention_ops:
        CompilationConfig._attention_ops.append("vllm::deltanet_mix")
