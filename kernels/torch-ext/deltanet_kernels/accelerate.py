"""`accelerate` puts these kernels under Transformers' own models with the gated delta rule.

Their modelling files look up four functions by module-level name at each call. Other functions under these names serve
models that exist and models to come, and torch.compile, which guards on the name, compiles again. Whatever the kernels
do not take goes to the function that was there: torch's, or that of another package which Transformers found.

Legend: B batch, T time, D channels, W taps of the convolution, N packed sequences.
"""

import functools
import importlib
import logging
import sys
from collections.abc import Callable

import torch

from . import _switch
from ._checks import DTYPES, INTERPRETED
from .chunk import chunk_gated_delta_rule
from .convolution import _launch_step, _step_op, short_conv
from .limits import LEAST_CAPABILITY, MAX_HEAD_SIZE, MAX_TAPS, MIN_TAPS
from .recurrent import fused_recurrent_gated_delta_rule
from .step import gated_delta_rule_step


__all__ = ["accelerate", "restore"]

logger = logging.getLogger(__name__)

# The packages of `transformers.models` whose gated rule is the same code, and the layer that runs it.
LAYERS = {
    "olmo_hybrid": "OlmoHybridGatedDeltaNet",
    "qwen3_5": "Qwen3_5GatedDeltaNet",
    "qwen3_5_moe": "Qwen3_5MoeGatedDeltaNet",
    "qwen3_next": "Qwen3NextGatedDeltaNet",
    "qwen4_exp": "Qwen4ExpTextGatedDeltaNet",
}
_replaced: dict[str, dict[str, Callable]] = {}  # by package and name, what stood there


def accelerate(model: torch.nn.Module | None = None) -> None:
    """Puts the chunked rule, its single step and the short convolution of this package under models of Transformers.

    The models are Qwen3-Next, Qwen3.5, Qwen3.5-MoE, Qwen4-Exp and OLMo-Hybrid, whichever head they have. Call it once
    per process, at any time: it changes the functions that a modelling file calls, hence all models of that file.
    `restore` undoes it. Calls that the kernels do not take (tensors on a CPU, fp64, heads beyond 256, an export) are
    computed as without it. `DELTANET_KERNELS=off` leaves everything as it is.

    Packed sequences (`cu_seq_lens_q`, or `seq_idx`, in the model's inputs) are kept apart in the rule and in the
    convolution. `position_ids` alone do not reach these layers in Transformers: give both, as
    `DataCollatorWithFlattening(return_flash_attn_kwargs=True)` does.

    Args:
        model: the files of the layers in it, however wrapped (PEFT, DDP, FSDP); None: those of all known models.

    Raises:
        ValueError: there is no known layer in `model`; names its class and the layers that are known.
    """
    packages = LAYERS if model is None else _packages_in(model)
    if "off" in _switch.CHOSEN:
        logger.info("DELTANET_KERNELS=off: Transformers' models stay as they are")
        return
    for package in packages:
        if package in _replaced:
            continue
        module = importlib.import_module(_path(package))
        _replaced[package] = {name: getattr(module, name) for name in _REPLACEMENTS}
        for name, original in _replaced[package].items():
            setattr(module, name, _REPLACEMENTS[name](original))
        logger.info("deltanet_kernels compute %s for %s", ", ".join(_REPLACEMENTS), _path(package))


def restore() -> None:
    """Puts back what `accelerate` replaced."""
    for package in list(_replaced):
        for name, original in _replaced.pop(package).items():
            setattr(sys.modules[_path(package)], name, original)
        logger.info("%s computes as it did without deltanet_kernels", _path(package))


def _path(package: str) -> str:
    return f"transformers.models.{package}.modeling_{package}"


def _packages_in(model: torch.nn.Module) -> list[str]:
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"accelerate takes a torch.nn.Module or None, got {type(model).__name__}")
    # a model has imported its own modelling file
    loaded = {package: sys.modules[_path(package)] for package in LAYERS if _path(package) in sys.modules}
    layers = {package: getattr(module, LAYERS[package]) for package, module in loaded.items()}
    found = [package for package, layer in layers.items() if any(isinstance(x, layer) for x in model.modules())]
    if not found:
        raise ValueError(
            f"accelerate knows Transformers' models with a layer {', '.join(LAYERS.values())}, "
            f"got {type(model).__name__} without one"
        )
    return found


# ------------------------------------------------------------------------------------------- what the kernels take


def refused_tensor(x: torch.Tensor) -> str | None:
    """What the kernels do not take of a call with x among its arguments, or None."""
    if not (x.is_cuda or INTERPRETED):
        return "tensors that are not on a GPU"
    if x.dtype not in DTYPES:
        return "a dtype other than bf16, fp16 and fp32"
    if torch.compiler.is_exporting():
        return "an export, which is to run without them"
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return "transformations of torch.func"
    return _refused_device(x.device.index) if x.is_cuda else None


@torch.compiler.assume_constant_result
def _refused_device(index: int | None) -> str | None:
    return _judged(index)


@functools.cache
def _judged(index: int | None) -> str | None:
    """AMD's GPUs, too, say that they are CUDA devices."""
    if torch.version.hip is not None:
        return "ROCm"
    if torch.cuda.get_device_capability(index) < LEAST_CAPABILITY:
        return f"{torch.cuda.get_device_name(index)}, whose compute capability is below {LEAST_CAPABILITY}"
    return None


def _leave(name: str, x: torch.Tensor, refused: str) -> None:
    """Says once that a call on a GPU goes to what Transformers has; on a CPU that goes without saying."""
    if x.is_cuda and not torch.compiler.is_compiling():  # torch.compile would break the graph there
        _log_once("%s of Transformers computes: the kernels of deltanet_kernels do not take %s", name, refused)


