"""Writes the measured tables of the documentation from the files under results/.

    python benchmarks/figures.py                       # write them anew, in all of the project's Markdown
    python benchmarks/figures.py --plot                # and the pictures

A table stands between `<!-- figures: NAME -->` and `<!-- /figures -->`; what is between them comes from the function
`NAME` below. To show a new measurement, put its file under results/, name it in FILES, and exchange the name in
RUNS. `tests/test_figures.py` refuses a figure that has no file, and a table that is not what its file says.
"""

import argparse
import json
import re
from functools import cache
from pathlib import Path

import figures_quality
from figures_quality import markdown


ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- /figures -->)", re.DOTALL)

# Which files a table shows. Several: the range over these runs.
RUNS = {
    "rule_h100": ["h100_ops", "h100_ops_17d4db3", "h100_ops_c4f9cfe", "h100_ops_366bcd6", "h100_ops_a5cd198"],
    "rule_h200": ["h200_ops"],
    "long_rows": ["h100_long_rows"],
    "errors": ["h200_ops", "h100_ops"],
    "gated": ["h100_gated_c00b2f0", "h100_gated_a8a5fdf", "h100_gated"],  # of a shape the first that has it
    "gated_beside_fla": ["h100_gated_errors_324b91e", "h100_gated_errors"],  # of a case the first that has it
    "accelerate": ["h100_accelerate_a5cd198", "h100_accelerate"],
    "pools": ["h100_pools", "h100_pools_gated"],
    "kernels": ["h200_kernels"],
    "lengths": ["h100_lengths"],
    "token_by_token": ["h100_token_by_token"],
    "segments": ["h100_segments"],
    "step": ["h200_step"],
    "train": ["h200_train"],
    "train_gated": ["h100_train_gated"],
    "decode": ["h200_decode_model"],
    "parity": ["fla_parity", "h200_fla_parity_gated"],
    "cpu": ["cpu"],
    "memory": ["convert_memory"],
    "evidence_cpu": ["evidence_cpu"],
    "smollm2": ["h100_smollm2"],
    "mqar": [],
    "language_models": ["h100_language_models"],
}
# What each file holds, and whether it was measured with the kernels as they were before c4f9cfe rewrote the package.
FILES = {
    "h200_ops": ("chunked rule beside fla, errors", True),
    "h100_ops": ("the same, and softmax attention", True),
    "h100_ops_17d4db3": ("chunked rule beside fla and an older commit", False),
    "h100_ops_c4f9cfe": ("the same after the rewrite, four shapes beside fla", False),
    "h100_ops_f9b106b": ("the six shapes beside the commit before the rewrite", False),
    "h100_ops_366bcd6": ("d = 64 and 256 beside fla", False),
    "h100_ops_a5cd198": ("the six shapes, ours alone", False),
    "h100_gated": ("the gated rule, five shapes and its errors, without a peer", False),
    "h100_gated_a8a5fdf": ("the gated rule beside fla and FlashQLA, four shapes", False),
    "h100_gated_c00b2f0": ("the same, one sequence of 32768 tokens", False),
    "h100_gated_errors": ("errors of the gated rule over those of fla, 16 draws of each case", False),
    "h100_gated_errors_324b91e": ("the same where the caller normalises keys, and of heads of 96 by 192", False),
    "h100_accelerate": ("a prompt in Transformers' own models by torch, fla and ours", False),
    "h100_accelerate_a5cd198": ("training of Transformers' own models by fla and ours", False),
    "h100_pools": ("states found in a pool against copied ones", False),
    "h100_pools_gated": ("the same of the gated rule", False),
    "h100_check_full": ("`deltanet check --full --peer fla`, the largest errors", False),
    "h200_kernels": ("each kernel beside its bytes", True),
    "h100_lengths": ("by sequence length, with a picture", True),
    "h100_long_rows": ("one long sequence of any length", True),
    "h100_segments": ("every number of segments, in CUDA graphs", True),
    "h100_token_by_token": ("chunked against token by token", False),
    "h100_sizes": ("errors of 2304 cases of head sizes", False),
    "h200_small_beta": ("dbeta of a small beta, few keys, beside fla", False),
    "h100_ptxas": ("a fault of ptxas 12.8, trial by trial", False),
    "h200_step": ("one decode step beside fla", True),
    "h200_train": ("training of models of 1.3B", True),
    "h100_train_gated": ("training of a model of 1.3B with and without the gate", False),
    "h200_decode_model": ("`generate` of models of 1.3B", True),
    "fla_parity": ("fla's models, converted, against ours", True),
    "h200_fla_parity_gated": ("the same of gated ones", False),
    "cpu": ("the torch rule on two cores", False),
    "convert_memory": ("peak memory of a conversion", False),
    "h100_smollm2": ("SmolLM2-135M-Instruct as a hybrid, chosen and evenly spaced layers", False),
    "h100_language_models": ("language models of 30M, four of seven", False),
    "layer_worth": ("what each softmax layer of SmolLM2-135M-Instruct is worth", False),
    "smollm2_untrained": ("SmolLM2-135M-Instruct as a hybrid before training, by choice of layers", False),
    "evidence_cpu": ("overwriting recall and state tracking, models trained on a CPU", False),
}
# What the rows of `rule_h200` set out for, as multiples of fla: forward, forward + backward.
AIMS = {
    (8, 4096, 16, 128): (3.5, 2.8),
    (1, 32768, 16, 128): (3, 2.5),
    (1, 131072, 16, 128): (3, 2.5),
    (1, 4096, 16, 128): (4, 6),
    (8, 4096, 32, 64): (4, 3),
    (8, 4096, 8, 256): (2.5, 2),
}
FORWARD, BOTH = "fwd_ms", "fwdbwd_ms"


