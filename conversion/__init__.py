"""From somebody's checkpoint to a DeltaNet: conversion from and to flash-linear-attention, from Llama-like
transformers, the two training stages after it, and a look at what came out. The command line `deltanet` calls these
functions.
"""

import importlib


# Imported when first asked for: `deltanet --help` need not wait for torch, nor a conversion for datasets.
_MODULES = {
    "Calibration": "calibrate",
    "Checkpoint": "checkpoint",
    "Distillation": "distillation",
    "Evaluation": "evaluate",
    "Sampling": "sample",
    "Stage": "stage",
    "align": "alignment",
    "choose_layers": "llama",
    "convert_checkpoint": "convert",
    "convert_from_fla": "fla",
    "convert_from_llama": "llama",
    "convert_to_fla": "fla",
    "distill": "distillation",
    "evaluate_checkpoint": "evaluate",
    "export_checkpoint": "export",
    "generate_text": "generate",
    "inspect_checkpoint": "inspect",
    "logit_difference": "verify",
    "sample_text": "sample",
}
__all__ = list(_MODULES)


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