_log_once = functools.cache(logger.warning)


# ------------------------------------------------------------------------------------------------- packed sequences


def _borders(cu_seqlens: torch.Tensor | None, seq_idx: torch.Tensor | None) -> torch.Tensor | None:
    """`[N + 1]`, from `seq_idx` `[1, T]` (the number of each token's sequence) where there is no cu_seqlens.

    To find borders in seq_idx the host waits for the GPU, in each layer.
    """
    if cu_seqlens is not None or seq_idx is None:
        return cu_seqlens
    if seq_idx.shape[0] != 1:
        raise ValueError(f"packed sequences (seq_idx) need one row, got {list(seq_idx.shape)}")
    number = seq_idx[0]
    starts = (number[1:] != number[:-1]).nonzero()[:, 0] + 1
    return torch.cat([starts.new_zeros(1), starts, starts.new_full((1,), number.shape[0])])


# --------------------------------------------------------------------------------- in place of Transformers' functions
# Their names and arguments are Transformers'. A layer passes on all its keyword arguments; Transformers drops those
# that a function does not know, and so do these.


def _rule(compute: Callable, original: Callable) -> Callable:
    """For torch_chunk_gated_delta_rule and torch_recurrent_gated_delta_rule."""

    def gated_delta_rule(query, key, value, g, beta, **options):
        refused = refused_tensor(query)
        if refused is None and max(query.shape[-1], value.shape[-1]) > MAX_HEAD_SIZE:
            refused = "heads of that size"
        if refused is not None:
            _leave(original.__name__, query, refused)
            return original(query, key, value, g=g, beta=beta, **options)
        return compute(
            *(x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value)),
            g=g,
            beta=beta,
            initial_state=options.get("initial_state"),
            output_final_state=options.get("output_final_state", False),
            use_qk_l2norm_in_kernel=options.get("use_qk_l2norm_in_kernel", False),
            cu_seqlens=_borders(options.get("cu_seqlens"), options.get("seq_idx")),
        )

    return gated_delta_rule


def _step(q, k, v, g, beta, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens):
    """A single token changes the state in place, where the layer would copy the new one to; without a gradient."""
    tensors = q, k, v, g, beta, initial_state
    if (
        q.shape[1] == 1
        and output_final_state
        and cu_seqlens is None
        and initial_state is not None
        and initial_state.dtype == torch.float32
        and initial_state.stride(-1) == 1
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
    ):
        o = gated_delta_rule_step(*tensors, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel)
        return o, initial_state
    return fused_recurrent_gated_delta_rule(
        q,
        k,
        v,
        g,
        beta=beta,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        cu_seqlens=cu_seqlens,
    )


def _convolution(original: Callable) -> Callable:
    """For causal_conv1d_fn: x and the result are `[B, D, T]`, views of `[B, T, D]` as the layers pass them."""

    def causal_conv1d_fn(hidden_states, weight, bias=None, activation=None, **options):
        if (refused := _refused_conv(hidden_states, weight, bias, activation)) is not None:
            _leave(original.__name__, hidden_states, refused)
            return original(hidden_states, weight, bias, activation=activation, **options)
        cu_seqlens = _borders(options.get("cu_seq_lens_q"), options.get("seq_idx"))
        if cu_seqlens is not None and cu_seqlens.shape[0] == 2:
            # One sequence needs no borders, and behind a cache's state its tokens are not where they say.
            cu_seqlens = None
        (y,), _ = short_conv([hidden_states.mT], [weight], activation, cu_seqlens=cu_seqlens)
        return y.mT

    return causal_conv1d_fn


def _convolution_step(original: Callable) -> Callable:
    """For causal_conv1d_update: one token, and a state of W inputs where W - 1 would do, changed in place."""

    def causal_conv1d_update(hidden_states, conv_state, weight, bias=None, activation=None):
        W = weight.shape[1]
        refused = _refused_conv(hidden_states, weight, bias, activation)
        inputs = hidden_states, conv_state, weight
        if refused is None and torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
            refused = "a gradient through a decoding step"
        if refused is None and (
            hidden_states.shape[2] != 1
            or conv_state.shape[2] != W
            or conv_state.stride()[1:] != (W, 1)
            or conv_state.dtype != hidden_states.dtype
        ):
            refused = "more than one token, or a state unlike that of Transformers' cache"
        if refused is not None:
            _leave(original.__name__, hidden_states, refused)
            return original(hidden_states, conv_state, weight, bias, activation)
        # With a tap of zero in front, W inputs are the state of the kernel.
        step = _step_op if torch.compiler.is_compiling() else _launch_step
        taps = torch.nn.functional.pad(weight, (1, 0))
        return step([hidden_states.mT], [taps], conv_state, activation == "silu")[0].mT

    return causal_conv1d_update


def _refused_conv(x, weight, bias, activation) -> str | None:
    if bias is not None:
        return "a convolution with a bias"
    if activation not in ("silu", None):
        return "an activation other than SiLU"
    if not MIN_TAPS <= weight.shape[1] <= MAX_TAPS:
        return "a convolution of that many taps"
    return refused_tensor(x)


_REPLACEMENTS = {
    "torch_chunk_gated_delta_rule": functools.partial(_rule, chunk_gated_delta_rule),
    "torch_recurrent_gated_delta_rule": functools.partial(_rule, _step),
    "causal_conv1d_fn": _convolution,
    "causal_conv1d_update": _convolution_step,
}
