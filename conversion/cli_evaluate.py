"""The command `deltanet evaluate`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from .cli_output import Result, console, say


def evaluate(
    folder: Annotated[str, typer.Argument(help="Folder with a checkpoint or an adapter.")],
    teacher: Annotated[
        str | None, typer.Option(help="The model it was converted from, measured beside it: folder or repository.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Text it was not trained on, for perplexity: a dataset ('name' or 'name:config'), folder, file or "
            "pattern; may be given several times."
        ),
    ] = None,
    text_column: Annotated[str, typer.Option(help="Column of a dataset that holds the text.")] = "text",
    split: Annotated[str, typer.Option(help="Of a dataset on the Hub.")] = "test",
    length: Annotated[int, typer.Option(help="Tokens per block of the text.", min=2)] = 512,
    blocks: Annotated[int, typer.Option(help="Blocks of the text, at most.", min=1)] = 64,
    recall_lengths: Annotated[
        str | None,
        typer.Option(
            help="Tokens to recall from, such as '256,1024'; up to 4096 or the model's positions by default."
        ),
    ] = None,
    episodes: Annotated[int, typer.Option(help="Texts per length to recall from.", min=1)] = 64,
    batch_size: Annotated[int, typer.Option(help="Blocks at a time.", min=1)] = 4,
    task: Annotated[
        list[str] | None,
        typer.Option(help="Task of lm-evaluation-harness, where that is installed; may be given several times."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Examples per task; all by default.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 0,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; by default bfloat16 on a GPU, float32 on a CPU.")
    ] = None,
    beside: Annotated[
        list[str] | None,
        typer.Option(help="Another model to measure, FOLDER or NAME=FOLDER: each stage, other layers; repeatable."),
    ] = None,
    chats: Annotated[
        list[str] | None,
        typer.Option(
            help="Held-out chats, or prompts with completions: how far greedy answers agree with the teacher's; "
            "pieces of --data by default."
        ),
    ] = None,
    speed_lengths: Annotated[
        str | None,
        typer.Option(help="Also weigh the cache and time a token after so many tokens, such as '1024,8192,32768'."),
    ] = None,
    speed_batch: Annotated[int, typer.Option(help="Texts at once while it is timed.", min=1)] = 1,
    output: Annotated[
        Path | None,
        typer.Option(help="File to write; evaluation.json in the folder, or evaluation-recall.json, by default."),
    ] = None,
) -> Result:
    """Measure a model: perplexity on held-out text, recall by length, distance from its teacher, and tasks.

    Always measured: overwriting recall (8 keys, 3 values each, the last one counts) and needle retrieval (one number
    in a long text). What is measured, and the command, go into the evaluation file that `deltanet card` reads.

    Examples:

        deltanet evaluate runs/mine --data held-out.txt

        deltanet evaluate distilled --teacher a-llama --data wikitext:wikitext-2-raw-v1 --recall-lengths 1024,8192

        deltanet evaluate distilled --teacher a-llama --beside even=hybrid --beside aligned --chats chats.jsonl

        deltanet evaluate distilled --teacher a-llama --speed-lengths 1024,8192,32768 --speed-batch 8

        deltanet evaluate distilled --task arc_easy --task hellaswag --limit 500
    """
    from .evaluate import Evaluation, evaluate_checkpoint

    result = evaluate_checkpoint(
        Evaluation(
            folder, teacher, tuple(data or ()), text_column, split, length, blocks, _lengths(recall_lengths), episodes,
            batch_size, tuple(task or ()), limit, seed, dtype, None if output is None else str(output),
            tuple(beside or ()), tuple(chats or ()), _lengths(speed_lengths, "--speed-lengths"), speed_batch,
        )
    )  # fmt: skip

    def show():
        speed = [{"dataset": row["what"], "metric": row["unit"], **row} for row in result.get("speed", ())]
        rows = [*result["results"], *speed]
        columns = list(dict.fromkeys(row.get("of", "") for row in rows))
        table = Table("", "", *(column or "this model" for column in columns), title=result["hardware"])
        values = {(row["dataset"], row["metric"], row.get("of", "")): row["value"] for row in rows}
        for dataset, metric in dict.fromkeys(key[:2] for key in values):
            cells = (values.get((dataset, metric, column)) for column in columns)
            table.add_row(metric, dataset, *("" if cell is None else f"{cell:,.4g}" for cell in cells))
        console.print(table)
        say(f"{result['output']} is written, for `deltanet card {folder} --repo-id OWNER/NAME`")

    return Result(result, show)


def _lengths(text: str | None, option: str = "--recall-lengths") -> tuple[int, ...]:
    try:
        lengths = tuple(int(length) for length in text.split(",")) if text else ()
    except ValueError:
        lengths = (0,)
    if not all(length > 0 for length in lengths):
        raise ValueError(f"{option} takes numbers of tokens such as '256,1024', got {text!r}")
    return lengths
