"""A running server process: the official client, fuzzing by its own schema, many clients at once, and its end."""

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import openai
import pytest
import torch
from conftest import TEXT

from nanochat import checkpoint
from nanochat.dialogue import render
from nanochat.model import GPT, GPTConfig

pytestmark = pytest.mark.slow

SECONDS = float(os.environ.get("SOAK_SECONDS", 20))  # of the many clients; 180 shows more
WORDS = ["river", "mill", "boats", "你好", "news", "salt", "grain", "sea"]
LINES = TEXT.strip().split("\n")
KNOWN = {f"Say {word}.": f"{LINES[i % len(LINES)]} {word}🙂" for i, word in enumerate(WORDS)}
KEY = "sesame-and-more"
ENDLESS = 130_000  # tokens: minutes of work


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer) -> Path:
    """A checkpoint called parrot, which knows eight answers by heart."""
    torch.manual_seed(0)
    conversations = [[{"role": "user", "content": said}, {"role": "assistant", "content": reply}] for said, reply in KNOWN.items()]
    rendered = [render(messages, tokenizer) for messages in conversations]
    longest = max(len(ids) for ids, _ in rendered)
    inputs = torch.full((len(rendered), longest), tokenizer.end_of_text)
    targets = torch.full((len(rendered), longest), -100)
    for row, (ids, supervised) in enumerate(rendered):
        inputs[row, : len(ids)] = torch.tensor(ids)
        targets[row, : len(ids) - 1] = torch.tensor([i if s else -100 for i, s in zip(ids, supervised)][1:])
    model = GPT(GPTConfig(tokenizer.vocab_size, block_size=256, n_layer=2, n_head=2, n_embd=64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(2000):
        loss = model(inputs, targets) / (targets != -100).sum()
        if loss <= 0.005:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss <= 0.005, f"the model does not know its answers by heart: loss {loss:.3f}"
    folder = tmp_path_factory.mktemp("service") / "parrot"
    folder.mkdir()
    checkpoint.write_hugging_face(folder, model.eval(), tokenizer)
    return folder


@pytest.fixture(scope="module")
def endless(tmp_path_factory, tokenizer) -> Path:
    """A checkpoint called endless, which says "a" for ever: its context takes minutes to fill."""
    model = GPT(GPTConfig(tokenizer.vocab_size, block_size=1 << 17, n_layer=1, n_head=1, n_embd=16))
    with torch.no_grad():
        model.ln_f.weight.zero_()
        model.ln_f.bias.fill_(1.0)
        model.wte.weight[tokenizer.encode("a")] = 5.0
    folder = tmp_path_factory.mktemp("service") / "endless"
    folder.mkdir()
    checkpoint.write_hugging_face(folder, model.eval(), tokenizer)
    return folder


@contextlib.contextmanager
def serving(folder: Path, *flags, **env):
    """A server process, with its url and its log, a file of its own beside the checkpoint."""
    handle, name = tempfile.mkstemp(".log", dir=folder.parent)
    log = Path(name)
    with open(handle, "wb") as file:
        process = subprocess.Popen([sys.executable, "-m", "nanochat.server", "--checkpoint", str(folder), "--port", "0", *map(str, flags)],
                                   stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"} | env)
    try:
        deadline = time.monotonic() + 60
        while not (found := re.search(r"chat at (http://\S+),", log.read_text(encoding="utf-8"))):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text(encoding="utf-8")
            time.sleep(0.05)
        process.url, process.log = found[1], log
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text(encoding="utf-8")
            with contextlib.suppress(httpx.ConnectError):
                assert httpx.get(f"{process.url}/healthz", timeout=60).status_code == 200  # it listens before it serves
                break
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        assert process.wait(60) in (143, 130)


# ------------------------------------------------------------------ the official client


@pytest.fixture(scope="module")
def service(folder):
    with serving(folder, "--queue", 16, "--request-timeout", 20, NANOCHAT_API_KEY=KEY) as process:
        yield process


@pytest.fixture
def client(service):
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def ask(client, said="Say river.", model="parrot", **more):
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": said}], **{"temperature": 0} | more)


@pytest.mark.parametrize("said", KNOWN)
def test_openai_chats(client, said):
    answer = ask(client, said)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (KNOWN[said], "stop")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer._request_id.startswith("req-")


@pytest.mark.parametrize("said", KNOWN)
def test_openai_streams(client, said):
    chunks = list(ask(client, said, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == KNOWN[said]
    assert chunks[-1].usage.completion_tokens > 10 and chunks[-2].choices[0].finish_reason == "stop"


def test_openai_continues_a_conversation_with_the_servers_own_message(client):
    first = ask(client).choices[0].message
    again = client.chat.completions.create(model="parrot", temperature=0, max_tokens=3, messages=[
        {"role": "user", "content": "Say river."}, first, {"role": "user", "content": "Say mill."}])
    assert again.usage.prompt_tokens > 50


def test_openai_asks_for_several_with_seeds(client):
    answer = ask(client, n=3, seed=1, temperature=2, top_p=1, max_tokens=20)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2] and len(set(texts)) == 3
    assert [c.message.content for c in ask(client, n=3, seed=1, temperature=2, top_p=1, max_tokens=20).choices] == texts
    pieces = ["", "", ""]
    for chunk in ask(client, n=3, seed=1, temperature=2, top_p=1, max_tokens=20, stream=True):
        for choice in chunk.choices:
            pieces[choice.index] += choice.delta.content or ""
    assert pieces == texts


def test_openai_stops_where_told(client):
    for stream in (False, True):
        answer = ask(client, stop=["river", "mill"], stream=stream)
        if stream:
            choices = [chunk.choices[0] for chunk in answer]
            text, reason = "".join(c.delta.content or "" for c in choices), choices[-1].finish_reason
        else:
            text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert (text, reason) == ("A small ", "stop")


def test_openai_reads_logprobs(client):
    choice = ask(client, "Say 你好.", logprobs=True, top_logprobs=2).choices[0]
    entries = choice.logprobs.content
    assert bytes(b for entry in entries for b in entry.bytes).decode() == choice.message.content == KNOWN["Say 你好."]
    assert all(entry.top_logprobs[0].logprob == entry.logprob and len(entry.top_logprobs) == 2 for entry in entries)
    assert any(entry.token.startswith("bytes:") for entry in entries)  # of 🙂


def test_openai_completes(client, tokenizer):
    text = "A small river"
    answer = client.completions.create(model="parrot", prompt=[text, text], max_tokens=5, temperature=0, echo=True)
    assert answer.choices[0].text == answer.choices[1].text and answer.choices[0].text.startswith(text)
    chunks = list(client.completions.create(model="parrot", prompt=tokenizer.encode(text), max_tokens=5, temperature=0, stream=True, logprobs=1))
    assert text + "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text


def test_openai_lists_models(client):
    assert [model.id for model in client.models.list()] == ["parrot"]
    assert client.models.retrieve("parrot").context == 256


def test_openai_raises_the_errors_that_it_names(client, service):
    with pytest.raises(openai.BadRequestError, match="temperature is -1, must be"):
        ask(client, temperature=-1)
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, "word " * 1000)
    assert refused.value.code == "context_length_exceeded" and refused.value.param == "messages"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "a"}])
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError, match="wrong API key"):
        ask(client.with_options(api_key="guess"))
    with pytest.raises(openai.BadRequestError, match="17 texts in one request"):
        ask(client, n=17)
    with pytest.raises(openai.APIStatusError) as large:
        ask(client, "word " * 500_000)
    assert large.value.status_code == 413


