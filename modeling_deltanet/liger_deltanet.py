"""Liger's Triton kernels in a DeltaNet, if one asks for them: `TrainingArguments(use_liger_kernel=True)`, as for
Llama.

They save memory in training: the loss is computed without ever holding the logits of all tokens, and SwiGLU's
gradients take the place of its inputs. And time: torch's norm of [32768, 2048] in bf16 takes 0.23 ms on an H200, 3.6
times what its bytes need (commit ecb2d9f).
"""

import functools
from types import MethodType

import torch.nn as nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from .cache_deltanet import CACHE_NAME


def apply_liger_kernel_to_deltanet(
    fused_linear_cross_entropy: bool = True, rms_norm: bool = True, swiglu: bool = True, model=None
) -> None:
    """Change `model`, a DeltaNet of any kind, in place; the arguments are those of Liger's own functions.

    Raises:
        ValueError: no model: the classes themselves are not changed.
    """
    if model is None:
        raise ValueError("apply_liger_kernel_to_deltanet needs a model, got None")
    # (Remote code may import what is not installed only within a `try`.)
    try:
        from liger_kernel.transformers.functional import liger_rms_norm, liger_swiglu
    except ImportError as error:
        raise ImportError(f"apply_liger_kernel_to_deltanet needs the package liger-kernel: {error}") from error
    if rms_norm:
        for norm in (module for module in model.modules() if hasattr(module, "rms_norm")):
            # In place, Liger would overwrite the gradient that comes in, which may be somebody else's too.
            norm.rms_norm = functools.partial(liger_rms_norm, in_place=False)
    if swiglu and model.config.hidden_act in ("silu", "swish"):
        for layer in getattr(model, model.base_model_prefix, model).layers:
            layer.mlp.glu = liger_swiglu
    if fused_linear_cross_entropy and hasattr(model, "lm_head"):
        model.forward = MethodType(_without_logits(type(model).forward), model)


def _without_logits(forward):
    """`forward` of a causal language model, but in training it returns the loss alone, without the logits."""

    try:
        from liger_kernel.transformers.model.loss_utils import LigerForCausalLMLoss
    except ImportError as error:
        raise ImportError(f"Liger's loss needs the package liger-kernel: {error}") from error

    @functools.wraps(forward)  # the Trainer reads the signature
    def forward_without_logits(model, *args, labels=None, skip_logits=None, **kwargs):
        # The Trainer asks for `skip_logits` where it evaluates nothing but the loss. The loss reads the head's weight:
        # an adapter on it would do nothing.
        skip_logits = model.training if skip_logits is None else skip_logits
        if not skip_logits or labels is None or type(model.lm_head) is not nn.Linear:
            return forward(model, *args, labels=labels, **kwargs)
        kwargs.pop("logits_to_keep", None)
        return_dict = kwargs.pop("return_dict", None)
        outputs = model.model(*args, **kwargs)
        loss = LigerForCausalLMLoss(
            hidden_states=outputs.last_hidden_state,
            lm_head_weight=model.lm_head.weight,
            labels=labels,
            hidden_size=model.config.hidden_size,
            **kwargs,
        )
        result = CausalLMOutputWithPast(
            loss=loss,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )
        return result.to_tuple() if return_dict is False else result

    return forward_without_logits
