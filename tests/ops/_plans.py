"""Plans as tests want them."""

import dataclasses

import torch
from deltanet_kernels import plan


CALL = {
    "arch": 90, "sms": 132, "B": 1, "T": 70, "H": 2, "HV": 2, "K": 128, "V": 128, "packed": False,
    "dtype": torch.bfloat16, "gradients": True, "can_cut": True, "aligned": True, "gated": False,
}  # fmt: skip


def call(**fields) -> plan.Call:
    """On an H100, a short sequence of two heads of 128, unless `fields` say otherwise."""
    fields = CALL | {"sequences": fields.get("B", CALL["B"])} | fields
    if "HV" in fields and fields["HV"] % fields["H"]:
        fields["H"] = 1
    return plan.Call(**fields)


def decide_anew(monkeypatch, **changed) -> None:
    """Changes names of `plan.py`; what was decided before does not count."""
    for name, value in changed.items():
        monkeypatch.setattr(plan, name, value)
    monkeypatch.setattr(plan, "plan_of", getattr(plan.plan_of, "__wrapped__", plan.plan_of))


def change_plans(monkeypatch, **fields) -> None:
    """Every plan gets these fields."""
    decide = getattr(plan.plan_of, "__wrapped__", plan.plan_of)
    monkeypatch.setattr(plan, "plan_of", lambda call: dataclasses.replace(decide(call), **fields))
