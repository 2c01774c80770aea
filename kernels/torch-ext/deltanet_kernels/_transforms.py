"""What `torch.func` makes of a tensor has no memory of its own that a kernel could be given."""

import torch


def refuse_transforms(function: str) -> None:
    """Raise where a transformation of `torch.func` is at work; torch itself speaks of a method that is missing here."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise ValueError(
            f"{function} cannot be transformed by torch.func (grad, vmap, jacrev, ...), since its kernels need tensors with "
            "memory: use torch.autograd, or the delta rule in torch's own operators"
        )
