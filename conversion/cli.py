"""The command line `deltanet`: each command calls a public function of this package and returns what it found, which
`cli_output.py` shows.
"""

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .cli_output import AsJson, Result, command, say
from .cli_publish import register
from .cli_sample import sample


app = typer.Typer(
    help="DeltaNet checkpoints: convert, sample, align, distill, inspect, generate, export, publish; a check of this "
    "machine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a repository on the Hub.")]


class Target(StrEnum):
    DELTANET = "deltanet"
    FLA = "fla"
    TRANSFORMERS = "transformers"


class Runtime(StrEnum):
    MLX = "mlx"


class DType(StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Device(StrEnum):
    CUDA = "cuda"
    CPU = "cpu"


class Peer(StrEnum):
    FLA = "fla"


def main() -> None:
    """The entry point."""
    app()


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"deltanet {version('modeling-deltanet')}")
        raise typer.Exit


@app.callback()
def deltanet(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@command(app)
def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="Folder, or repository on the Hub: one of fla's DeltaNets, ours, or a Llama-like "
            "(Llama, Mistral, Qwen2, Qwen3); or a GGUF file of the latter."
        ),
    ],
    output: Annotated[Path, typer.Argument(help="Folder to make.")],
    to: Annotated[
        Target,
        typer.Option(
            help="'fla' writes one of our checkpoints in fla's form, 'transformers' a GGUF file as the folder that "
            "align, distill and evaluate take for a teacher."
        ),
    ] = Target.DELTANET,
    keep: Annotated[
        str | None,
        typer.Option(
            help="Required for a Llama-like: the layers that keep softmax attention, 'all', 'none', '0.25' or '25%' "
            "(evenly spaced), '3,7', or 'auto:25%', which measures on the text of --calibrate which are worth most."
        ),
    ] = None,
    linear_rope: Annotated[bool, typer.Option(help="Llama-like: converted layers keep the rotary embedding.")] = True,
    linear_decay: Annotated[
        bool, typer.Option(help="Llama-like: converted layers get a decay (Gated DeltaNet), which starts open.")
    ] = False,
    calibrate: Annotated[
        list[str] | None,
        typer.Option(
            help="Llama-like: text or chats that the converted layers' start is computed from, a dataset ('name' or "
            "'name:config'), folder, file or pattern; may be given several times."
        ),
    ] = None,
    calibration_tokens: Annotated[
        int | None, typer.Option(help="So many tokens of that text; 8192 by default.", min=1)
    ] = None,
    text_column: Annotated[
        str | None, typer.Option(help="Column of a dataset that holds that text; 'text' by default.")
    ] = None,
    dtype: Annotated[DType | None, typer.Option(help="Cast the weights; by default they stay as they are.")] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(help="Of a file of weights, such as '2GB'; by default the source's largest.")
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Also compare the logits of both (fla's need fla and a GPU); exit code 1 if they differ."
        ),
    ] = False,
    revision: Revision = None,
) -> Result:
    """Convert a checkpoint, one shard in memory at a time. All or nothing: a failure leaves no output behind.

    A GGUF file, and with --calibrate the teacher, is held in memory whole.
    The same command, after Ctrl-C, goes on from the layers that '--keep auto' has measured.

    Examples:

        deltanet convert fla-hub/delta_net-1.3B-100B ./delta-1.3B

        deltanet convert ./delta-1.3B ./for-fla --to fla --verify

        deltanet convert HuggingFaceTB/SmolLM2-135M ./hybrid --keep 25%

        deltanet convert ./smollm2.Q4_1.gguf ./hybrid --keep 25%

        deltanet convert ./a-llama ./hybrid --keep auto:25% --calibrate ./texts

        deltanet convert ./smollm2.Q4_1.gguf ./teacher --to transformers
    """
    from .convert import convert_checkpoint

    result = convert_checkpoint(
        source, output, to=to.value, keep=keep, linear_use_rope=linear_rope, dtype=dtype and dtype.value,
        max_shard_size=max_shard_size, verify=verify, revision=revision, linear_use_decay=linear_decay,
        calibrate=tuple(calibrate or ()), calibration_tokens=calibration_tokens, text_column=text_column,
    )  # fmt: skip
    return Result(result, code=int(verify and result["logits"]["verdict"] == "different"))


command(app)(sample)