@cache
def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def runs(table: str) -> list[dict]:
    return [load(name) for name in RUNS[table]]


def hardware(record: dict) -> str:
    found = record.get("gpu") or record.get("hardware") or record.get("machine") or "CPU"
    found = re.sub(r"NVIDIA (H\d00).*", r"\1", found).replace("x86_64", "CPU")
    return f"{found}, {hardware(record['again'])}" if "again" in record else found


def digits(x: float, n: int = 3) -> str:
    """Three significant digits, and no exponent: 0.0860, 1.27, 26.9, 498."""
    return f"{x:#.{n}g}".rstrip(".") if x < 10**n else f"{x:.0f}"


def span(values, n: int = 3) -> str:
    """One figure, or the range of several."""
    low, high = digits(min(values), n), digits(max(values), n)
    return low if low == high else f"{low} to {high}"


def shape_of(shape) -> str:
    return ", ".join(map(str, shape))


def shapes(table: str) -> list[tuple]:
    return list(dict.fromkeys(tuple(row["shape"]) for record in runs(table) for row in record["rows"]))


def times(table: str, shape: tuple, who: str, key: str) -> list[float]:
    """Milliseconds of `who` at `shape` in each run that has it (a peer may have failed there)."""
    rows = (row for record in runs(table) for row in record["rows"] if tuple(row["shape"]) == shape)
    return [row["results"][who][key] for row in rows if key in row["results"].get(who, ())]


def rule_h100() -> str:
    return _beside_peers("rule_h100", {"fla": "fla", "sdpa": "SDPA"})


def long_rows() -> str:
    return _beside_peers("long_rows", {"fla": "fla", "sdpa": "SDPA"})


def _beside_peers(table: str, peers: dict[str, str]) -> str:
    def cell(shape, key):
        others = (times(table, shape, peer, key) for peer in peers)
        return f"{span(times(table, shape, 'ours', key))} ({'; '.join(span(x) if x else '-' for x in others)})"

    named = "; ".join(peers.values())
    rows = [[shape_of(shape), cell(shape, FORWARD), cell(shape, BOTH)] for shape in shapes(table)]
    return markdown(["B, T, H, d", f"forward, ms ({named})", f"forward + backward, ms ({named})"], rows)


def rule_h200() -> str:
    rows = []
    for shape in shapes("rule_h200"):
        row = [shape_of(shape)]
        for key, aim in zip((FORWARD, BOTH), AIMS[shape]):
            ours, fla = ([*times("rule_h200", shape, who, key)] for who in ("ours", "fla"))
            row += [f"{span(ours)} ({span(fla)})", f"{span([y / x for x, y in zip(ours, fla)])} ({aim:g})"]
        extra = [span(times("rule_h200", shape, who, "peak_extra_MB"), 4) for who in ("ours", "fla")]
        rows.append([*row, f"{extra[0]} ({extra[1]})"])
    head = ["forward, ms", "times fla (aim)", "forward + backward, ms", "times fla (aim)", "extra, MB"]
    return markdown(["B, T, H, d", *head], rows)


