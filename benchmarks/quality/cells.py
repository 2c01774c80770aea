"""Runs a list of independent trainings on every device at once, within a time limit; the same call goes on.

A cell is a dict that says what to train. Its result is written as soon as it is there, and a cell that the results
file has is not run again.
"""

import json
import multiprocessing
import os
import queue
import time
import traceback
from pathlib import Path
from unittest.mock import patch


def devices() -> list[str]:
    """The GPUs as CUDA_VISIBLE_DEVICES names them; without any, one nameless place."""
    import torch

    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    count = torch.cuda.device_count()
    return (seen if len(seen) == count else [str(i) for i in range(count)]) or [""]


def run_cells(
    cells: list[dict], work, record: dict, out: Path, seconds: float, workers_per_device: int, resumes: bool = False
) -> bool:
    """Run `work(cell)`, a function of a module, for each cell that `out` lacks, in the order of `cells`. What it
    returns becomes a row of `record`.

    `seconds`: what still runs then is ended, by SIGTERM. No cell begins that would not end by then (judged by the
    longest so far), unless it `resumes`. Returns whether nothing is left.
    """
    from results_file import write  # here, for workers do without Transformers until they need it

    started = time.time()
    rows = json.loads(out.read_text())["rows"] if out.exists() else []
    record["rows"] = rows
    left = [cell for cell in cells if not any(cell.items() <= row.items() for row in rows)]
    context = multiprocessing.get_context("spawn")
    todo, done = context.Queue(), context.Queue()
    for cell in left:
        todo.put(cell)
    places = (devices() * workers_per_device)[: len(left)]
    workers = [context.Process(target=_worker, args=(work, todo, done, started + seconds, resumes)) for _ in places]
    for worker, place in zip(workers, places):
        # A process reads both before it reaches `_worker`: importing torch, or looking for a GPU, is enough.
        with patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": place, "OMP_NUM_THREADS": "1"}):
            worker.start()
    print(f"{len(left)} of {len(cells)} cells to run, {len(places)} at a time", flush=True)
    try:
        while (any(worker.is_alive() for worker in workers) or not done.empty()) and time.time() < started + seconds:
            try:
                cell, row, error = done.get(timeout=0.5)
            except queue.Empty:
                continue
            if error:
                print(f"failed: {cell}\n{error}", flush=True)
                continue
            rows.append(cell | row)
            write(out, record)
            print(f"{time.time() - started:.0f} s: {json.dumps(rows[-1])}", flush=True)
    finally:  # also where a result cannot be written: nothing trains on for nobody
        for worker in workers:
            worker.terminate()
        for worker in workers:  # it may save a checkpoint first
            worker.join(30)
    missing = [cell for cell in cells if not any(cell.items() <= row.items() for row in rows)]
    print(f"{len(missing)} left: the same command goes on" if missing else "nothing is left", flush=True)
    return not missing


def _worker(work, todo, done, end: float, resumes: bool) -> None:
    longest = 0.0
    while time.time() + (0 if resumes else longest) < end:
        try:
            cell = todo.get(timeout=1)
        except queue.Empty:
            break
        start = time.time()
        try:
            done.put((cell, work(cell), None))
        except KeyboardInterrupt as stopped:  # by SIGTERM, with a checkpoint
            print(f"{stopped} {cell}", flush=True)
            break
        except Exception:  # noqa: BLE001 (one cell fails, the others go on)
            done.put((cell, None, traceback.format_exc()))
        longest = max(longest, time.time() - start)
    done.close()
    done.join_thread()
