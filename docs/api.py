"""Writes `api.md`, the page of all public functions, from their docstrings: `python docs/api.py`."""

import importlib
import inspect
import re
import textwrap
from pathlib import Path

import typer


PAGE = Path(__file__).parent / "api.md"
MODELS = "DeltaNetPreTrainedModel", "DeltaNetModel", "DeltaNetForCausalLM", "DeltaNetForSequenceClassification"
MODELS += ("DeltaNetForTokenClassification",)
SECTIONS = {
    "modeling_deltanet": "The model family. Importing it makes `model_type: deltanet` known to the Auto classes.",
    "modeling_deltanet.delta_rule": "The rule in torch, on any device and in any dtype.",
    "deltanet_kernels": "The rule as Triton kernels, on a GPU; needs torch and triton only.",
    "deltanet_conversion": "What the commands of `deltanet` call.",
}
NAMES = {"modeling_deltanet.delta_rule": ["torch_chunk_delta_rule", "torch_recurrent_delta_rule"]}
MODULES = re.compile(r"\b(?:[A-Za-z_]\w*\.)+(?=[A-Za-z])")
HEAD = """# Public functions

Written by `python docs/api.py` from the docstrings; `help(...)` says the same. Letters in shapes: B batch, T time, H
key heads, HV value heads, K and V their sizes, N sequences.

"""
FAMILY = f"""### Models

{textwrap.fill(", ".join(f"`{name}`" for name in MODELS), 118)}

They take a `DeltaNetConfig` and have the interface of Transformers' models: `from_pretrained`, `save_pretrained`,
`generate` and `forward(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, labels, use_cache,
...)`. [`features.md`](features.md) lists what works.

"""


def signature(function) -> str:
    """`name(arguments) -> result`, without the modules that types come from; over several lines if it is long."""
    found = inspect.signature(function)
    arguments = [MODULES.sub("", str(x)) for x in found.parameters.values() if x.name != "self"]
    after = ")"
    if found.return_annotation is not inspect.Signature.empty:
        after += " -> " + MODULES.sub("", inspect.formatannotation(found.return_annotation))
    line = f"{function.__name__}({', '.join(arguments)}{after}"
    if len(line) < 100:
        return line
    return "\n".join([f"{function.__name__}(", *(f"    {argument}," for argument in arguments), after])


def entry(name: str, found) -> str:
    """A heading, and as Python shows it: the signature, then what the docstring says."""
    if name == "DeltaNetConfig":  # its signature is the list of its fields
        methods = (f"DeltaNetConfig.{definition(method)}" for method in (found.preset, found.hybrid_layer_types))
        shown = "\n\n".join([f'"""{inspect.getdoc(found)}"""', *methods])
    else:
        shown = definition(found)
    return f"### `{name}`\n\n````python\n{shown}\n````\n"


def definition(found) -> str:
    docstring = f'"""{inspect.getdoc(found)}"""'
    return f"{signature(found)}\n{textwrap.indent(docstring, '    ')}"


def commands() -> str:
    """The commands of `deltanet`, with the first sentence of their help."""
    from deltanet_conversion.cli import app

    rows = []
    for name, command in typer.main.get_command(app).commands.items():
        first = re.split(r"(?<=\.)\s", command.help, maxsplit=1)[0].replace("\n", " ")
        rows.append(f"| `deltanet {name}` | {first} |\n")
    return "## Commands\n\n`deltanet COMMAND --help` has arguments and examples.\n\n| | |\n|---|---|\n" + "".join(rows)


def page() -> str:
    parts = [HEAD]
    for module_name, about in SECTIONS.items():
        module = importlib.import_module(module_name)
        names = NAMES.get(module_name) or [name for name in module.__all__ if name not in (*MODELS, "__version__")]
        parts += [f"## {module_name}\n\n{about}\n\n", FAMILY if module_name == "modeling_deltanet" else ""]
        parts += [entry(name, getattr(module, name)) + "\n" for name in names]
    return "".join([*parts, commands()])


if __name__ == "__main__":
    PAGE.write_text(page())