def _error_rows() -> list[dict]:
    return [row for record in runs("errors") for row in record["errors"]]


def _error_ratio(row: dict, quantity: str) -> float:
    return row["ours"][quantity] / row["fla"][quantity]


def _error_span(rows: list[dict], quantity: str) -> str:
    return span([_error_ratio(row, quantity) for row in rows], 2)


def errors() -> str:
    quantities = ["o", "dq", "dk", "dv", "dbeta"]
    by_size = {}
    for row in _error_rows():
        by_size.setdefault(tuple(row["shape"][2:]), {}).setdefault(row["shape"][1], []).append(row)
    rows = [
        [
            shape_of(size),
            *(" / ".join(span([_error_ratio(r, x) for r in rs], 2) for rs in lengths.values()) for x in quantities),
        ]
        for size, lengths in by_size.items()
    ]
    return markdown(["H, d", *quantities], rows)


GATED_PEERS = {"fla": "fla", "flash_qla": "FlashQLA"}


def gated() -> str:
    """In parentheses the rule without a gate, and the peers that ran."""
    found = {}
    for row in (row for record in runs("gated") for row in record["rows"]):
        found.setdefault(tuple(row["shape"]), row["results"])
    peers = {who: name for who, name in GATED_PEERS.items() if any(FORWARD in x.get(who, ()) for x in found.values())}

    def cell(shape, key):
        plain = times("rule_h100", (*shape[:3], shape[-1]), "ours", key) if shape[2] == shape[3] else []
        results = (found[shape].get(who, {}) for who in ("ours", *peers))
        ours, *others = ([x[key]] if key in x else [] for x in results)
        return f"{span(ours)} ({'; '.join(span(x) if x else '-' for x in (plain, *others))})"

    named = "; ".join(["plain", *peers.values()])
    rows = [[shape_of(shape), cell(shape, FORWARD), cell(shape, BOTH)] for shape in found]
    return markdown(["B, T, H, HV, K, V", f"forward, ms ({named})", f"forward + backward, ms ({named})"], rows)


def gated_errors() -> str:
    """Against fp64, the range over lengths; in parentheses fla's."""
    quantities = ["o", "dq", "dk", "dv", "dbeta", "dg"]
    found = {}
    for row in (row for record in runs("gated") for row in record.get("errors", ())):
        found.setdefault((shape_of(row["shape"][2:]), row["gate"]), []).append(row)

    def cell(rows, x):
        ours, fla = ([row[who][x] for row in rows if who in row] for who in ("ours", "fla"))
        return span(ours, 2) + (f" ({span(fla, 2)})" if fla else "")

    rows = [[*case, *(cell(rows, x) for x in quantities)] for case, rows in found.items()]
    return markdown(["H, HV, K, V", "gate", *quantities], rows)


def gated_beside_fla() -> str:
    """Ours over fla's, all draws; in parentheses the largest ratio of a single one."""
    quantities = {"o": "output", "dq": "dq", "dk": "dk", "dv": "dv", "dbeta": "dbeta", "dg": "dg"}
    found = {}
    for row in (row for record in reversed(runs("gated_beside_fla")) for row in record["rows"]):
        found[row["K"], row["layout"], row["gate"]] = row

    def cell(row, x):
        return f"{row['ratio'][x]:.2f} ({row['largest'][x]:.2f})"

    rows = [
        [f"{row['K']}, {row['V']}", row["layout"], row["gate"], *(cell(row, x) for x in quantities.values())]
        for row in found.values()
    ]
    return markdown(["K, V", "layout", "gate", *quantities], rows)


