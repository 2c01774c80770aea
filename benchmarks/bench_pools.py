"""Times the kernels on a server's pool of states, by index, against gathering states before a call and scattering them
after it, on one GPU: a token for each request, and a part of a prompt for each.

    python benchmarks/bench_pools.py
    python benchmarks/bench_pools.py --gate --batch 1 512 --tokens 64 --output gated.json

`rows` are pools [slots, HV, K, V], the states' own layout; `columns` [slots, HV, V, K], vLLM's, which a gather has to
transpose. `of_copy`: bytes of the states, read once and written once, against a copy of device memory in the same run.
"""

import argparse
import datetime
import json
import platform
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from bench_decode import copy_bandwidth, graph_of, median_ms
from results_file import write


Ways = dict[str, Callable[[], torch.Tensor]]  # "indices" and "copies"; both leave the new states in their pool
CALLS, REPEATS = 10, 10


def make_pool(shape: tuple[int, ...], layout: str, dtype: torch.dtype, device: str) -> torch.Tensor:
    *first, a, b = shape
    if layout == "rows":
        return torch.randn(*first, a, b, device=device, dtype=dtype)
    return torch.randn(*first, b, a, device=device, dtype=dtype).mT


def make_places(B: int, device: str) -> torch.Tensor:
    """In a pool of 2 B states, in no order."""
    return torch.randperm(2 * B, generator=torch.Generator().manual_seed(0))[:B].to(device, torch.int32)


def make_inputs(B: int, T: int, H: int, d: int, gate: bool, device: str) -> dict[str, torch.Tensor]:
    q, k, v = (torch.randn(B, T, H, d, device=device, dtype=torch.bfloat16) for _ in range(3))
    inputs = {"q": q, "k": k, "v": v, "beta": torch.rand(B, T, H, device=device, dtype=torch.bfloat16)}
    return inputs | ({"g": -torch.rand(B, T, H, device=device)} if gate else {})


def decode_ways(pool: torch.Tensor, places: torch.Tensor, inputs: dict[str, torch.Tensor]) -> Ways:
    """A token for each of B requests."""
    from deltanet_kernels import delta_rule_step, gated_delta_rule_step

    step = gated_delta_rule_step if "g" in inputs else delta_rule_step
    options, back = inputs | {"use_qk_l2norm_in_kernel": True}, places.long()

    def copies():
        states = pool.index_select(0, places)
        states = states if states.stride(-1) == 1 else states.contiguous()
        o = step(**options, state=states)
        pool.index_copy_(0, back, states)
        return o

    return {"indices": lambda: step(**options, state=pool, state_indices=places), "copies": copies}


def prefill_ways(pool: torch.Tensor, places: torch.Tensor, inputs: dict[str, torch.Tensor]) -> Ways:
    """T tokens for each of B requests, packed."""
    from deltanet_kernels import chunk_delta_rule, chunk_gated_delta_rule

    rule = chunk_gated_delta_rule if "g" in inputs else chunk_delta_rule
    (B, T), back = inputs["q"].shape[:2], places.long()
    options = {name: x.flatten(0, 1).unsqueeze(0) for name, x in inputs.items()}
    options |= {"use_qk_l2norm_in_kernel": True, "cu_seqlens": torch.arange(0, B * T + 1, T, device=pool.device)}

    def copies():
        states = pool.index_select(0, places)
        o, states = rule(**options, initial_state=states, output_final_state=True)
        pool.index_copy_(0, back, states)
        return o

    return {"indices": lambda: rule(**options, initial_state=pool, state_indices=places)[0], "copies": copies}


