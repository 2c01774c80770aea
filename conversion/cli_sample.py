"""The command `deltanet sample`."""

from pathlib import Path
from typing import Annotated

import typer

from .cli_output import Result


def sample(
    teacher: Annotated[str, typer.Argument(help="The model that writes: folder or repository.")],
    output: Annotated[
        Path,
        typer.Argument(help="JSON lines to make; OUTPUT.part and OUTPUT.progress.json lie there until it is done."),
    ],
    tokens: Annotated[int, typer.Option(help="How many tokens to write, prompts included.", min=1)] = 1_000_000,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            help="Text whose pieces it goes on from: a dataset ('name' or 'name:config'), folder, file or pattern; "
            "may be given several times. Without, it makes chats up by its chat template."
        ),
    ] = None,
    text_column: Annotated[str, typer.Option(help="Column of a dataset that holds the text.")] = "text",
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of a piece to go on from.", min=1)] = 32,
    answers: Annotated[
        bool,
        typer.Option(
            "--answers", help="The prompts are chats, or prompts with completions: write the first answer anew."
        ),
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Of a completion or an answer, at most.", min=1)] = 480,
    question_tokens: Annotated[int, typer.Option(help="Of a question that it makes up, at most.", min=1)] = 128,
    temperature: Annotated[float, typer.Option(help="Of the sampling; 1 for the teacher's own distribution.")] = 0.8,
    top_p: Annotated[
        float, typer.Option(help="Sample among the likeliest tokens of so much probability; 1 for all.", max=1.0)
    ] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Texts at a time; on a GPU, a thousand.", min=1)] = 64,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 0,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; by default bfloat16 on a GPU, float32 on a CPU.")
    ] = None,
) -> Result:
    """A model writes its own training text, for align and distill: chats that it makes up, or how texts go on.

    Interrupted, the same command goes on, and the file holds the same lines as without a stop.

    Examples:

        deltanet sample ./teacher chats.jsonl --tokens 20000000 --batch-size 1024

        deltanet sample ./teacher stories.jsonl --prompts ./texts --prompt-tokens 16

        deltanet sample ./teacher answers.jsonl --prompts questions.jsonl --answers

        deltanet distill ./teacher ./aligned ./distilled --data chats.jsonl --completion-only
    """
    from .sample import Sampling, sample_text

    sampling = Sampling(
        teacher, str(output), tokens, tuple(prompts or ()), text_column, prompt_tokens, answers, max_new_tokens,
        question_tokens, temperature, top_p, batch_size, seed, dtype,
    )  # fmt: skip
    return Result(sample_text(sampling))