def pools() -> str:
    """Times faster than gather, call and scatter, in CUDA graphs; of a step the share of a copy's bandwidth, too."""
    names = {"step": "a step", "chunks": "chunks of", "short_conv": "convolution of"}
    found, batches = {}, {}
    for record in runs("pools"):
        for row in record["rows"]:
            tokens = "" if row["what"] == "step" else f" {row['T']} token{'s' * (row['T'] > 1)}"
            of_copy = f" ({row['of_copy']:.0%})" if "of_copy" in row else ""
            key = "gated" if record["gate"] else "plain", names[row["what"]] + tokens, row["layout"]
            if row["what"] != "short_conv" or not record["gate"]:
                found.setdefault(key, {})[row["B"]] = digits(row["graph_ratio"]) + of_copy
                batches[row["B"]] = True
    rows = [[*key, *(cells.get(B, "-") for B in sorted(batches))] for key, cells in found.items()]
    return markdown(["rule", "call", "layout", *(f"B = {B}" for B in sorted(batches))], rows)


def accelerate() -> str:
    """Whole models of Transformers, by who computes the rule in them."""
    parts = []
    for task, (key, unit) in {
        "train": ("tokens_per_second", "tokens/s"),
        "prefill": ("ms", "ms"),
        "decode": ("ms_per_token", "ms per token"),
    }.items():
        found, ways = {}, {}
        for row in (row for record in runs("accelerate") for row in record.get(task, ())):
            ways[row["way"]] = True
            found.setdefault(row["model"], {}).setdefault(row["way"], []).extend([row[key]] if key in row else [])
        rows = [[m, *(span(cells[way]) if cells.get(way) else "-" for way in ways)] for m, cells in found.items()]
        parts += [markdown([f"{task}, {unit}", *ways], rows)] if rows else []
    return "\n".join(parts)


def kernels() -> str:
    [record] = runs("kernels")
    found = {}
    for row in record["rows"]:
        kernel = row["kernel"].removesuffix(" and scores")
        star = " *" if row["kernel"] != kernel else ""
        found.setdefault(kernel, []).append(f"{digits(row['ms'])} ({digits(row['floor_ms'])}){star}")
    head = dict.fromkeys(shape_of(row["shape"]) for row in record["rows"])
    return markdown(["kernel", *head], [[kernel, *cells] for kernel, cells in found.items()])


def lengths() -> str:
    rows = []
    for shape in shapes("lengths"):
        cells = (
            " / ".join(span(times("lengths", shape, who, key)) for key in (FORWARD, BOTH))
            for who in ("ours", "sdpa", "fla")
        )
        rows.append([shape[1], *cells])
    ahead = [
        shape[1]
        for shape in shapes("lengths")
        if all(
            max(times("lengths", shape, "ours", k)) < min(times("lengths", shape, "sdpa", k)) for k in (FORWARD, BOTH)
        )
    ]
    said = f"\nFaster than softmax attention from {ahead[0]} tokens on.\n"
    for record in runs("lengths"):
        for row in record.get("uncut", {"rows": ()})["rows"]:
            if row["shape"][1] == 2048:
                uncut = " / ".join(digits(row["results"]["ours"][key]) for key in (FORWARD, BOTH))
                said += f"That run cut 2048 tokens, which the rule does from 2500 on; uncut they take {uncut} ms.\n"
    return markdown(["T", "ours", "SDPA", "fla"], rows) + said


def token_by_token() -> str:
    found = {}
    for shape in shapes("token_by_token"):
        ratios = (
            [x / y for x, y in zip(*(times("token_by_token", shape, who, key) for who in ("token by token", "ours")))]
            for key in (FORWARD, BOTH)
        )
        found.setdefault(shape[3], {})[shape[1]] = " / ".join(map(span, ratios))
    head = dict.fromkeys(length for cells in found.values() for length in cells)
    rows = [[d, *(cells.get(length, "-") for length in head)] for d, cells in sorted(found.items())]
    return markdown(["d", *(f"T = {length}" for length in head)], rows)


SEGMENT_HEADS = [(1, 128), (8, 128), (16, 128), (32, 64), (8, 256)]
SEGMENT_LENGTHS = 4096, 10001, 32768


def _chosen(row: dict, backward: int) -> float:
    return row["ms"][str(row["rule"][backward])][backward]


