"""The HTTP server, on loopback: OpenAI's words, the door, and what happens when somebody is late or leaves."""

import io
import json
import socket
import sys
import threading
import time
from types import SimpleNamespace

import httpx
import pytest
import torch

from nanochat import InputError, batching, checkpoint, door, generate, server
from nanochat.batching import Batcher, Token
from nanochat.dialogue import render_prompt
from nanochat.generate import SampleConfig
from nanochat.model import GPT, GPTConfig
from nanochat.openai_api import Choice, Served
from nanochat.tokenizer import Tokenizer

BLOCK = 96
HELLO = [{"role": "user", "content": "The miller's boats, 小河?"}]
GREEDY = {"messages": HELLO, "temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def model() -> GPT:
    """A tiny fp32 GPT of random weights: its text is half-characters, control tokens, anything."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(vocab_size=384, block_size=BLOCK, n_layer=2, n_head=2, n_embd=32))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model.eval()


@pytest.fixture(scope="module")
def start(model, tokenizer):
    """start(key=None, rows=…, …) → a running server: client (httpx), batcher, door, address."""
    running = []

    def start(key=None, tokenizer=tokenizer, rows=4, queue=8, max_tokens=64, timeout=20.0):
        batcher = Batcher(model, rows, queue)
        app = server.create_app(Served("tiny", tokenizer, BLOCK, max_tokens, queue), batcher, key, timeout)
        bound = server.open_socket("127.0.0.1", 0)
        uvicorn = server.Server(app, timeout)
        thread = threading.Thread(target=uvicorn.run, kwargs={"sockets": [bound]})
        thread.start()
        address = bound.getsockname()
        client = httpx.Client(base_url=f"http://127.0.0.1:{address[1]}", timeout=20)
        running.append((uvicorn, thread, client))
        while not uvicorn.started:
            time.sleep(0.005)
        return SimpleNamespace(client=client, batcher=batcher, door=app, address=address, uvicorn=uvicorn, thread=thread)

    yield start
    for uvicorn, _, client in running:
        client.close()
        uvicorn.should_exit = True
    for _, thread, _ in running:
        thread.join()


@pytest.fixture(autouse=True)
def log(monkeypatch) -> io.StringIO:
    """What the servers note. (pytest's own capture loses lines that other threads write while it is read.)"""
    written = io.StringIO()
    monkeypatch.setattr(door, "sys", SimpleNamespace(stderr=written))
    return written


@pytest.fixture(scope="module")
def tiny(start):
    """The server of most tests."""
    return start()


@pytest.fixture
def slow(model, monkeypatch):
    """A gate: while it is cleared, the model makes no token."""
    gate, features = threading.Event(), model.features
    gate.set()
    monkeypatch.setattr(model, "features", lambda *args, **more: gate.wait(20) and features(*args, **more))
    yield gate
    gate.set()


@pytest.fixture
def clock(monkeypatch):
    """The batcher's clock: until it is set, it stands still, and nobody's time runs out."""
    going = threading.Event()
    monkeypatch.setattr(batching, "time", SimpleNamespace(monotonic=lambda: time.monotonic() if going.is_set() else 0.0))
    return going


def chat(to, **fields) -> httpx.Response:
    return to.client.post("/v1/chat/completions", json=GREEDY | fields)


def complete(to, **fields) -> httpx.Response:
    return to.client.post("/v1/completions", json={"temperature": 0, "max_tokens": 12} | fields)


def chunks(response: httpx.Response) -> list[dict]:
    """The events of a stream, which ends with [DONE]."""
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n")]
    assert lines[-2:] == ["[DONE]", ""]
    return [json.loads(line) for line in lines[:-2]]


def error_of(response: httpx.Response) -> dict:
    """The error of an answer, which has OpenAI's form."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"]
    return error


def alone(model: GPT, tokenizer: Tokenizer, prompt: list[int], **config) -> str:
    """The text that the model makes of a prompt when nobody else asks."""
    return generate.texts(model, tokenizer, [prompt], SampleConfig(**{"max_new_tokens": 12, "temperature": 0} | config))[0]


def until(condition) -> None:
    """Wait for something that happens in another thread."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def until_noticed(to) -> None:
    """Wait until the server knows of a new connection: a PATIENCE that is set from now on is not for its head."""
    until(lambda: any(connection.dawdling for connection in list(to.uvicorn.server_state.connections)))


# ------------------------------------------------------------------ answers


def test_a_chat_answer_is_what_the_model_says_alone(tiny, model, tokenizer):
    prompt = render_prompt(HELLO, tokenizer)
    answer = chat(tiny, model="tiny").json()
    assert answer["object"] == "chat.completion" and answer["model"] == "tiny"
    [choice] = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": alone(model, tokenizer, prompt), "refusal": None}
    assert choice["finish_reason"] == "length"
    assert answer["usage"] == {"prompt_tokens": len(prompt), "completion_tokens": 12, "total_tokens": len(prompt) + 12}


def test_a_stream_has_the_same_text_choice_by_choice(tiny):
    asked = {"n": 3, "seed": 5, "temperature": 1, "max_tokens": 30}
    whole = chat(tiny, **asked).json()
    found = chunks(chat(tiny, **asked, stream=True, stream_options={"include_usage": True}))
    assert found[-1]["choices"] == [] and found[-1]["usage"] == whole["usage"]
    assert all(chunk["usage"] is None and chunk["object"] == "chat.completion.chunk" for chunk in found[:-1])
    for choice in whole["choices"]:
        mine = [c for chunk in found[:-1] for c in chunk["choices"] if c["index"] == choice["index"]]
        assert mine[0]["delta"]["role"] == "assistant"
        assert "".join(c["delta"].get("content", "") for c in mine) == choice["message"]["content"]
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]
    assert len({choice["message"]["content"] for choice in whole["choices"]}) == 3


def test_equal_seeds_give_equal_texts_and_no_seed_gives_chance(tiny):
    def text(**more) -> str:
        return chat(tiny, temperature=1, top_p=1, max_tokens=20, **more).json()["choices"][0]["message"]["content"]

    assert text(seed=7) == text(seed=7) != text(seed=8)
    assert text() != text()


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_before_it(tiny, stream):
    text = chat(tiny).json()["choices"][0]["message"]["content"]
    stop = text[5:7]
    response = chat(tiny, stop=[stop, "never said"], stream=stream, logprobs=True)
    if stream:
        choices = [chunk["choices"][0] for chunk in chunks(response)]
        said, end = "".join(c["delta"].get("content", "") for c in choices), choices[-1]["finish_reason"]
        tokens = [entry for c in choices if c["logprobs"] for entry in c["logprobs"]["content"]]
    else:
        choice = response.json()["choices"][0]
        said, end, tokens = choice["message"]["content"], choice["finish_reason"], choice["logprobs"]["content"]
    assert (said, end) == (text[: text.index(stop)], "stop")
    spelt = bytes(byte for entry in tokens for byte in entry["bytes"]).decode("utf-8", "replace")
    assert spelt.startswith(said) and len(spelt) < len(text)


def taken(tokenizer: Tokenizer, said: bytes, *stop: str) -> tuple[str, str | None, list[int]]:
    """What a Choice makes of tokens of one byte each, up to max_new_tokens: text, reason, where each token starts."""
    choice = Choice(0, [0], "", SampleConfig(stop=stop), True, tokenizer)
    steps = [choice.take(Token(tokenizer.token_bytes.index(bytes([byte])), -1.0, [])) for byte in said]
    steps += [] if choice.reason else [choice.take("length")]
    return "".join(piece for piece, _ in steps), choice.reason, [entry.start for _, entries in steps for entry in entries]


def test_a_stop_string_within_the_beginning_of_another_is_one_at_the_end_too(tokenizer):
    assert taken(tokenizer, b"xab", "abc", "b") == taken(tokenizer, b"xabz", "abc", "b") == ("xa", "stop", [0, 1])
    assert taken(tokenizer, b"xab", "abc") == ("xab", "length", [0, 1, 2])


def test_a_token_starts_after_the_half_character_before_it(tokenizer):
    assert taken(tokenizer, b"x\xf0\x9fay") == ("x\ufffday", "length", [0, 1, 1, 2, 3])
    assert taken(tokenizer, "x🙂y".encode()) == ("x🙂y", "length", [0, 1, 1, 1, 1, 2])


def test_logprobs_of_a_chat_are_the_models_and_their_bytes_are_the_text(tiny, model, tokenizer):
    choice = chat(tiny, logprobs=True, top_logprobs=3, max_tokens=20).json()["choices"][0]
    entries = choice["logprobs"]["content"]
    assert bytes(b for e in entries for b in e["bytes"]).decode("utf-8", "replace") == choice["message"]["content"]
    ids = render_prompt(HELLO, tokenizer)
    for entry in entries:
        expected = model(torch.tensor([ids]))[0, -1].log_softmax(-1)
        values, top = expected.topk(3)
        assert entry["logprob"] == pytest.approx(values[0].item(), abs=1e-4)
        assert [t["bytes"] for t in entry["top_logprobs"]] == [list(tokenizer.decode_bytes([i])) for i in top.tolist()]
        assert [t["logprob"] for t in entry["top_logprobs"]] == pytest.approx(values.tolist(), abs=1e-4)
        whole = b"\xef\xbf\xbd" not in bytes(entry["bytes"]).decode("utf-8", "replace").encode()
        assert entry["token"] == (bytes(entry["bytes"]).decode() if whole else "bytes:" + "".join(f"\\x{b:02x}" for b in entry["bytes"]))
        ids.append(top[0].item())


def test_a_completion_takes_texts_and_ids_one_or_several(tiny, model, tokenizer):
    text, other = "A small river", "Boats carry"
    ids = tokenizer.encode(text)
    said = alone(model, tokenizer, ids)
    for prompt in (text, ids, [text], [ids]):
        answer = complete(tiny, prompt=prompt).json()
        assert [c["text"] for c in answer["choices"]] == [said]
    answer = complete(tiny, prompt=[text, other], n=2).json()
    assert answer["object"] == "text_completion"
    again = alone(model, tokenizer, tokenizer.encode(other))
    assert [(c["index"], c["text"]) for c in answer["choices"]] == [(0, said), (1, said), (2, again), (3, again)]
    assert answer["usage"]["prompt_tokens"] == len(ids) + len(tokenizer.encode(other))


def test_an_empty_prompt_begins_a_new_text(tiny, model, tokenizer):
    new = alone(model, tokenizer, [tokenizer.end_of_text])
    for fields in ({}, {"prompt": ""}, {"prompt": None}, {"prompt": [[]]}):
        assert complete(tiny, **fields).json()["choices"][0]["text"] == new


@pytest.mark.parametrize("stream", [False, True])
def test_echo_begins_with_the_prompt(tiny, stream):
    plain = complete(tiny, prompt="A small river").json()["choices"][0]["text"]
    response = complete(tiny, prompt="A small river", echo=True, stream=stream)
    text = "".join(c["choices"][0]["text"] for c in chunks(response)) if stream else response.json()["choices"][0]["text"]
    assert text == "A small river" + plain


def test_echo_of_an_empty_prompt_is_empty_and_of_half_a_pair_one_character(tiny):
    assert complete(tiny, prompt="", echo=True).json()["choices"] == complete(tiny, prompt="").json()["choices"]
    body = json.dumps({"prompt": "a\ud800", "echo": True, "max_tokens": 1})
    response = tiny.client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.json()["choices"][0]["text"].startswith("a\ufffd")


def test_logprobs_of_a_completion_in_the_older_form(tiny):
    choice = complete(tiny, prompt="A small river", logprobs=2).json()["choices"][0]
    found = choice["logprobs"]
    assert len(found["tokens"]) == len(found["token_logprobs"]) == len(found["top_logprobs"]) == len(found["text_offset"]) == 12
    for token, logprob, top, offset in zip(*(found[k] for k in ("tokens", "token_logprobs", "top_logprobs", "text_offset"))):
        assert top[token] == logprob == max(top.values()) and len(top) == 2
        assert token.startswith("bytes:") or choice["text"].startswith(token, offset)


def test_a_typed_control_token_is_text(tiny, tokenizer):
    typed = "<|end|><|endoftext|>"
    assert complete(tiny, prompt=typed).json()["usage"]["prompt_tokens"] == len(tokenizer.encode(typed)) > 2
    both = chat(tiny, messages=[{"role": "user", "content": typed}]).json()["usage"]["prompt_tokens"]
    assert both == len(render_prompt([{"role": "user", "content": typed}], tokenizer))


def test_messages_are_joined_as_in_training(tiny, tokenizer):
    asked = [{"role": "developer", "content": "Be brief."}, {"role": "system", "content": "Be kind."},
             {"role": "user", "content": [{"type": "text", "text": "On"}, {"type": "text", "text": "ce"}]},
             {"role": "user", "content": "more", "name": None}, {"role": "assistant", "content": "Yes.", "refusal": None, "tool_calls": []},
             {"role": "user", "content": "?"}]
    meant = [{"role": "system", "content": "Be brief.\nBe kind."}, {"role": "user", "content": "Once\nmore"},
             {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "?"}]
    answer = chat(tiny, messages=asked).json()
    assert answer["usage"]["prompt_tokens"] == len(render_prompt(meant, tokenizer))
    assert answer["choices"] == chat(tiny, messages=meant).json()["choices"]


def test_the_checkpoints_own_system_text_is_used_unless_the_request_has_one(start, tokenizer):
    with_system = Tokenizer(tokenizer.merges, list(tokenizer.control), tokenizer.chat_template)
    with_system.system = "Speak."
    to = start(tokenizer=with_system)
    assert to.client.get("/v1/models").json()["data"][0]["system"] == "Speak."

    def tokens(*messages) -> int:
        return chat(to, messages=[*messages, *HELLO]).json()["usage"]["prompt_tokens"]

    given, empty = {"role": "system", "content": "Speak."}, {"role": "system", "content": " "}
    assert tokens() == tokens(given) > tokens(empty)


def test_a_text_ends_where_the_context_does(tiny, tokenizer):
    answer = chat(tiny, max_tokens=None, max_completion_tokens=64).json()
    assert answer["usage"]["completion_tokens"] <= 64
    long = complete(tiny, prompt=tokenizer.encode("river " * 200)[: BLOCK - 3], max_tokens=50).json()
    assert long["usage"]["total_tokens"] <= BLOCK and long["usage"]["prompt_tokens"] == BLOCK - 3


def test_nulls_and_neutral_values_are_as_good_as_absent(tiny):
    plain = chat(tiny).json()["choices"]
    neutral = {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "tools": [], "tool_choice": "none", "user": "me",
               "response_format": {"type": "text"}, "suffix": "", "modalities": ["text"], "audio": None, "store": False, "metadata": {"stop": 1, "name": "b"}, "stream_options": None, "n": None,
               "stop": None, "seed": None, "top_p": None, "model": None, "stream": None, "logprobs": None, "parallel_tool_calls": True}
    assert chat(tiny, **neutral).json()["choices"] == plain
    assert chat(tiny, top_k=1, min_p=0.5, repetition_penalty=1, temperature=1).json()["choices"] == plain


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize("fields, status, param, words", [
    ({"temperature": -1}, 400, "temperature", "temperature is -1, must be greater than or equal to 0"),
    ({"temperature": "hot"}, 400, "temperature", "temperature must be a valid number"),
    ({"temperature": "1"}, 400, "temperature", "temperature must be a valid number"),
    ({"top_p": 1.5}, 400, "top_p", "top_p is 1.5, must be less than or equal to 1"),
    ({"max_tokens": 10**9}, 400, "max_tokens", "max_tokens is 1000000000, must be at most 64 (this server's --max-tokens)"),
    ({"max_tokens": 0}, 400, "max_tokens", "max_tokens is 0, must be greater than or equal to 1"),
    ({"n": 9}, 400, "n", "9 texts in one request, at most 8 (this server's --queue)"),
    ({"model": "gpt-4"}, 404, "model", "the model 'gpt-4' does not exist; here is 'tiny'"),
    ({"messages": []}, 400, "messages", "messages must"),
    ({"messages": None}, 400, "messages", "messages must be a valid list"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0].role", "must be 'system', 'developer', 'user' or 'assistant'"),
    ({"messages": [{"role": "user", "content": 3}]}, 400, "messages[0].content", "messages[0].content must be text, or a list of"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, 400, "messages[0].content", "must be text, or"),
    ({"messages": [{"role": "user"}]}, 400, "messages[0].content", "messages[0].content is missing"),
    ({"messages": [{"role": "user", "content": "x", "name": "me"}]}, 400, "messages[0].name", "messages[0].name is not supported"),
    ({"messages": [*HELLO, {"role": "system", "content": "x"}]}, 400, "messages[1].role", "a system message must come before all others"),
    ({"messages": [*HELLO, {"role": "assistant", "content": "x"}]}, 400, "messages", "the last message must be the user's"),
    ({"messages": [{"role": "system", "content": ""}]}, 400, "messages", "the last message must be the user's"),
    ({"messages": [{"role": "user", "content": " \n"}]}, 400, "messages", "the last message is empty"),
    ({"messages": [{"role": "user", "content": "river " * 300}]}, 400, "messages", f"tokens; this model's context is {BLOCK}"),
    ({"tools": [{"type": "function"}]}, 400, "tools", "tools is not supported with a value that would change the answer"),
    ({"presence_penalty": 0.5}, 400, "presence_penalty", "presence_penalty is not supported"),
    ({"modalities": ["text", "audio"]}, 400, "modalities", "modalities is not supported"),
    ({"logit_bias": {"5": 1}}, 400, "logit_bias", "logit_bias is not supported"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format", "response_format is not supported"),
    ({"temprature": 1}, 400, "temprature", "temprature is no field that is known here"),
    ({"temp\nra\u0007é": 1}, 400, "temp?ra??", "temp?ra?? is no field that is known here"),
    ({"prompt": "x"}, 400, "prompt", "prompt is no field that is known here"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400, "messages[0].content", "must be text, or"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "y": 1}]}]}, 400, "messages[0].content", "must be text, or"),
    ({"stop": ["a"] * 5}, 400, "stop", "stop must be text, or a list of at most 4 texts"),
    ({"stop": ""}, 400, "stop", "stop must be text, or"),
    ({"top_logprobs": 3}, 400, "top_logprobs", "top_logprobs needs logprobs: true"),
    ({"seed": 2**80}, 400, "seed", "seed is 1208925819614629174706176, must be less than"),
    ({"stream_options": {"include_usage": "yes"}}, 400, "stream_options.include_usage", "must be a valid boolean"),
])
def test_what_is_wrong_is_said_in_a_line(tiny, fields, status, param, words):
    response = chat(tiny, **fields)
    error = error_of(response)
    assert (response.status_code, error["param"], error["type"]) == (status, param, "invalid_request_error")
    assert words in error["message"]
    code = "model_not_found" if status == 404 else "context_length_exceeded" if "context" in words else None
    assert error["code"] == code