# What align and distill have in common.
Teacher = Annotated[str, typer.Argument(help="The Llama-like model that was converted: folder or repository.")]
Student = Annotated[str, typer.Argument(help="The converted model: folder or repository.")]
Output = Annotated[Path, typer.Argument(help="Folder to make; OUTPUT.training holds checkpoints until it is done.")]
Data = Annotated[
    list[str],
    typer.Option(
        help="Text or chats: a dataset ('name' or 'name:config'), folder, file or pattern; may be given several times."
    ),
]
Length = Annotated[int, typer.Option(help="Tokens per block.", min=2)]
BatchSize = Annotated[int, typer.Option(help="Blocks per step and device.", min=1)]
Accumulation = Annotated[int, typer.Option(help="Batches per step.", min=1)]
Seed = Annotated[int, typer.Option(help="Of the order of the text and all that is drawn.")]
TextColumn = Annotated[str, typer.Option(help="Column of a dataset that holds the text.")]
SaveSteps = Annotated[
    int | None, typer.Option(help="Steps between checkpoints; a tenth of the stage by default.", min=1)
]
Precision = Annotated[
    DType | None, typer.Option(help="To compute in; by default bfloat16 on a GPU, float32 on a CPU.")
]
Checkpointing = Annotated[
    bool, typer.Option("--activation-checkpointing", help="Less memory: backward computes each layer again.")
]
ReportTo = Annotated[str, typer.Option(help="Where Trainer reports to: 'tensorboard', 'wandb', 'trackio', ...")]
TrainOn = Annotated[Device | None, typer.Option(help="A GPU by default, of several the first one visible.")]
KeepTraining = Annotated[bool, typer.Option("--keep-training", help="Leave OUTPUT.training, with its checkpoints.")]
Compile = Annotated[
    bool, typer.Option("--compile", help="Faster steps: torch.compile, for seconds on a GPU and minutes on a CPU.")
]


@command(app)
def align(
    teacher: Teacher,
    student: Student,
    output: Output,
    data: Data,
    tokens: Annotated[int, typer.Option(help="How many tokens to train on.", min=1)] = 10_000_000,
    length: Length = 512,
    batch_size: BatchSize = 8,
    accumulation: Accumulation = 1,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    seed: Seed = 0,
    text_column: TextColumn = "text",
    save_steps: SaveSteps = None,
    precision: Precision = None,
    activation_checkpointing: Checkpointing = False,
    report_to: ReportTo = "none",
    device: TrainOn = None,
    keep_training: KeepTraining = False,
    compile: Compile = False,
) -> Result:
    """First stage after a conversion: each new mixer learns its teacher layer's attention output.

    Interrupted, the same command goes on from the last checkpoint.

    Example:

        deltanet align ./teacher ./hybrid ./aligned --data ./texts --data wikitext:wikitext-2-raw-v1 --tokens 100000000

    All GPUs of a machine: `accelerate launch -m deltanet_conversion.cli align` and the same arguments.
    """
    from .alignment import align as run
    from .stage import Stage

    stage = Stage(
        teacher, student, str(output), tuple(data), tokens, length, batch_size, accumulation, learning_rate, seed,
        text_column, save_steps, precision and precision.value, activation_checkpointing, report_to,
        device and device.value, keep_training, compile,
    )  # fmt: skip
    return Result(run(stage))


@command(app)
def distill(
    teacher: Teacher,
    student: Student,
    output: Output,
    data: Data,
    tokens: Annotated[int, typer.Option(help="How many tokens to train on.", min=1)] = 30_000_000,
    length: Length = 512,
    batch_size: BatchSize = 8,
    accumulation: Accumulation = 1,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of what the teacher brought.")] = 1e-5,
    mixer_learning_rate: Annotated[
        float, typer.Option(help="Peak learning rate of the new mixers, or of LoRA.")
    ] = 1e-4,
    lora_rank: Annotated[
        int | None, typer.Option(help="Train LoRA of this rank and merge it; needs less memory.")
    ] = None,
    seed: Seed = 0,
    text_column: TextColumn = "text",
    save_steps: SaveSteps = None,
    precision: Precision = None,
    activation_checkpointing: Checkpointing = False,
    report_to: ReportTo = "none",
    device: TrainOn = None,
    completion_only: Annotated[
        bool,
        typer.Option("--completion-only", help="Of chats, and of prompts with completions, learn the answers only."),
    ] = False,
    freeze: Annotated[
        list[str] | None,
        typer.Option(
            help="What stays as it is: 'embeddings', 'mlp', 'attention' (of kept layers) or 'norms'; may be given "
            "several times."
        ),
    ] = None,
    linear_decay: Annotated[
        bool,
        typer.Option(
            "--linear-decay", help="Give the linear layers a decay that starts open: for a stage on long texts."
        ),
    ] = False,
    keep_training: KeepTraining = False,
    compile: Compile = False,
) -> Result:
    """Second stage after a conversion: the whole student learns the teacher's next-token distributions.

    Interrupted, the same command goes on from the last checkpoint.

    Example:

        deltanet distill ./teacher ./aligned ./distilled --data ./texts --tokens 300000000

        deltanet distill ./teacher ./aligned ./distilled --data chats.jsonl --completion-only

    A third stage, on long texts, is another distillation:

        deltanet distill ./teacher ./distilled ./long --data ./books --length 8192 --batch-size 1 --linear-decay
    """
    from .distillation import Distillation
    from .distillation import distill as run

    stage = Distillation(
        teacher, student, str(output), tuple(data), tokens, length, batch_size, accumulation, learning_rate, seed,
        text_column, save_steps, precision and precision.value, activation_checkpointing, report_to,
        device and device.value, keep_training, compile, mixer_learning_rate, lora_rank, completion_only,
        tuple(freeze or ()), linear_decay,
    )  # fmt: skip
    return Result(run(stage))