def segments() -> str:
    [record] = runs("segments")
    rows = {(row["heads"], row["d"], row["tokens"]): row for row in record["rows"]}
    table = []
    for heads, d in SEGMENT_HEADS:
        cells = []
        for row in (rows[heads, d, tokens] for tokens in SEGMENT_LENGTHS):
            chosen, uncut = (
                " / ".join(digits(x) for x in pair) for pair in ([_chosen(row, 0), _chosen(row, 1)], row["ms"]["1"])
            )
            cells.append(f"{chosen} ({uncut})")
        table.append([f"{heads}, {d}", *cells])
    cut = [row for row in record["rows"] if row["tokens"] >= 2500]
    uncut = max(_chosen(row, i) / row["ms"]["1"][i] for row in cut for i in (0, 1))
    best = max(_chosen(row, i) / min(ms[i] for ms in row["ms"].values()) for row in cut for i in (0, 1))
    said = (
        f"\nFrom 2500 tokens on, what is chosen takes at most {uncut:.2f} times as long as uncut, and at most\n"
        f"{best:.2f} times as long as the best number of segments.\n"
    )
    return markdown(["heads, d", *(f"{tokens} tokens" for tokens in SEGMENT_LENGTHS)], table) + said


def step() -> str:
    [record] = runs("step")
    rows = []
    for batch in dict.fromkeys(row["B"] for row in record["rows"]):
        ours, fla = (
            next(row for row in record["rows"] if row["B"] == batch and row["what"].startswith(who))
            for who in ("delta_rule_step", "fla")
        )
        cells = (f"{digits(1e3 * ours[key])} ({digits(1e3 * fla[key])})" for key in ("eager_ms", "graph_single_ms"))
        rows.append([batch, *cells, f"{100 * ours['of_copy']:.0f} %"])
    return markdown(["batch", "eager, us", "in a CUDA graph, us", "of copy bandwidth"], rows)


def train(table: str = "train") -> str:
    def row(r):
        speed, ms = f"{r['tokens_per_second'] / 1e3:.1f}K", f"{r['step_ms']:.0f}"
        return [r["model"], speed, ms, f"{r['peak_GB']:.0f}", f"{r['first_step_s']:.1f}"]

    rows = [row(r) for record in runs(table) for r in record["train"]]
    return markdown(["model", "tokens/s", "step, ms", "peak, GB", "first step, s"], rows)


def train_gated() -> str:
    return train("train_gated")


def decode() -> str:
    rows = [
        [r["model"], f"{r['ms_per_token']:.1f}", f"{r['first_generate_s']:.1f}", f"{r['peak_GB']:.1f}"]
        for record in runs("decode")
        for r in record["decode"]
    ]
    return markdown(["model", "ms per token", "first `generate`, s", "peak, GB"], rows)


def parity() -> str:
    cases = {}
    for record in runs("parity"):
        again = record.get("again", {"cases": []})
        for run in (record, again):
            for case in run["cases"]:
                cases.setdefault(case["case"], []).append((case, run))
    rows = []
    for name, found in cases.items():
        first, *more = found
        ratios = f"{first[0]['bf16_ratio']:.2f}"
        for case, run in more:
            ratios += f"; on an {hardware(run)} a day later {case['bf16_ratio']:.2f}"
        equal = "equal" if all(case["greedy_equal"] for case, _ in found) else "differ"
        rows.append([name, f"{max(case['fp32_max_difference'] for case, _ in found):.1e}", equal, ratios])
    return markdown(["case", "fp32", "greedy", "bf16, ours over fla's"], rows)


def cpu() -> str:
    [record] = runs("cpu")

    def cell(row, key):
        low, high = row.get(f"{key}_quartiles", (None, None))
        return digits(row[key]) + (f" [{digits(low)}, {digits(high)}]" if low else "")

    def rows_of(table):
        return [
            [
                shape_of(row["B, T, H, D"]),
                f"{cell(row, 'forward_ms')} ({cell(row, 'other_forward_ms')})",
                f"{cell(row, 'forward_backward_ms')} ({cell(row, 'other_forward_backward_ms')})",
                f"{row['forward_backward_ratio']:.2f}",
            ]
            for row in record[table]
        ]

    head = ["B, T, H, d", "forward", "forward + backward", "ratio"]
    steps = record["decode_step"]
    faster = span([1 / row["forward_backward_ratio"] for row in record["against_token_by_token"]], 2)
    return (
        markdown(head, rows_of("against_transformers_torch_fallback"))
        + f"\nAgainst token by token, forward + backward: {faster} times faster. One decode step of a small\n"
        + f"all-linear model: {span([row['step_ms'] for row in steps], 2)} ms after "
        + " and after ".join(f"{row['context']} tokens" for row in steps)
        + f", with a cache of {span([row['cache_bytes'] for row in steps])} bytes.\n"
    )