@pytest.mark.parametrize("fields, param, words", [
    ({"prompt": [[5, 384]]}, "prompt", "prompt has the id 384; the ids are 0 … 383"),
    ({"prompt": [-1]}, "prompt", "prompt must be text, a list of texts, a list of ids, or a list of lists of ids"),
    ({"prompt": ["a", 1]}, "prompt", "prompt must be text,"),
    ({"prompt": []}, "prompt", "prompt is an empty list"),
    ({"prompt": ["a"] * 9}, "n", "9 texts in one request"),
    ({"prompt": "a", "suffix": "b"}, "suffix", "suffix is not supported"),
    ({"prompt": "a", "best_of": 3, "n": 2}, "best_of", "best_of is 3, must be n (2)"),
    ({"prompt": "a", "echo": True, "logprobs": 1}, "echo", "echo with logprobs is not supported"),
    ({"prompt": "river " * 300}, "prompt", f"tokens; this model's context is {BLOCK}"),
])
def test_what_is_wrong_with_a_completion(tiny, fields, param, words):
    response = complete(tiny, **fields)
    assert (response.status_code, error_of(response)["param"]) == (400, param)
    assert words in error_of(response)["message"]


@pytest.mark.parametrize("body, words", [
    (b'{"messages": [', "the body is not JSON: Expecting value, at character"),
    (b"", "the body must be a JSON object"),
    (b"[]", "the body must be a JSON object"),
    (b"[" * 100_000, "the body is not JSON that can be read"),
    (b'{"seed": 1' + b"0" * 5000 + b"}", "the body is not JSON that can be read"),
    (b"\xff\xfe", "the body is not JSON"),
    (b'{"\\ud800": 1, "messages": [{"role": "user", "content": "a"}]}', ""),
    (b'{"temperature": NaN, "messages": [{"role": "user", "content": "a"}]}', "temperature is nan, must be"),
    (b'{"top_k": 1e999, "messages": [{"role": "user", "content": "a"}]}', "top_k is inf, must be"),
])
def test_a_broken_body_is_a_line_too(tiny, body, words):
    response = tiny.client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400 and words in error_of(response)["message"]


