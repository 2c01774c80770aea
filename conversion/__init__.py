"""From somebody's checkpoint to a DeltaNet: conversion from and to flash-linear-attention, from Llama-like transformers,
and the two training stages after it. The command line `deltanet` calls these functions.
"""

from .checkpoint import Checkpoint
from .fla import convert_from_fla, convert_to_fla
from .llama import choose_layers, convert_from_llama


__all__ = ["Checkpoint", "choose_layers", "convert_from_fla", "convert_from_llama", "convert_to_fla"]
