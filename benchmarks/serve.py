"""The HTTP server under 1, 8 and 32 clients at once: requests and tokens a second, time to the first token, latency.

    python benchmarks/serve.py                     a small model of random weights
    python benchmarks/serve.py --shape 124M        GPT-2 small's shape
    python benchmarks/serve.py --checkpoint FOLDER any checkpoint with a chat template

A server process of its own answers on loopback; each client streams one chat after another, of PROMPT tokens and up to
REPLY new ones, no two beginning alike, so that no prompt is known from before. The clients share the machine with the
server. A figure is over all requests that began within --seconds; before each row as many clients ask once, unmeasured.
"""

import argparse
import asyncio
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import httpx
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import record  # noqa: E402

from nanochat import InputError, checkpoint, runtime  # noqa: E402
from nanochat.model import GPT, GPTConfig  # noqa: E402
from nanochat.tokenizer import Tokenizer  # noqa: E402

SHAPES = {"small": (6, 6, 384), "124M": (12, 12, 768)}  # layers, heads, width


def main() -> None:
    """Read the flags, serve, ask, and show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small", help="of random weights")
    parser.add_argument("--checkpoint", help="serve this one instead")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=30, help="for each number of clients")
    parser.add_argument("--prompt", type=int, default=100, help="tokens of a question, about")
    parser.add_argument("--reply", type=int, default=50, help="tokens of a reply, at most")
    parser.add_argument("--rows", type=int, default=8, help="texts made at once")
    parser.add_argument("--dtype", choices=runtime.DTYPES, default="float32")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = runtime.pick_device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        if not args.checkpoint:
            random_weights(Path(folder), *SHAPES[args.shape])
        with serving(args.checkpoint or folder, args) as url:
            found = [measure(url, clients, args) for clients in args.clients]
    show(found)
    name = Path(args.checkpoint).name if args.checkpoint else args.shape
    record.save(f"serve-{name}", device, {
        "shape": name, "rows": args.rows, "dtype": args.dtype, "prompt_tokens": args.prompt, "reply_tokens": args.reply,
        "clients": found,
    }, ("torch", "fastapi", "uvicorn", "h11"))


def random_weights(folder: Path, n_layer: int, n_head: int, n_embd: int) -> None:
    """A checkpoint of GPT-2's vocabulary with the chat tokens: what it says is noise, as fast as sense would be."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.gpt2().for_chat()
    config = GPTConfig(vocab_size=tokenizer.vocab_size, block_size=1024, n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    checkpoint.write_hugging_face(folder, GPT(config), tokenizer)


@contextmanager
def serving(folder: str, args: argparse.Namespace):
    """A server process; yields its address."""
    command = [sys.executable, "-m", "nanochat.server", "--checkpoint", folder, "--port", "0", "--rows", str(args.rows),
               "--dtype", args.dtype, "--device", args.device, "--name", "model"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=record.ROOT)
    try:
        said = []
        while not (found := re.search(r"chat at (http://\S+),", said[-1] if said else "")):
            said.append(process.stderr.readline())
            if not said[-1]:
                raise InputError(f"the server did not start: {''.join(said[-3:]).strip()}")
        threading.Thread(target=process.stderr.read, daemon=True).start()  # its log, or the pipe would fill
        yield found[1]
    finally:
        process.terminate()
        process.wait()


def measure(url: str, clients: int, args: argparse.Namespace) -> dict:
    """The figures of one number of clients."""
    numbers, times = count(time.time_ns() % 10**9), []

    async def ask(client: httpx.AsyncClient) -> tuple[float, float, int]:
        """One chat → (seconds to the first token, seconds in all, tokens)."""
        body = {"messages": [{"role": "user", "content": f"{next(numbers)}" + " word" * args.prompt}], "stream": True,
                "max_tokens": args.reply, "temperature": 1, "top_p": 1, "stream_options": {"include_usage": True}}
        began, first, usage = time.perf_counter(), None, {}
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                raise InputError(f"{response.status_code}: {(await response.aread()).decode()}")
            async for line in response.aiter_lines():
                first = first or time.perf_counter() - began
                if line.startswith("data: {"):
                    usage = json.loads(line[6:]).get("usage") or usage
        return first, time.perf_counter() - began, usage["completion_tokens"]

    async def visit(client: httpx.AsyncClient, end: float) -> None:
        while time.perf_counter() < end:
            times.append(await ask(client))

    async def run() -> float:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
            await asyncio.gather(*(ask(client) for _ in range(clients)))
            began = time.perf_counter()
            await asyncio.gather(*(visit(client, began + args.seconds) for _ in range(clients)))
            return time.perf_counter() - began

    seconds = asyncio.run(run())
    firsts, totals, tokens = (np.array(column) for column in zip(*times))
    return {"clients": clients, "requests": len(times), "seconds": seconds, "requests_per_second": len(times) / seconds,
            "tokens_per_second": float(tokens.sum() / seconds),
            "first_token": percentiles(firsts), "latency": percentiles(totals)}


def percentiles(seconds: np.ndarray) -> dict[str, float]:
    """p50, p95, p99."""
    return {f"p{p}": float(np.percentile(seconds, p)) for p in (50, 95, 99)}


def show(found: list[dict]) -> None:
    """The table, in seconds."""
    print("clients  requests/s  tokens/s   first token p50    p95    p99   whole reply p50    p95    p99")
    for row in found:
        first, whole = ("".join(f"{value:7.2f}" for value in row[key].values()) for key in ("first_token", "latency"))
        speeds = f"{row['requests_per_second']:12.2f}{row['tokens_per_second']:10.1f}"
        print(f"{row['clients']:7}{speeds}   {first:>27}   {whole:>27}")


if __name__ == "__main__":
    runtime.run_as_script(main)