def test_half_a_surrogate_pair_is_a_character_like_others(tiny, tokenizer):
    body = json.dumps(GREEDY | {"messages": [{"role": "user", "content": "\ud800"}], "user": "\ud83d"})
    response = tiny.client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    replaced = render_prompt([{"role": "user", "content": "\ufffd"}], tokenizer)
    assert response.status_code == 200 and response.json()["usage"]["prompt_tokens"] == len(replaced)
    assert tiny.client.post("/v1/completions", content=b'{"model": "\\ud800"}',
                            headers={"content-type": "application/json"}).status_code == 404


def test_a_body_of_another_type_is_refused_so_that_a_web_page_cannot_send_one(tiny):
    response = tiny.client.post("/v1/chat/completions", content=json.dumps(GREEDY), headers={"content-type": "text/plain"})
    assert response.status_code == 400 and "Content-Type" in error_of(response)["message"]
    preflight = tiny.client.options("/v1/chat/completions", headers={"origin": "http://evil.example", "access-control-request-method": "POST"})
    assert preflight.status_code == 405 and not [name for name in preflight.headers if name.startswith("access-control")]


def test_unknown_paths_and_methods_have_the_same_form(tiny):
    assert tiny.client.get("/v1/nothing").status_code == 404 and error_of(tiny.client.get("/v1/nothing"))
    assert tiny.client.get("/v1/completions").status_code == 405 and error_of(tiny.client.get("/v1/completions"))
    assert tiny.client.get("/docs").status_code == tiny.client.get("/redoc").status_code == 404
    missing = tiny.client.get("/v1/models/gpt-4")
    assert missing.status_code == 404 and error_of(missing)["code"] == "model_not_found"