def memory() -> str:
    [record] = runs("memory")
    rows = [
        [r["direction"], *(f"{r[key]:.0f}" for key in ("largest_shard_mb", "before_mb", "peak_mb")), r["seconds"]]
        for r in record["rows"]
    ]
    return markdown(["direction", "largest file", "process before", "peak", "seconds"], rows)


def files() -> str:
    rows = []
    for name, (what, older) in FILES.items():
        record = load(name)
        where = f"[`{name}.json`](results/{name}.json)" + " *" * older
        rows.append([where, what, hardware(record), f"{record['date']}, {record['commit']}"])
    return markdown(["file", "what", "GPU or CPU", "date, commit"], rows)


def readme() -> str:
    """The rows of README.md."""

    shown = {}

    def source(table, shape=None):
        names = [x for x in RUNS[table] if not shape or any(tuple(r["shape"]) == shape for r in load(x)["rows"])]
        shown.update((name, f"[{name}]: benchmarks/results/{name}.json") for name in names)
        return ", ".join(f"[{name}]" for name in names)

    def older(table):
        return " *" * all(FILES[name][1] for name in RUNS[table])

    def models(table, *names):
        [record] = runs(table)
        found = {row["model"]: row for row in record[table]}
        return hardware(record), *(found[name] for name in names)

    def rule(shape):
        pairs = (
            " / ".join(span(times("rule_h100", shape, who, key)) for key in (FORWARD, BOTH)) for who in ("ours", "fla")
        )
        ours, fla = pairs
        what = f"chunked rule, {hardware(load(RUNS['rule_h100'][0]))}, B, T, H, d = {shape_of(shape)}"
        return [what + older("rule_h100"), f"{ours} ms", f"fla {fla}", source("rule_h100", shape)]

    ratios = [_error_ratio(row, x) for row in _error_rows() for x in row["ours"]]
    card, ours, fla = models("train", "ours-liger", "fla")
    training = [
        f"training, {card}, 1.3B, batch 8 x 4096{older('train')}",
        f"{ours['tokens_per_second'] / 1e3:.1f}K tokens/s, {ours['peak_GB']:.0f} GB",
        f"fla {fla['tokens_per_second'] / 1e3:.1f}K, {fla['peak_GB']:.0f}",
        source("train"),
    ]
    card, ours, llama = models("decode", "ours-static", "llama-static")
    generating = [
        f"`generate`, {card}, 1.3B, batch 8{older('decode')}",
        f"{ours['ms_per_token']:.1f} ms per token",
        f"Llama {llama['ms_per_token']:.1f}",
        source("decode"),
    ]
    rows = [
        rule((8, 4096, 16, 128)),
        rule((1, 32768, 16, 128)),
        [f"its error against fp64{older('errors')}", f"{span(ratios, 2)} of fla's", "", source("errors")],
        training,
        generating,
    ]
    table = markdown(["what", "ours", "others", "from"], rows)
    return "\n".join([_conditions([load(name) for name in shown]), table, *shown.values()]) + "\n"


def overwriting_recall() -> str:
    return _quality("evidence_cpu", figures_quality.overwriting_recall, "make evidence-cpu")


def state_tracking() -> str:
    return _quality("evidence_cpu", figures_quality.state_tracking, "make evidence-cpu")


def mqar() -> str:
    return _quality("mqar", figures_quality.mqar, "python benchmarks/quality/mqar.py")


def language_models() -> str:
    return _quality("language_models", figures_quality.language_models, "python benchmarks/quality/lm.py")


def smollm2() -> str:
    return _quality("smollm2", figures_quality.smollm2, "python examples/convert_smollm2.py")


def _quality(table: str, function, command: str) -> str:
    return "\n".join(map(function, runs(table))) or f"Not measured yet: `{command}`.\n"