@command(app)
def inspect(
    source: Annotated[str, typer.Argument(help="Folder, or repository on the Hub.")],
    revision: Revision = None,
) -> Result:
    """Architecture, layer pattern, sizes, parameters and memory of a checkpoint; its weights are not downloaded.

    Example:

        deltanet inspect fla-hub/delta_net-1.3B-100B --json
    """
    from .inspect import inspect_checkpoint

    return Result(inspect_checkpoint(source, revision))


@command(app)
def export(
    source: Annotated[str, typer.Argument(help="Folder, or repository on the Hub, of a model of this family.")],
    output: Annotated[Path, typer.Argument(help="Folder to make.")],
    to: Annotated[Runtime, typer.Option(help="What is to run it: 'mlx' for mlx-lm on a Mac.")],
    revision: Revision = None,
) -> Result:
    """Write a folder that another runtime serves. All or nothing: a failure leaves no output behind.

    Example:

        deltanet export ./distilled ./distilled-mlx --to mlx

        mlx_lm.generate --model ./distilled-mlx --trust-remote-code --prompt "def __init__(self, "
    """
    from .export import export_checkpoint

    return Result(export_checkpoint(source, output, to.value, revision))


@command(app)
def generate(
    source: Annotated[str, typer.Argument(help="Folder, or repository on the Hub; a model or an adapter.")],
    prompt: Annotated[str, typer.Argument(help="What to go on from; '-' reads it from stdin.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.", min=1)] = 100,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.", min=0.0)] = 0.8,
    top_k: Annotated[int, typer.Option(help="Sample among so many; 0 for all.", min=0)] = 50,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    revision: Revision = None,
    as_json: AsJson = False,
) -> Result:
    """Go on from a prompt, token by token as they come.

    Example:

        deltanet generate ./distilled "def __init__(self, " --temperature 0
    """
    from .generate import generate_text

    text = sys.stdin.read() if prompt == "-" else prompt
    result = generate_text(source, text, max_new_tokens, temperature, top_k, seed, revision, stream=not as_json)
    return Result(result, show=lambda: None)  # it was shown as it came


@command(app)
def check(
    everything: Annotated[
        bool, typer.Option("--full", help="All head sizes in all dtypes: an hour of compiling on a GPU; see --jobs.")
    ] = False,
    sizes: Annotated[
        str | None, typer.Option(help="Head sizes, K or KxV, such as '64,32x64'; 'all' for multiples of 16 up to 256.")
    ] = None,
    dtype: Annotated[list[DType] | None, typer.Option(help="May be given several times; all by default.")] = None,
    peer: Annotated[Peer | None, typer.Option(help="Also run another library's functions.")] = None,
    kernels: Annotated[
        str | None,
        typer.Option(help="What to leave out, as DELTANET_KERNELS takes it: 'off', or words such as 'no-gluon'."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="'cuda', 'cuda:1' or 'cpu'; a GPU by default.")] = None,
    seed: Annotated[int, typer.Option(help="Of the inputs.")] = 0,
    jobs: Annotated[int, typer.Option(help="Processes that share the compiling.", min=1)] = 1,
    report: Annotated[
        Path | None,
        typer.Option(
            help="File for the whole report, as --json prints it; attach it to an issue. The same command goes on "
            "with one that was cut off."
        ),
    ] = None,
) -> Result:
    """Does the delta rule compute right on this machine? Every route and gradient against fp64, in about a minute.

    Exit code 0: every error is within its tolerance; 1: one is not, or a route failed.

    Examples:

        deltanet check

        deltanet check --report report.json --peer fla

        deltanet check --sizes 32x64 --dtype bfloat16 --kernels no-gluon,no-segments
    """
    if kernels is not None:
        os.environ["DELTANET_KERNELS"] = kernels  # which is read when the kernels are imported
    from .cli_check import run_check

    dtypes = None if dtype is None else [d.value for d in dtype]
    return run_check(everything, sizes, dtypes, peer and peer.value, device, seed, jobs, report)


@command(app)
def env() -> Result:
    """Versions, device and switches of this machine, for a bug report.

    Example:

        deltanet env
    """
    from .check_run import choose_device, environment

    found = environment(choose_device(None))

    def show():
        for name, value in found.items():
            say(f"{name}: {'-' if value is None else value}")

    return Result(found, show)


register(app)  # card, push, kernels build


if __name__ == "__main__":
    main()