# ------------------------------------------------------------------ the door


def test_a_key_is_needed_for_all_but_the_page_and_health(start):
    to = start(key="sesame")
    for path in ("/", "/healthz"):
        assert to.client.get(path).status_code == 200
    for path in ("/metrics", "/v1/models", "/openapi.json", "/nothing"):
        none, wrong = to.client.get(path), to.client.get(path, headers={"authorization": "Bearer sesamo"})
        assert none.status_code == wrong.status_code == 401 and none.headers["www-authenticate"] == "Bearer"
        assert error_of(none)["message"] == "no API key: send it as `Authorization: Bearer KEY`"
        assert error_of(wrong) == {"message": "wrong API key", "type": "invalid_request_error", "param": None, "code": "invalid_api_key"}
    to.client.headers["authorization"] = "bearer sesame"
    assert to.client.get("/v1/models").status_code == to.client.get("/metrics", headers={"host": "far.example"}).status_code == 200
    assert chat(to).status_code == 200


def test_without_a_key_only_this_machines_names_are_answered(tiny):
    for host in ("localhost", "LOCALHOST:80", "127.0.0.1:9", "[::1]:8000", "127.1.2.3"):
        assert tiny.client.get("/healthz", headers={"host": host}).status_code == 200
    for host in ("evil.example", "127.0.0.1.evil.example", "192.168.0.7:8000", "localhost.evil", ""):
        assert tiny.client.get("/healthz", headers={"host": host}).status_code == 403


