"""The commands `deltanet evaluate`, `deltanet card`, `deltanet push` and `deltanet kernels build`; for exit codes see
`cli_output.py`.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal
from rich.table import Table

from .cli_evaluate import evaluate
from .cli_output import Result, command, console, errors, say


def register(app: typer.Typer) -> None:
    """Add the publishing commands to a command line."""
    command(app)(evaluate)
    command(app)(card)
    command(app)(push)
    kernels = typer.Typer(help="Build the Triton kernels as a kernel of the Hub.", no_args_is_help=True)
    command(kernels, "build")(kernels_build)
    app.add_typer(kernels, name="kernels")


def card(
    checkpoint: Annotated[Path, typer.Argument(help="Folder with a checkpoint or an adapter.")],
    repo_id: Annotated[str, typer.Option(help="Repository that it will be published to, owner/name.")],
    evaluation: Annotated[
        list[Path] | None, typer.Option(help="Evaluation file, repeatable; evaluation*.json of the folder by default.")
    ] = None,
    trainer_state: Annotated[
        Path | None, typer.Option(help="trainer_state.json; the folder's own by default.")
    ] = None,
    conversion: Annotated[Path | None, typer.Option(help="conversion.json; the folder's own by default.")] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of an adapter's base, or of what it was made from.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Title; the repository's name by default.")] = None,
    summary: Annotated[str | None, typer.Option(help="What it is, in a sentence or two.")] = None,
    training: Annotated[
        str | None, typer.Option(help="How it was trained, beside what trainer_state.json tells.")
    ] = None,
    limits: Annotated[str | None, typer.Option(help="What it is not good for.")] = None,
    license: Annotated[str | None, typer.Option(help="The Hub's name of the licence, such as apache-2.0.")] = None,
    language: Annotated[list[str] | None, typer.Option(help="Language code, repeatable.")] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="Dataset trained on, repeatable.")] = None,
    template: Annotated[Path | None, typer.Option(help="Another Jinja template.")] = None,
    output: Annotated[Path | None, typer.Option(help="File to write; README.md in the folder by default.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a card that exists, edits included.")] = False,
) -> Result:
    """Write the model card of a checkpoint or adapter, from its files.

    Figures come from evaluation files (lm-evaluation-harness's, or JSON with "command" and "results"): one without the
    command that made it is refused, and what was not measured is said to be so. Texts that are not given are marked
    [More Information Needed], which `deltanet push` refuses: edit the card, it is yours. PEFT's empty card beside an
    adapter is replaced.

    \b
    deltanet card runs/mine --repo-id me/mine --license apache-2.0 --summary "A small DeltaNet."
    deltanet card runs/mine --repo-id me/mine --evaluation results.json
    deltanet card runs/lora --repo-id me/mine-lora --base-model me/mine --license apache-2.0 --force
    """
    from .card import MISSING, make_card, write_card
    from .card_check import is_stub

    _check_folder(checkpoint)
    file = output or checkpoint / "README.md"
    if file.exists() and not force and not is_stub(file.read_text(encoding="utf-8")):
        raise ValueError(f"{file} exists and may have been edited: --force replaces it")
    made = make_card(
        checkpoint,
        repo_id,
        title=title,
        summary=summary,
        license=license,
        language=language,
        datasets=dataset,
        base_model=base_model,
        training=training,
        limits=limits,
        evaluations=evaluation,
        trainer_state=trainer_state,
        conversion=conversion,
        template=template,
    )
    write_card(made, file)
    to_fill = [i for i, line in enumerate(made.content.splitlines(), start=1) if MISSING in line]
    figures = made.data.eval_results or []
    has_recall = any("recall" in f"{x.dataset_name} {x.metric_type}".lower() for x in figures)

    def show():
        say(f"{file}: {len(figures)} figures in its metadata")
        if to_fill:
            say(f"To be filled in by you: line {', '.join(map(str, to_fill))}")
        if not has_recall:
            say(f"Recall was not measured: `deltanet evaluate {checkpoint}` does")

    return Result({"card": str(file), "figures": len(figures), "lines_to_fill_in": to_fill}, show)


def push(
    folder: Annotated[Path, typer.Argument(help="Folder with a checkpoint or an adapter, and its README.md.")],
    repo_id: Annotated[str, typer.Argument(help="Repository, owner/name; made if it does not exist.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Validate and show what would be sent; send nothing.")
    ] = False,
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private; a public one is refused.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to, made if it does not exist.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")] = False,
    base_model: Annotated[
        str | None, typer.Option(help="An adapter's base on the Hub, instead of a local folder.")
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(help="Send what would be left out or asked about: 'wandb', '*.csv'; may be given several times."),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Leave it out: 'notes', '*.gguf'; may be given several times.")
    ] = None,
    message: Annotated[str, typer.Option(help="The commit's message.")] = "Upload by `deltanet push`",
) -> Result:
    """Publish a checkpoint or an adapter on the Hub, in one commit.

    First the folder is validated: it loads by its own code and generates a token, the card is complete, no file holds
    a secret or a path of this machine. What is wrong is listed by file and line. Logs and checkpoints of a training
    are left out; data and big files that no model needs are asked about: --include, --exclude. Then what has changed
    is sent in one commit, pulled back, and compared by hash. A push that fails leaves the branch as it was; give the
    command again. Content that was uploaded already is not sent twice.

    \b
    deltanet push runs/mine me/mine --dry-run
    deltanet push runs/mine me/mine --private
    deltanet push runs/mine me/mine --revision step-2000
    deltanet push runs/mine somebody/theirs --create-pr
    deltanet push runs/lora me/mine-lora --base-model me/mine
    deltanet push runs/mine me/mine --include examples.csv --exclude notes
    """
    from huggingface_hub import constants

    from .push import HubUnreachable, prepare, preview, publish

    _check_folder(folder)
    with errors.status("Loading it and generating a token ..."):
        plan = prepare(folder, repo_id, base_model=base_model, include=include or (), exclude=exclude or ())
    if dry_run:
        changes = None
        if not constants.HF_HUB_OFFLINE:
            try:
                changes = preview(plan, revision=revision)
            except HubUnreachable as error:
                errors.print(f"Not compared with the Hub: {error}", markup=False, highlight=False, soft_wrap=True)
        return _planned(plan, changes)
    done = publish(plan, private=private, revision=revision, create_pr=create_pr, message=message)

    def show():
        if not done.sent:
            say(f"{done.url} holds all of it already, at {done.commit}: nothing was sent")
            return
        sent = len(done.changes.new) + len(done.changes.changed)
        say(f"{done.url} at {done.commit}: {sent} files sent, {done.verified} pulled back and equal")
        for name in done.changes.removed:
            say(f"  removed there: {name}, weights of an earlier push")
        if done.pull_request:
            say(f"  {done.pull_request}")

    return Result(dataclasses.asdict(done), show)


def kernels_build(
    source: Annotated[Path, typer.Option(help="The kernel project, with build.toml and torch-ext/.")] = Path(
        "kernels"
    ),
    output: Annotated[Path | None, typer.Option(help="Folder to make; SOURCE/build by default.")] = None,
    repo_id: Annotated[str | None, typer.Option(help="Repository for the card, instead of build.toml's.")] = None,
) -> Result:
    """Assemble the kernel project into the form that the `kernels` package loads.

    \b
    deltanet kernels build
    python -c "from kernels import get_local_kernel; from pathlib import Path;
    print(get_local_kernel(Path('kernels')))"
    """
    from .hub_kernel import build

    _check_folder(source)
    built = [str(variant) for variant in build(source, output, repo_id=repo_id)]
    return Result({"variants": built}, lambda: say("\n".join(built)))


def _check_folder(path: Path) -> None:
    if not path.is_dir():
        raise ValueError(f"{path} is a file: wanted a folder" if path.exists() else f"no such folder: {path}")


def _planned(plan, changes) -> Result:
    content = {
        "repo_id": plan.repo_id,
        "kind": plan.kind,
        "bytes": plan.size,
        "files": {name: {"bytes": c.size, "sha256": c.sha256} for name, c in plan.files.items()},
        "left_out": plan.left_out,
        "changes": None if changes is None else dataclasses.asdict(changes),
        "loaded": plan.loaded,
    }

    def show():
        what = {} if changes is None else {name: k for k, names in vars(changes).items() for name in names}
        title = f"{plan.kind} for {plan.repo_id}: {decimal(plan.size)}, nothing sent"
        table = Table("file", "size", "on the Hub", title=title)
        for name, file in plan.files.items():
            table.add_row(name, decimal(file.size), what.get(name, "not compared"))
        for name in [] if changes is None else changes.removed:
            table.add_row(name, "", "to be removed: weights of an earlier push")
        for name, reason in plan.left_out.items():
            table.add_row(name, "", f"left out: {reason}", style="dim")
        console.print(table)
        say(f"It loads as {plan.loaded['class']}, {plan.loaded['parameters']:,} parameters.")

    return Result(content, show)
