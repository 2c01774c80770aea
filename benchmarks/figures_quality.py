"""Tables and pictures of `quality/`'s results, for `figures.py`: each function takes what files hold."""

from collections import defaultdict

import numpy as np


def markdown(head: list[str], rows: list[list]) -> str:
    lines = [f"| {' | '.join(map(str, line))} |" for line in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]]) + "\n"


def spread(values, places: int = 3) -> str:
    """The mean of several runs and, in brackets, the least and the greatest; one run is a number."""
    mean, *ends = (f"{x:.{places}f}" for x in (np.mean(values), min(values), max(values)))
    return mean if len(values) == 1 else f"{mean} [{', '.join(ends)}]"


def by(rows: list[dict], *names: str) -> dict[tuple, list[dict]]:
    """Rows by the values of some of their fields, in the order in which they come."""
    found = defaultdict(list)
    for row in rows:
        found[tuple(row[name] for name in names)].append(row)
    return dict(found)


# ---------------------------------------------------------------------------------------- overwriting, state tracking


def overwriting_recall(record: dict) -> str:
    rows = [row for row in record["rows"] if row["task"] == "overwriting recall"]
    table = [
        [model, found[0]["parameters"], spread([row["accuracy"]["all"] for row in found])]
        for (model,), found in by(rows, "model").items()
    ]
    return markdown(["model", "parameters", f"right answers, {_seeds(rows)}"], table)


def state_tracking(record: dict) -> str:
    rows = [row for row in record["rows"] if row["task"] != "overwriting recall"]
    lengths = list(rows[0]["accuracy"])
    table = [
        [task, model, *(spread([row["accuracy"][length] for row in found]) for length in lengths)]
        for (task, model), found in by(rows, "task", "model").items()
    ]
    return markdown(["task", f"model, {_seeds(rows)}", *(f"{length} tokens" for length in lengths)], table)


def _seeds(rows: list[dict]) -> str:
    return f"{len({row['seed'] for row in rows})} seeds"


def plot_evidence_cpu(record: dict, axes) -> None:
    left, right = axes
    rows = [row for row in record["rows"] if row["task"] == "overwriting recall"]
    models = by(rows, "model")
    for i, found in enumerate(models.values()):
        right_answers = [row["accuracy"]["all"] for row in found]
        left.bar(i, np.mean(right_answers), alpha=0.6)
        left.plot([i] * len(right_answers), right_answers, "k.")
    left.set(title="overwriting recall", ylabel="right answers", ylim=(0, 1.05))
    left.set_xticks(range(len(models)), [model.replace(" ", "\n", 1) for (model,) in models])
    rows = [row for row in record["rows"] if row["task"] != "overwriting recall"]
    for (task, model), found in by(rows, "task", "model").items():
        lengths = list(map(int, found[0]["accuracy"]))
        means = [np.mean([row["accuracy"][str(length)] for row in found]) for length in lengths]
        beta = "beta to 2" if "to 2" in model else "beta to 1"
        right.plot(lengths, means, marker="o", ls="-" if "to 2" in model else "--", label=f"{task}, {beta}")
    right.set_xscale("log", base=2)
    right.set(title="state tracking, learned from 32 tokens", xlabel="tokens", ylim=(0, 1.05))
    right.legend(loc="center right", bbox_to_anchor=(1, 0.78), ncol=2, fontsize="small")


# --------------------------------------------------------------------------------------------------------------- MQAR


def _best_rates(record: dict) -> dict[tuple, list[float]]:
    """Accuracy of each seed at the learning rate that is best for the model there, the same for all seeds."""
    found = {}
    for key, rows in by(record["rows"], "length", "width", "model").items():
        rates = {rate: [row["accuracy"] for row in each] for (rate,), each in by(rows, "lr").items()}
        most = max(map(len, rates.values()))
        found[key] = max((x for x in rates.values() if len(x) == most), key=np.mean)
    return found


def mqar(record: dict) -> str:
    best = _best_rates(record)
    models = list(dict.fromkeys(model for _, _, model in best))
    pairs = {row["length"]: row["pairs"] for row in record["rows"]}
    table = [
        [f"{pairs[length]} in {length}, {width}", *(_cell(best.get((length, width, model))) for model in models)]
        for length, width in sorted({key[:2] for key in best}, reverse=True)
    ]
    return markdown(["pairs in tokens, width", *models], table)


def _cell(values: list[float] | None) -> str:
    return "-" if values is None else spread(values)


def plot_mqar(record: dict, axes) -> None:
    best, left, right = _best_rates(record), *axes
    for axis, fixed, along in ((left, 1, 0), (right, 0, 1)):
        place = max(key[0] for key in best) if fixed == 0 else 64
        for model in dict.fromkeys(model for _, _, model in best):
            points = sorted(
                (key[along], np.mean(x)) for key, x in best.items() if key[2] == model and key[fixed] == place
            )
            axis.plot(*zip(*points), marker="o", label=model)
        axis.set_xscale("log", base=2)
        axis.set(ylim=(0, 1.05))
    left.set(title="width 64", xlabel="tokens", ylabel="right answers")
    right.set(title=f"{max(key[0] for key in best)} tokens", xlabel="width")
    right.legend()