@pytest.mark.parametrize("declared", [True, False])
def test_a_large_body_is_refused_before_it_is_read_whole(tiny, declared):
    def pieces():
        for _ in range(4):
            yield b" " * (door.MOST_BYTES // 2)

    headers = {"content-type": "application/json"} | ({"content-length": str(2 * door.MOST_BYTES)} if declared else {})
    response = tiny.client.post("/v1/completions", content=pieces(), headers=headers)
    assert response.status_code == 413 and error_of(response)["message"] == "the body has more than 1,048,576 bytes"


@pytest.mark.parametrize("sent, answer", [
    (b"", b""),
    (b"POST /v1/completions HTTP/1.1\r\nhost: loc", b""),
    (b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n{", b"HTTP/1.1 408 "),
])
def test_who_sends_too_slowly_is_let_go(start, monkeypatch, sent, answer):
    to = start()
    if not answer:
        monkeypatch.setattr(door, "PATIENCE", 0.2)  # for the head
    with socket.create_connection(to.address) as slow:
        if answer:
            until_noticed(to)
            monkeypatch.setattr(door, "PATIENCE", 0.2)  # for the body
        try:
            slow.sendall(sent)
            slow.settimeout(20)
            received = b"".join(iter(lambda: slow.recv(4096), b""))
        except (ConnectionResetError, BrokenPipeError):
            received = b""
    assert received.startswith(answer) and bool(received) == bool(answer)


def test_who_reads_too_slowly_is_let_go_and_holds_up_nobody(start, slow, monkeypatch):
    monkeypatch.setattr(door, "MOST_BYTES", 1 << 27)
    to = start(queue=64, rows=8)
    to.uvicorn.config.http_protocol_class = tight(to.uvicorn.config.http_protocol_class)
    body = json.dumps({"prompt": [[1] * 8] * 64, "logprobs": 20, "max_tokens": 64, "stream": True, "temperature": 0}).encode()
    answers = []
    slow.clear()
    with socket.socket() as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.connect(to.address)
        lazy.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
                     % len(body) + body)
        until(lambda: to.batcher.running)
        patient = threading.Thread(target=lambda: answers.append(chat(to)))
        patient.start()
        until(lambda: len(to.batcher.running) + len(to.batcher.waiting) == 65)
        monkeypatch.setattr(door, "PATIENCE", 0.3)  # all that either sends is there: now it is for what they take in
        slow.set()
        patient.join()
        assert answers[0].status_code == 200
        until(lambda: not to.batcher.running and not to.batcher.waiting)
        until(lambda: not any(connection.flow.write_paused for connection in to.uvicorn.server_state.connections))


def test_who_takes_in_only_the_beginning_of_an_answer_does_not_stay(start, monkeypatch):
    to = start()
    to.uvicorn.config.http_protocol_class = tight(to.uvicorn.config.http_protocol_class)
    with socket.socket() as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.connect(to.address)
        until_noticed(to)
        monkeypatch.setattr(door, "PATIENCE", 0.3)
        lazy.sendall(b"GET / HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        assert lazy.recv(8)
        until(lambda: not to.uvicorn.server_state.connections)


def tight(protocol):
    """The same protocol with so small a buffer in the kernel that a reader who sleeps is noticed."""
    class Tight(protocol):
        def connection_made(self, transport):
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            super().connection_made(transport)

    return Tight


# ------------------------------------------------------------------ full, late, gone


def test_a_full_queue_is_429_with_retry_after(start, slow):
    to = start(rows=1, queue=1)
    slow.clear()
    threads = [threading.Thread(target=chat, args=(to,)) for _ in range(2)]
    threads[0].start()
    until(lambda: to.batcher.running)
    threads[1].start()
    until(lambda: to.batcher.waiting)
    for stream in (False, True):
        response = chat(to, stream=stream)
        assert response.status_code == 429 and response.headers["retry-after"] == "1"
        assert error_of(response) == {"message": "2 texts are being made or wait already; try again", "type": "rate_limit_error",
                                      "param": None, "code": "queue_full"}
    slow.set()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("stream", [False, True])
def test_out_of_time_before_the_first_token_is_504(start, slow, clock, stream):
    to, answers = start(timeout=0.2, rows=1), []
    slow.clear()
    first = threading.Thread(target=chat, args=(to,))
    first.start()
    until(lambda: to.batcher.running)
    second = threading.Thread(target=lambda: answers.append(chat(to, stream=stream)))
    second.start()
    until(lambda: to.batcher.waiting)
    deadline = to.batcher.waiting[0].deadline
    until(lambda: time.monotonic() > deadline)
    clock.set()
    slow.set()
    first.join()
    second.join()
    [response] = answers
    assert response.status_code == 504
    assert error_of(response)["message"] == "not finished within 0.2 seconds (this server's --request-timeout)"
    assert "nanochat_first_token_seconds_count 1.0" in to.client.get("/metrics").text  # of the first, however late


def test_a_model_that_hangs_is_504_too(start, slow, log):
    to = start()
    slow.clear()
    to.door.longest = 0.2
    response = chat(to)
    slow.set()
    assert response.status_code == 504 and error_of(response)["code"] == "timeout"
    until(lambda: log.getvalue().endswith("s timeout\n") and " 504 " in log.getvalue())


def test_out_of_time_within_a_stream_is_an_event(start, model, clock, monkeypatch):
    to, features = start(timeout=0.2), model.features

    def slowly(*args, **more):
        [job] = to.batcher.running
        if job.made == 20:
            until(lambda: time.monotonic() > job.deadline)
            clock.set()
        return features(*args, **more)

    monkeypatch.setattr(model, "features", slowly)
    *some, last = chunks(chat(to, stream=True, max_tokens=60))
    assert last["error"]["code"] == "timeout" and any(chunk["choices"][0]["delta"].get("content") for chunk in some)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("waits", [False, True])
def test_a_client_that_leaves_frees_its_place_at_once(start, slow, stream, waits, log):
    to = start(rows=1, queue=2)
    body = json.dumps(GREEDY | {"stream": stream}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    slow.clear()
    first = threading.Thread(target=chat, args=(to,))
    if waits:
        first.start()
        until(lambda: to.batcher.running)
    with socket.create_connection(to.address) as client:
        client.sendall(head % len(body) + body)
        until(lambda: to.batcher.waiting if waits else to.batcher.running)
        job = (to.batcher.waiting if waits else to.batcher.running)[0]
    until(lambda: job.cancelled)
    slow.set()
    until(lambda: not to.batcher.running and not to.batcher.waiting)
    assert job.made <= 1
    if waits:
        first.join()
    until(lambda: "/v1/chat/completions 499 prompt=" in log.getvalue())


def test_a_failing_model_is_500_and_the_next_request_is_answered(start, model, monkeypatch, log):
    to, said = start(), "-".join(["a", "secret"])

    def fail(*args, **more):
        raise IndexError(said)

    with monkeypatch.context() as patch:
        patch.setattr(model, "features", fail)
        response = chat(to)
    assert response.status_code == 500 and error_of(response)["message"] == "the model failed; the server's log says where"
    assert "failed: IndexError" in log.getvalue() and "raise IndexError(said)" in log.getvalue() and said not in log.getvalue()
    assert chat(to).status_code == 200


def test_a_closing_server_finishes_what_streams_and_takes_no_more(start, slow):
    to = start()
    whole, late = [], []
    slow.clear()
    streaming = threading.Thread(target=lambda: whole.append(chunks(chat(to, stream=True))))
    streaming.start()
    until(lambda: to.batcher.running)
    kept = httpx.Client(base_url=to.client.base_url)
    assert kept.get("/healthz").status_code == 200
    to.door.closing = True
    late.append(kept.post("/v1/chat/completions", json=GREEDY))
    to.uvicorn.should_exit = True
    until(lambda: not to.uvicorn.servers[0].is_serving())
    with pytest.raises((httpx.NetworkError, httpx.RemoteProtocolError)):  # refused, or cut off by the listener's end
        httpx.get(f"{to.client.base_url}/healthz", timeout=20)
    slow.set()
    streaming.join()
    to.thread.join()
    assert late[0].status_code == 503 and late[0].headers["retry-after"] == "5"
    assert error_of(late[0])["message"] == "the server is shutting down"
    assert whole[0][-1]["choices"][0]["finish_reason"] == "length"
    assert not to.batcher.thread.is_alive()
    kept.close()


# ------------------------------------------------------------------ what is shown, and noted


def test_the_page_runs_only_its_own_script_and_speaks_only_to_this_server(start, monkeypatch, tmp_path):
    (tmp_path / "chat.html").write_text("<!doctype html><style>a{}</style><script>1</script>", encoding="utf-8")
    monkeypatch.setattr(server, "__file__", str(tmp_path / "server.py"))
    response = start().client.get("/")
    assert response.status_code == 200 and response.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert policy["script-src"] == "'sha256-a4ayc/80/OGda4BO/1o/V0etpOqiLx1JwB5S3beHW0s='"  # of "1"
    assert {name: response.headers[name] for name in ("x-content-type-options", "referrer-policy", "x-frame-options", "cache-control")} == {
        "x-content-type-options": "nosniff", "referrer-policy": "no-referrer", "x-frame-options": "DENY", "cache-control": "no-cache"}


def test_models_say_what_is_served(tiny):
    listed = tiny.client.get("/v1/models").json()
    assert listed["object"] == "list" and listed["data"] == [tiny.client.get("/v1/models/tiny").json()]
    about = listed["data"][0]
    assert (about["id"], about["context"], about["max_tokens"], about["system"], about["chat"]) == ("tiny", BLOCK, 64, "", True)


def test_metrics_count_requests_and_tokens_by_known_names_only(start):
    to = start()
    chat(to)
    to.client.get("/v1/some words of mine")
    text = to.client.get("/metrics").text
    assert 'nanochat_requests_total{path="/v1/chat/completions",status="200"} 1.0' in text
    assert 'nanochat_requests_total{path="other",status="404"} 1.0' in text and "some words" not in text
    assert 'nanochat_tokens_total{kind="completion"} 12.0' in text
    assert "nanochat_texts_running 0.0" in text and "nanochat_first_token_seconds_count 1.0" in text


def test_the_log_has_a_line_a_request_and_no_text(start, log):
    to = start(key="sesame")
    to.client.headers["authorization"] = "Bearer sesame"
    answers = [chat(to, messages=[{"role": "user", "content": "secret"}]), chat(to, temperature=-1, user="secret"),
               to.client.get("/v1/secret?prompt=secret"), to.client.request("SECRET", "/v1/models"),
               to.client.post("/v1/completions", content=b'{"secret'), to.client.get("/v1/models", headers={"authorization": "Bearer secret"})]
    until(lambda: len(log.getvalue().splitlines()) == len(answers))
    lines = log.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == [answer.headers["x-request-id"] for answer in answers]
    assert "POST /v1/chat/completions 200 prompt=" in lines[0] and " completion=12 " in lines[0]
    assert "secret" not in "".join(lines).lower() and "sesame" not in "".join(lines)


# ------------------------------------------------------------------ the command


@pytest.fixture
def command(model, tokenizer, tmp_path, monkeypatch):
    """command(*flags) → the one line of an InputError, of a server that must not come to serve."""
    monkeypatch.delenv("NANOCHAT_API_KEY", raising=False)
    folder = tmp_path / "model"
    folder.mkdir()
    checkpoint.write_hugging_face(folder, model, tokenizer)

    def command(*flags) -> str:
        monkeypatch.setattr(sys, "argv", ["server", "--checkpoint", str(folder), "--device", "cpu", *map(str, flags)])
        monkeypatch.setattr(server.Server, "run", lambda *args, **more: pytest.fail("it serves"))
        with pytest.raises(InputError) as refused:
            server.main()
        return str(refused.value)

    return command


def test_it_is_not_bound_outside_without_a_key(command):
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.com"):
        assert command("--host", host) == (f"--host {host}: other machines could use it without a key; "
                                           "set NANOCHAT_API_KEY or --api-key-file")


def test_a_key_that_cannot_be_one_is_refused(command, tmp_path, monkeypatch):
    file = tmp_path / "key"
    for content, words in [(" \n", "is empty"), ("two words", "one word"), ("schlüssel", "one word"), ("a\nb", "one word"), ("\udcff", "one word")]:
        file.write_text(content, encoding="utf-8", errors="surrogateescape")
        assert words in command("--api-key-file", file)
    file.write_bytes("\ufeffsesame\r\n".encode())
    assert server.read_key(str(file)) == "sesame"
    monkeypatch.setenv("NANOCHAT_API_KEY", "")
    assert command() == "NANOCHAT_API_KEY is empty; a key is at least one letter"
    assert "both" in command("--api-key-file", file)


def test_a_port_that_is_taken_and_numbers_out_of_range_are_a_line(command, tiny):
    port = tiny.address[1]
    assert command("--port", port) == f"--host 127.0.0.1 --port {port}: Address already in use; try another --port"
    assert command("--port", 99999) == "--port is 99999, must be from 0 to 65535"
    for flag in ("--rows", "--queue", "--max-tokens", "--request-timeout"):
        assert command(flag, 0) == f"{flag} is {0.0 if 'timeout' in flag else 0}, must be above 0 and below a million"


def test_a_base_checkpoint_does_not_chat_and_a_classifier_is_not_served(start, command, tokenizer, monkeypatch):
    base = start(tokenizer=Tokenizer(tokenizer.merges, list(tokenizer.control)))
    response = chat(base)
    assert response.status_code == 400
    assert error_of(response)["message"] == "tiny has no chat template: it only continues texts, at /v1/completions"
    assert complete(base, prompt="a").status_code == 200 and not base.client.get("/v1/models").json()["data"][0]["chat"]
    monkeypatch.setattr(server, "GPTClassifier", GPT)
    assert "gives labels, not text" in command("--port", 0)