@pytest.fixture(scope="module")
def narrow(endless):
    """A server with room for one endless text, and two that wait."""
    with serving(endless, "--rows", 1, "--queue", 2, "--max-tokens", ENDLESS) as process:
        yield process


def test_openai_gives_up_in_time_and_the_server_notices(narrow):
    with openai.OpenAI(base_url=f"{narrow.url}/v1", api_key="none", max_retries=0, timeout=1) as client:
        with pytest.raises(openai.APITimeoutError):
            client.completions.create(model="endless", prompt="river", max_tokens=ENDLESS)
    until_idle(narrow)


def until_idle(service) -> None:
    """No text is made or waits any more."""
    deadline = time.monotonic() + 60
    while texts_in(text := httpx.get(f"{service.url}/metrics", timeout=60).text):
        assert time.monotonic() < deadline, text
        time.sleep(0.1)


def texts_in(metrics: str) -> int:
    """How many texts are made or wait."""
    return sum(int(float(number)) for number in re.findall(r"^nanochat_texts_(?:running|waiting) (\S+)$", metrics, re.M))


def test_openai_is_told_of_a_full_queue(narrow):
    one = dict(model="endless", prompt="river", max_tokens=ENDLESS)

    async def many() -> list:
        """What is said to those who find one text being made and two waiting."""
        async with openai.AsyncOpenAI(base_url=f"{narrow.url}/v1", api_key="none", max_retries=0) as client:
            made = await client.completions.create(**one, stream=True)
            await anext(aiter(made))
            asked = {asyncio.create_task(client.completions.create(**one)) for _ in range(24)}
            refused = []
            while len(refused) < 22:
                done, asked = await asyncio.wait(asked, timeout=60, return_when=asyncio.FIRST_COMPLETED)
                assert done
                refused += [task.exception() for task in done]
            for task in asked:
                task.cancel()
            await made.close()
        return refused

    found = asyncio.run(many())
    assert len(found) == 22 and all(isinstance(one, openai.RateLimitError) for one in found), found
    assert all(one.response.headers["retry-after"] == "1" for one in found)
    until_idle(narrow)