def _conditions(records: list[dict]) -> str:
    """Versions and dates of several files."""
    names = {"torch": "torch", "triton": "Triton", "fla": "fla"}
    versions = [record.get("versions", record) for record in records]
    found = {name: {v[key].partition("+")[0] for v in versions if v.get(key)} for key, name in names.items()}
    versions = ", ".join(f"{name} {' and '.join(sorted(each))}" for name, each in found.items())
    dates = sorted({record["date"] for record in records})
    return f"bf16, {versions}, {dates[0]} to {dates[-1]}.\n"


def plot(record: dict, path: Path, panels=None) -> None:
    """Two panels, drawn by `panels(record, axes)`: the times of `bench_ops.py` by sequence length by default. What was
    measured, on what and when stands in the title (and in the file).
    """
    import matplotlib

    matplotlib.use("svg" if path.suffix == ".svg" else "agg")
    import matplotlib.pyplot as plt

    title = title_of(record)
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), sharey=panels is None)
    (panels or _plot_times)(record, axes)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, metadata={"Title": title})
    plt.close(figure)


def _plot_times(record: dict, axes) -> None:
    for axis, key, what in zip(axes, (FORWARD, BOTH), ("forward", "forward + backward")):
        for who, label in {"ours": "ours", "sdpa": "softmax attention (SDPA)", "fla": "fla"}.items():
            points = [(r["shape"][1], r["results"][who][key]) for r in record["rows"] if who in r["results"]]
            axis.plot(*zip(*points), marker="o", label=label)
        axis.set(xscale="log", yscale="log", xlabel="sequence length", title=what)
        axis.set_xscale("log", base=2)
    axes[0].set_ylabel("ms")
    axes[0].legend()


def title_of(record: dict) -> str:
    if "what" in record:
        what = record["what"][0].upper() + record["what"][1:]
        return f"{what}, {hardware(record)}, {record['date']} ({record.get('commit')})"
    B, _, H, d = record["rows"][0]["shape"]
    if any("token by token" in row["results"] for row in record["rows"]):
        sizes = f"{B * record['rows'][0]['shape'][1]} tokens of {H * d} channels"
        return f"Chunked against token by token, {sizes}, {record['gpu']}, {record['date']} ({record.get('commit')})"
    return f"Delta rule, B = {B}, {H} heads of {d}, bf16, {record['gpu']}, {record['date']} ({record.get('commit')})"


PLOTS = {
    "h100_lengths": "h100_lengths.png",
    "h100_token_by_token": "h100_token_by_token.png",
    "evidence_cpu": "evidence_cpu.png",
    "h100_language_models": "h100_language_models.png",
    "layer_worth": "layer_worth.png",
}
PANELS = {
    "h100_token_by_token": figures_quality.plot_token_by_token,
    "evidence_cpu": figures_quality.plot_evidence_cpu,
    "h100_mqar": figures_quality.plot_mqar,
    "h100_language_models": figures_quality.plot_language_models,
    "layer_worth": figures_quality.plot_layer_worth,
}


def documents() -> list[Path]:
    """All Markdown that a figure may stand in; the logs of what was tried say themselves what they are."""
    found = [
        *ROOT.glob("*.md"),
        *(f for d in ("docs", "benchmarks", "kernels", "model_cards") for f in (ROOT / d).rglob("*.md")),
    ]
    return sorted(path for path in found if path.name not in ("CHANGELOG.md", "LOG.md", "TEMPLATE.md"))


def written(text: str) -> str:
    """`text` with each block as its function makes it."""
    return BLOCK.sub(lambda block: block[1] + globals()[block[2]]() + block[3], text)


def write_documents() -> None:
    for path in documents():
        if (text := written(path.read_text())) != path.read_text():
            path.write_text(text)
            print(f"written: {path.relative_to(ROOT)}")


def draw(names) -> None:
    for name in names:
        plot(load(name), RESULTS / PLOTS[name], PANELS.get(name))
        print(f"drawn: {(RESULTS / PLOTS[name]).relative_to(ROOT)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", action="store_true", help="draw the pictures, too")
    args = parser.parse_args()
    write_documents()
    if args.plot:
        draw(PLOTS)


if __name__ == "__main__":
    main()
