"""What a user waits for: importing the package and starting a command cost what Transformers costs, and no more."""

import os
import subprocess
import sys

from transformers import LlamaConfig, LlamaForCausalLM


LIBRARIES = """
import sys
print(*sorted({name.split(".")[0] for name in sys.modules}))
"""
COMMANDS = """
import sys
from deltanet_conversion.cli import app
for command in sys.argv[1].split(";"):
    app(command.split(), standalone_mode=False)
"""


def run(code: str, *arguments: str, **options) -> list[str]:
    """The lines that a process with this code prints; it fails, or says anything on stderr, and the test fails."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, **options)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_the_import_brings_in_what_transformers_does():
    """PEFT, bitsandbytes and Liger take seconds and print lines: whoever generates would wait for them."""
    imports = "from transformers import LlamaForCausalLM", "import modeling_deltanet"
    theirs, ours = run("".join(line + LIBRARIES for line in imports))
    more = set(ours.split()) - set(theirs.split())
    assert {name for name in more if "editable" not in name} <= {"deltanet_kernels", "modeling_deltanet", "triton"}


def test_help_waits_for_nothing():
    """`deltanet --help` would take as long as a model to load, and so would completion in a shell."""
    *shown, libraries = run(COMMANDS + LIBRARIES, "--help;convert --help;inspect --help")
    assert any("Usage" in line for line in shown)
    assert not {"torch", "transformers", "peft", "bitsandbytes", "liger_kernel"} & set(libraries.split())


def test_convert_and_inspect_bring_in_neither_peft_nor_what_peft_does(tmp_path):
    """A conversion of seconds would wait longer for libraries that it does not use."""
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=99
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "teacher")
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    commands = "convert teacher student --keep none --json;inspect student --json"
    *_, libraries = run(COMMANDS + LIBRARIES, commands, cwd=tmp_path, env=offline)
    assert not {"peft", "bitsandbytes", "liger_kernel", "datasets", "trl"} & set(libraries.split())