def test_openai_is_told_of_time_that_is_over(endless):
    with serving(endless, "--rows", 1, "--request-timeout", 0.3, "--max-tokens", ENDLESS) as process:
        with openai.OpenAI(base_url=f"{process.url}/v1", api_key="none", max_retries=0) as client:
            with pytest.raises(openai.InternalServerError, match="--request-timeout") as late:
                ask(client, model="endless", max_tokens=ENDLESS)
            assert late.value.status_code == 504
            until_idle(process)
            deadline = time.monotonic() + 100
            while True:
                try:
                    assert ask(client, model="endless", max_tokens=3).choices[0].finish_reason == "length"
                    break
                except openai.InternalServerError as error:  # on a busy machine even three tokens may take more than 0.3 seconds
                    assert error.status_code == 504 and time.monotonic() < deadline


# ------------------------------------------------------------------ fuzzing


def test_schemathesis_finds_no_500(folder, tmp_path):
    with serving(folder, "--max-tokens", 100_000) as process:
        fuzz = subprocess.run(
            [Path(sys.executable).with_name("schemathesis"), "run", f"{process.url}/openapi.json", "--phases", "coverage,fuzzing",
             "--max-examples", "40", "--seed", "1", "--no-color", "--generation-database", "none", "--request-timeout", "60",
             "--exclude-checks", "positive_data_acceptance"],  # rules between fields are in no schema
            cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=400)
        assert fuzz.returncode == 0, fuzz.stdout[-5000:]
        log = process.log.read_text(encoding="utf-8")
        assert not re.search(r" 5\d\d prompt=|failed", log)
        assert len(re.findall(r"POST /v1/completions 200", log)) > 10


# ------------------------------------------------------------------ many clients


async def visit(client: httpx.AsyncClient, chance: random.Random, counts: dict, until: float) -> None:
    """Ask again and again; a third of the times leave in the middle. Every whole answer is the known one."""
    while time.monotonic() < until:
        said = chance.choice(list(KNOWN))
        body = {"messages": [{"role": "user", "content": said}], "temperature": 0, "stream": chance.random() < 0.8}
        leave = chance.random() < 1 / 3
        if not body["stream"]:
            try:
                response = await client.post("/v1/chat/completions", json=body, timeout=chance.random() / 5 if leave else 60)
            except httpx.TimeoutException:
                counts["left"] += 1
                continue
            assert response.json()["choices"][0]["message"]["content"] == KNOWN[said]
            counts["whole"] += 1
            continue
        text, patience = "", chance.randint(0, 30) if leave else 10**9
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            assert response.status_code == 200
            async for line in response.aiter_lines():
                patience -= 1
                if patience < 0 or line == "data: [DONE]":
                    break
                if line:
                    text += json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content", "")
        if patience < 0:
            counts["left"] += 1
            assert KNOWN[said].startswith(text)
        else:
            counts["whole"] += 1
            assert text == KNOWN[said]


