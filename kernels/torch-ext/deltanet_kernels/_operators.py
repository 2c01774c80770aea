"""What torch.library's operators cannot return, None, as an empty tensor."""

import torch


def empty_for_none(like: torch.Tensor, *tensors: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """The tensors, and on the device of `like` an empty one for each None."""
    return tuple(like.new_empty(0, dtype=torch.float32) if x is None else x for x in tensors)


def none_for_empty(wanted: bool, x: torch.Tensor) -> torch.Tensor | None:
    return x if wanted else None
