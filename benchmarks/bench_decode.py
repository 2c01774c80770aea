"""Times the decode step, the short convolution and the token-by-token rule on one GPU.

Every time stands beside the bytes that must move and the copy bandwidth measured in the same run.
flash-linear-attention (fla) is timed on the same inputs where it is installed.

    python benchmarks/bench_decode.py
    python benchmarks/bench_decode.py --only step --batch 1 512 --output step.json
    python benchmarks/bench_decode.py --only step --sweep        # other block sizes and warps of the step kernel
"""

import argparse
import datetime
import json
import platform
import shlex
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from results_file import write


def median_ms(function: Callable[[], object], repeats: int = 30, inner: int = 1) -> float:
    """Median time in ms of one call; `inner` calls between two events, for calls of a few microseconds."""
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(inner):
            function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / inner)
    return statistics.median(times)


def graph_of(function: Callable[[], object], calls: int) -> torch.cuda.CUDAGraph:
    """`calls` calls of the function as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    return graph


def time_call(function: Callable[[], object], calls: int = 20) -> dict[str, float]:
    """graph: one of `calls` calls replayed back to back; graph_single: a graph of one call, its replay included."""
    eager = median_ms(function, inner=calls)
    graph = median_ms(graph_of(function, calls).replay) / calls
    single = median_ms(graph_of(function, 1).replay, inner=calls)
    return {"eager_ms": eager, "graph_ms": graph, "graph_single_ms": single}


def copy_bandwidth(n_bytes: int = 2**30) -> float:
    """TB/s of a device-to-device copy, bytes read and bytes written both counted."""
    source = torch.empty(n_bytes, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * n_bytes / median_ms(lambda: target.copy_(source)) / 1e9


def random_inputs(B: int, T: int, H: int, d: int) -> tuple[torch.Tensor, ...]:
    q, k, v = (torch.randn(B, T, H, d, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    return q, k, v, torch.rand(B, T, H, device="cuda", dtype=torch.bfloat16)


def bench_step(batches: list[int], H: int, d: int, copy: float, fla: Callable | None, sweep: bool) -> list[dict]:
    from deltanet_kernels import recurrent

    rows = []
    shipped = recurrent.STEP_BLOCK, recurrent.STEP_BLOCK_FEW, recurrent.STEP_ELEMENTS_PER_WARP
    choices = [shipped] + ([(b, b, e) for b in (8, 16, 32, 64, 128) for e in (512, 1024, 2048)] if sweep else [])
    for B in batches:
        inputs = random_inputs(B, 1, H, d)
        state = torch.randn(B, H, d, d, device="cuda")
        n_bytes = 2 * state.nbytes + sum(x.nbytes for x in inputs) + inputs[2].nbytes
        for choice in choices:
            recurrent.STEP_BLOCK, recurrent.STEP_BLOCK_FEW, recurrent.STEP_ELEMENTS_PER_WARP = choice
            row = {"what": "delta_rule_step", "B": B, "H": H, "d": d, "launch": choice}

            def step(inputs=inputs, state=state):
                return recurrent.delta_rule_step(*inputs, state, use_qk_l2norm_in_kernel=True)

            row |= time_call(step)
            row["tb_per_s"] = n_bytes / row["graph_ms"] / 1e9
            row["of_copy"] = row["tb_per_s"] / copy
            rows.append(row)
            print(json.dumps(row), flush=True)
        recurrent.STEP_BLOCK, recurrent.STEP_BLOCK_FEW, recurrent.STEP_ELEMENTS_PER_WARP = shipped
        if fla is not None:

            def call(inputs=inputs, state=state):
                return fla(*inputs, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True)

            with torch.no_grad():
                row = {"what": "fla fused_recurrent", "B": B, "H": H, "d": d} | time_call(call)
            ours = next(r for r in rows if r["B"] == B)
            row["eager_over_our_graph_single"] = row["eager_ms"] / ours["graph_single_ms"]
            row["graph_over_our_graph"] = row["graph_ms"] / ours["graph_ms"]
            row["eager_over_our_eager"] = row["eager_ms"] / ours["eager_ms"]
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def bench_conv(B: int, T: int, D: int, copy: float) -> list[dict]:
    from deltanet_kernels.short_conv import short_conv, short_conv_step

    def leaf(*shape):
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_()

    xs, weights = [leaf(B, T, D) for _ in range(3)], [leaf(D, 4) for _ in range(3)]
    dys = [torch.randn_like(x) for x in xs]
    x_bytes = sum(x.nbytes for x in xs)
    ys, _ = short_conv(xs, weights)

    def forward():
        with torch.no_grad():
            short_conv(xs, weights)

    def backward():
        torch.autograd.grad(ys, xs + weights, dys, retain_graph=True)

    token, state = [x[:, :1].detach() for x in xs], torch.zeros(B, 3 * D, 3, device="cuda", dtype=torch.bfloat16)
    still = [w.detach() for w in weights]
    rows = []
    for what, ms, n_bytes in (
        ("short_conv forward", median_ms(forward), 2 * x_bytes),
        ("short_conv backward", median_ms(backward), 3 * x_bytes),
    ):
        of_copy = n_bytes / ms / 1e9 / copy
        rows.append({"what": what, "B": B, "T": T, "D": [D] * 3, "ms": ms, "of_copy": of_copy})
    rows.append({"what": "short_conv_step", "B": B} | time_call(lambda: short_conv_step(token, still, state)))
    for row in rows:
        print(json.dumps(row), flush=True)
    return rows


def bench_tokens(B: int, T: int, H: int, d: int, fla: Callable | None) -> list[dict]:
    from deltanet_kernels.recurrent import fused_recurrent_delta_rule

    inputs = [x.requires_grad_() for x in random_inputs(B, T, H, d)]
    do = torch.randn_like(inputs[2])
    rows = []
    for name, function in (("ours", fused_recurrent_delta_rule), ("fla", fla)):
        if function is None:
            continue

        def forward(function=function):
            with torch.no_grad():
                function(*inputs, use_qk_l2norm_in_kernel=True)

        def both(function=function):
            o = function(*inputs, use_qk_l2norm_in_kernel=True)[0]
            torch.autograd.grad(o, inputs, do)

        row = {"what": f"token by token, {name}", "B": B, "T": T, "H": H, "d": d}
        row["forward_ms"] = median_ms(forward, repeats=5)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        row["forward_backward_ms"] = median_ms(both, repeats=5)
        row["peak_extra_gb"] = (torch.cuda.max_memory_allocated() - before) / 1e9
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("step", "conv", "tokens"), help="one of the three parts (default: all)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64, 512], help="batches of the decode step")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--sweep", action="store_true", help="also time launches of the step that are not shipped")
    parser.add_argument("--no-fla", action="store_true", help="leave flash-linear-attention out")
    parser.add_argument("--output", type=Path, help="where the JSON goes (default: results/decode_<gpu>.json)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_decode.py measures a GPU, and torch sees no CUDA device here.")

    fla = fla_version = None
    if not args.no_fla:
        try:
            import fla as fla_package
            from fla.ops.delta_rule import fused_recurrent_delta_rule as fla
        except ImportError:
            print("fla is not installed: its times are left out")
        else:
            fla_version = fla_package.__version__
    import triton

    gpu = torch.cuda.get_device_name()
    copy = copy_bandwidth()
    print(f"{gpu}: copy {copy:.2f} TB/s")
    H, d = args.heads, args.head_dim
    rows = []
    if args.only in (None, "step"):
        rows += bench_step(args.batch, H, d, copy, fla, args.sweep)
    if args.only in (None, "conv"):
        rows += bench_conv(8, 4096, H * d, copy) + bench_conv(1, 4096, H * d, copy)
    if args.only in (None, "tokens"):
        rows += bench_tokens(8, 4096, H, d, fla) + bench_tokens(1, 16384, H, d, fla)
    result = {
        "gpu": gpu,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "fla": fla_version,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "copy_tb_per_s": copy,
        "rows": rows,
    }
    name = gpu.lower().replace("nvidia ", "").replace(" ", "_")
    output = args.output or Path(__file__).parent / "results" / f"decode_{name}.json"
    write(output, result)
    print(f"written to {output}")


if __name__ == "__main__":
    main()