def resident(process) -> float:
    """Megabytes of memory."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_32_clients_of_whom_a_third_leave_get_right_answers_in_flat_memory(folder):
    counts, memory = {"whole": 0, "left": 0}, []

    async def load(process) -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=process.url, timeout=60, limits=limits) as client:

            async def phase(seconds: float) -> None:
                until = time.monotonic() + seconds
                await asyncio.gather(*(visit(client, random.Random(i), counts, until) for i in range(32)))
                memory.append(resident(process))

            await phase(5)  # warm
            for _ in range(3):
                await phase(SECONDS / 3)

    with serving(folder, "--queue", 64) as process:
        at_start = resident(process)
        asyncio.run(load(process))
        until_idle(process)
        print(f"\n{counts}; megabytes at the start {at_start:.1f}, after 5 seconds and each third of {SECONDS:g} more: "
              f"{[round(m, 1) for m in memory]}")
        assert counts["whole"] > counts["left"] > counts["whole"] / 5
        assert memory[-1] < memory[0] * 1.05 + 5
        log = process.log.read_text(encoding="utf-8")
        assert " 499 " in log and not re.search(r" 5\d\d prompt=|failed|Traceback", log)


# ------------------------------------------------------------------ the end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_streams_finish_and_takes_no_more(endless, number):
    lengths, heard = range(5, 37), []

    async def fill_the_row(client) -> None:
        body = {"prompt": "river", "max_tokens": ENDLESS, "stream": True}
        async with client.stream("POST", "/v1/completions", json=body) as response:
            async for line in response.aiter_lines():
                heard.append(line)

    async def stream(client, length: int) -> str:
        text = ""
        body = {"messages": [{"role": "user", "content": "river"}], "max_tokens": length, "stream": True}
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    return text
                if line:
                    text += json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content", "")
        raise AssertionError("no [DONE]")

    async def run(process) -> None:
        async with httpx.AsyncClient(base_url=process.url, timeout=60, limits=httpx.Limits(max_connections=None)) as client:
            busy = asyncio.create_task(fill_the_row(client))
            while not heard:
                await asyncio.sleep(0.01)
            streams = [asyncio.create_task(stream(client, length)) for length in lengths]
            while texts_in((await client.get("/metrics")).text) < 1 + len(streams):
                await asyncio.sleep(0.01)
            process.send_signal(number)
            with pytest.raises((httpx.NetworkError, httpx.RemoteProtocolError)):  # refused, or cut off by the listener's end
                while True:
                    response = await client.get("/healthz", headers={"connection": "close"})
                    assert response.status_code in (200, 503)
                    await asyncio.sleep(0.01)
            wanted = len(heard) + 100  # lines: what has begun goes on
            while len(heard) < wanted:
                assert process.poll() is None and not busy.done()
                await asyncio.sleep(0.01)
            assert not any(task.done() for task in streams)
            busy.cancel()
            assert await asyncio.gather(*streams) == ["a" * length for length in lengths]

    with serving(endless, "--rows", 1, "--max-tokens", ENDLESS) as process:
        asyncio.run(asyncio.wait_for(run(process), 120))
        assert process.wait(60) == 128 + number
        assert "stopped: the server is down" in process.log.read_text(encoding="utf-8")


def test_a_second_signal_ends_it_at_once(endless):
    with serving(endless, "--rows", 1, "--max-tokens", ENDLESS) as process:
        with httpx.Client(base_url=process.url, timeout=60) as client:
            body = {"prompt": "river", "max_tokens": ENDLESS, "stream": True}
            with client.stream("POST", "/v1/completions", json=body) as response:
                lines = response.iter_lines()
                next(lines)
                process.terminate()
                while "finishing what was accepted" not in process.log.read_text(encoding="utf-8"):
                    assert next(lines) != "data: [DONE]"
                for _ in range(500):  # it goes on
                    assert next(lines) != "data: [DONE]"
                assert process.poll() is None
                process.terminate()
                assert process.wait(20) == 143
                assert "the server is down" not in process.log.read_text(encoding="utf-8")  # as it says when all is finished


def test_a_port_that_is_taken_is_one_line(folder):
    with serving(folder) as process:
        port = process.url.rsplit(":", 1)[1]
        second = subprocess.run([sys.executable, "-m", "nanochat.server", "--checkpoint", folder, "--port", port], capture_output=True, text=True)
        assert second.returncode == 2
        assert second.stderr == f"error: --host 127.0.0.1 --port {port}: Address already in use; try another --port\n"