# ---------------------------------------------------------------------------------------------------- language models


def language_models(record: dict) -> str:
    rows = by(record["rows"], "model")
    tasks = LOCAL_TASKS if any("tasks" in row for row in record["rows"]) else ()
    quality = [
        [
            model,
            f"{found[0]['parameters'] / 1e6:.1f}M",
            f"{found[0]['lr']:g}",
            *(spread([row[key] for row in found], 2) for key in PERPLEXITIES),
            spread([row["multiple_choice"] for row in found]),
            *(f"{found[0]['tasks'][task]:.3f}" if "tasks" in found[0] else "-" for task in tasks),
            *(" / ".join(f"{np.mean(x):.2f}" for x in _by_length(found, task)) for task in ("needle", "overwriting")),
        ]
        for (model,), found in rows.items()
    ]
    lengths = {task: " / ".join(record["rows"][0].get(task, {})) for task in ("needle", "overwriting")}
    head = ["model", "parameters", "learning rate", "perplexity", "of recalled tokens", "of others", "choice of 4"]
    head += [*tasks, f"needle in {lengths['needle']}", f"overwriting in {lengths['overwriting']}"]
    cost = [
        [
            model,
            f"{np.mean([row['tokens_per_second'] for row in found]) / 1e3:.0f}K",
            found[0].get("peak_GB", "-"),
            *(f"{x['ms']:.2f}" if "ms" in x else "-" for x in found[0]["decoding"]),
            *(f"{x['cache_bytes_per_text'] / 1e6:.2f}" for x in found[0]["decoding"]),
        ]
        for (model,), found in rows.items()
    ]
    contexts = [x["context"] for x in record["rows"][0]["decoding"]]
    costs = ["model", "training, tokens/s", "peak, GB", *(f"ms per token after {x}" for x in contexts)]
    costs += [f"cache after {x}, MB per text" for x in contexts]
    return markdown(head, quality) + "\n" + markdown(costs, cost)


LOCAL_TASKS = "cloze", "continuation", "value"  # of lm-evaluation-harness, see `quality/local_tasks.py`
PERPLEXITIES = "perplexity", "perplexity_recalled", "perplexity_others"


def _by_length(found: list[dict], task: str) -> list[list[float]]:
    return [[row[task][length] for row in found] for length in found[0].get(task, {})]


def plot_language_models(record: dict, axes) -> None:
    left, right = axes
    for (model,), found in by(record["rows"], "model").items():
        places = list(found[0]["perplexity_by_position"])
        values = [np.mean([row["perplexity_by_position"][place] for row in found]) for place in places]
        left.plot([int(place.split()[-1]) for place in places], values, marker="o", label=model)
        contexts = found[0]["decoding"]
        right.plot([x["context"] for x in contexts], [x["cache_bytes_per_text"] / 1e6 for x in contexts], marker="o")
    for axis in axes:
        axis.set_xscale("log", base=2)
    left.set(title="held-out perplexity", xlabel="position in the text, up to", yscale="log")
    left.legend()
    right.set(title="cache of one text, MB", xlabel="tokens", yscale="log")


# ---------------------------------------------------------------------------------------------- a converted chat model


def smollm2(record: dict) -> str:
    """Of each figure the teacher's, and after each stage that of the students with chosen / evenly spaced layers."""
    found = {}
    for row in record["rows"]:
        found.setdefault((row["metric"], row["data"]), {})[row["of"], row["layers"]] = row["value"]
    layers, stages = list(record["stages"]), list(dict.fromkeys(row["of"] for row in record["rows"]))

    def cell(values, of):
        shown = [f"{values[of, x]:.{3 if values[of, x] < 10 else 1}f}" for x in layers if (of, x) in values]
        return " / ".join(dict.fromkeys(shown) if of == "teacher" else shown) or "-"

    table = [[f"{metric}: {data}", *(cell(values, of) for of in stages)] for (metric, data), values in found.items()]
    return markdown([f"layers {' / '.join(layers)}", *stages], table)


def plot_layer_worth(record: dict, axes) -> None:
    for axis, key, title in zip(axes, ("once", "again"), ("text read once", "the same text, read once more")):
        axis.bar([row["layer"] for row in record["rows"]], [row[key] for row in record["rows"]])
        axis.set(title=title, xlabel="softmax layer that is made linear")
    axes[0].set_ylabel("KL to the teacher, nats per token")


# ----------------------------------------------------------------------------------------------------- token by token


def plot_token_by_token(record: dict, axes) -> None:
    rows = [{"d": row["shape"][3], **row} for row in record["rows"]]
    for axis, key, what in zip(axes, ("fwd_ms", "fwdbwd_ms"), ("forward", "forward + backward")):
        for (d,), found in sorted(by(rows, "d").items()):
            points = [
                (row["shape"][1], row["results"]["token by token"][key] / row["results"]["ours"][key]) for row in found
            ]
            axis.plot(*zip(*points), marker="o", label=f"heads of {d}")
        axis.axhline(30, color="gray", ls=":", label="the paper at 16384: over 30")
        axis.set_xscale("log", base=2)
        axis.set(title=what, xlabel="sequence length", ylabel="times faster")
    axes[0].legend()