def conv_ways(pool: torch.Tensor, places: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> Ways:
    """The short convolution of [B, T, D]; of one token as a step."""
    from deltanet_kernels import short_conv, short_conv_step

    (B, T), back = x.shape[:2], places.long()
    if T == 1:

        def run(states, **where):
            return short_conv_step([x], [weight], states, **where)[0], states
    else:
        packed, borders = x.flatten(0, 1).unsqueeze(0), torch.arange(0, B * T + 1, T, device=x.device)

        def run(states, **where):
            (y,), states = short_conv([packed], [weight], "silu", states, True, borders, **where)
            return y, states

    def copies():
        y, states = run(pool.index_select(0, places).contiguous())
        pool.index_copy_(0, back, states)
        return y

    return {"indices": lambda: run(pool, state_indices=places)[0], "copies": copies}


def difference(make: Callable[[], tuple[torch.Tensor, Ways]]) -> float:
    """The largest difference between both ways in outputs and states, from the same pool; 0 means equal bits."""
    results = []
    for way in ("indices", "copies"):
        torch.manual_seed(0)
        pool, ways = make()
        results.append((ways[way](), pool))
    return max((a.float() - b.float()).abs().max().item() for a, b in zip(*results, strict=True))


def measure(make: Callable[[], tuple[torch.Tensor, Ways]]) -> dict[str, float]:
    """Times in ms, eager and in a CUDA graph, and how often an indexed call fits into one that copies."""
    row = {"difference": difference(make)}
    _, ways = make()
    for name, way in ways.items():
        row[f"{name}_eager_ms"] = median_ms(way, REPEATS, CALLS)
        row[f"{name}_graph_ms"] = median_ms(graph_of(way, CALLS).replay, REPEATS) / CALLS
    for kind in ("eager", "graph"):
        row[f"{kind}_ratio"] = row[f"copies_{kind}_ms"] / row[f"indices_{kind}_ms"]
    return row


def bench(batches: list[int], tokens: list[int], H: int, d: int, gate: bool, copy: float) -> list[dict]:
    device, rows = "cuda", []
    for B in batches:
        places = make_places(B, device)
        for layout in ("rows", "columns"):
            for T in (1, *tokens):

                def make(B=B, T=T, layout=layout, places=places):
                    pool = make_pool((2 * B, H, d, d), layout, torch.float32, device)
                    return pool, (decode_ways if T == 1 else prefill_ways)(
                        pool, places, make_inputs(B, T, H, d, gate, device)
                    )

                row = {"what": "step" if T == 1 else "chunks", "B": B, "T": T, "H": H, "d": d, "layout": layout}
                row |= measure(make)
                if T == 1:
                    row["of_copy"] = 2 * B * H * d * d * 4 / row["indices_graph_ms"] / 1e9 / copy
                rows.append(row)
                print(json.dumps(row), flush=True)
        for T in (1, tokens[0]):

            def make(B=B, T=T, places=places):
                pool = make_pool((2 * B, 3 * H * d, 3), "columns", torch.bfloat16, device)
                x, weight = (torch.randn(*s, device=device).bfloat16() for s in ((B, T, 3 * H * d), (3 * H * d, 4)))
                return pool, conv_ways(pool, places, x, weight)

            row = {"what": "short_conv", "B": B, "T": T, "D": 3 * H * d, "layout": "columns"} | measure(make)
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256], help="of each request's part of a prompt")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--gate", action="store_true", help="the gated rule")
    parser.add_argument("--output", type=Path, help="where the JSON goes (default: results/pools_<gpu>.json)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_pools.py measures a GPU, and torch sees no CUDA device here.")
    import triton

    gpu, copy = torch.cuda.get_device_name(), copy_bandwidth()
    print(f"{gpu}: copy {copy:.2f} TB/s")
    with torch.no_grad():
        rows = bench(args.batch, args.tokens, args.heads, args.head_dim, args.gate, copy)
    name = gpu.lower().replace("nvidia ", "").replace(" ", "_")
    output = args.output or Path(__file__).parent / "results" / f"pools_{name}.json"
    result = {
        "gpu": gpu,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "gate": args.gate,
        "copy_tb_per_s": copy,
        "rows": rows,
    }
    write(output, result)
    print(f"written to {output}")


if __name__ == "__main__":
    main()
