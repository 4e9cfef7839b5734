"""Continuous batching: whatever joins, leaves or waits beside it, a text is the one it would be alone."""

import queue
import random
import threading
import time

import pytest
import torch
from test_generate import BLOCK, prompt_of, said_by

from nanochat import batching
from nanochat.batching import Batcher, Closed, Full, Job, Token
from nanochat.generate import SampleConfig


def until(there) -> None:
    end = time.monotonic() + 60
    while not there():
        assert time.monotonic() < end
        time.sleep(0.001)


class Heard:
    """What a job sends."""

    def __init__(self):
        self.items = queue.Queue()

    def until_the_end(self) -> tuple[list[int], str | Exception]:
        ids = []
        while isinstance(item := self.items.get(timeout=20), Token):
            ids.append(item.id)
        assert self.items.empty()
        return ids, item


def job(prompt: list[int], tokens: int = 12, **more) -> tuple[Job, Heard]:
    config = SampleConfig(max_new_tokens=tokens, **{"temperature": 0} | more.pop("sampling", {}))
    heard = Heard()
    return Job(prompt, config, heard.items.put, **more), heard


@pytest.fixture
def serve():
    """serve(model, **settings) → a Batcher, closed when the test ends."""
    batchers = []
    yield lambda model, **settings: batchers.append(Batcher(model, **settings)) or batchers[-1]
    for batcher in batchers:
        batcher.close(finish=False)


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("rows", [1, 3])
def test_every_text_is_the_one_it_would_be_alone(make_model, serve, monkeypatch, rows, temperature):
    monkeypatch.setattr(batching, "PROMPT_PIECE", 4)  # most prompts are read in several pieces
    model, chance = make_model(), random.Random(rows)
    batcher = serve(model, rows=rows)
    jobs = []
    for seed in range(24):
        start = prompt_of(chance.randint(1, BLOCK), seed % 3)  # several begin alike
        prompt, tokens = start + prompt_of(chance.randint(1, 5), seed), chance.randint(1, 2 * BLOCK)
        jobs.append((prompt, tokens, *job(prompt, tokens, sampling={"temperature": temperature, "seed": seed})))
        batcher.submit(jobs[-1][2])
        time.sleep(chance.choice([0, 0, 0.01]))
        if chance.random() < 0.3:  # somebody comes and goes
            other, _ = job(prompt_of(7, seed), 100)
            batcher.submit(other)
            threading.Timer(chance.random() / 50, other.cancel).start()
    for prompt, tokens, made, heard in jobs:
        assert heard.until_the_end() == (said_by(model, [prompt], made.config)[0], "length"), (len(prompt), tokens)
    assert not batcher.waiting


def test_a_stop_id_ends_a_text_and_is_not_sent(make_model, serve):
    model = make_model()
    whole = said_by(model, [prompt_of(5)], SampleConfig(max_new_tokens=12, temperature=0))[0]
    stop = whole[6]
    first, heard = job(prompt_of(5), stop_ids=frozenset({stop}))
    serve(model).submit(first)
    assert heard.until_the_end() == (whole[: whole.index(stop)], "stop")


def test_logprobs_are_those_of_the_model_itself(make_model, serve):
    model = make_model()
    asked, heard = job(prompt_of(5), 3, top=4, sampling={"temperature": 2.0, "top_k": 2})
    serve(model).submit(asked)
    text = prompt_of(5)
    for _ in range(3):
        token = heard.items.get(timeout=20)
        expected = model(torch.tensor([text]))[0, -1].float().log_softmax(-1)
        assert token.logprob == pytest.approx(expected[token.id].item(), abs=1e-5)
        assert [i for i, _ in token.top] == expected.topk(4).indices.tolist()
        assert [p for _, p in token.top] == pytest.approx(expected.topk(4).values.tolist(), abs=1e-5)
        text.append(token.id)


def test_a_chats_next_turn_reads_only_what_is_new_even_on_another_row(make_model, serve, monkeypatch):
    model, read = make_model(), []
    batcher = serve(model, rows=3)
    begin = prompt_of(4)  # as all chats do
    turns = [job(begin + prompt_of(9, seed), 2) for seed in range(2)]  # one row stays free
    batcher.submit(*(made for made, _ in turns))
    said = [heard.until_the_end()[0] for _, heard in turns]
    features = model.features
    monkeypatch.setattr(model, "features", lambda tokens, **more: read.append(tokens.numel()) or features(tokens, **more))
    for seed in (1, 0, 1):
        more = said[seed] + [4, 5, 6]
        again, heard = job(begin + prompt_of(9, seed) + more, 1)
        batcher.submit(again)
        said[seed] = more + heard.until_the_end()[0]
        assert sum(read) == 1 + 3  # the last of its own tokens had not been read yet
        read.clear()
    other, heard = job(begin + prompt_of(5, 7), 1)
    batcher.submit(other)  # takes the empty row from nobody
    heard.until_the_end()
    assert sum(read) == 4 + 5 and sum(bool(ids) for ids in batcher.reader.ids) == 3


def test_logits_that_are_not_finite_end_one_text_and_leave_nothing_behind(make_model, serve, monkeypatch):
    model = make_model()
    batcher, features = serve(model, rows=2), model.features
    beside, other = job(prompt_of(20), 3)
    expected = said_by(model, [[1, 2, 3]], SampleConfig(max_new_tokens=3, temperature=0))[0]
    monkeypatch.setattr(model, "features", lambda tokens, cache: features(tokens, cache=cache) * (float("nan") if 96 in tokens else 1))
    lost, heard = job([96, 5, 96], 3)
    batcher.submit(lost)
    assert "not finite" in str(heard.until_the_end()[1])
    assert not any(batcher.reader.ids) and not batcher.reader.cache.keys.any()
    after, heard = job([1, 2, 3], 3)
    batcher.submit(beside, after)
    assert heard.until_the_end() == (expected, "length") and other.until_the_end()[1] == "length"


def test_a_listener_that_fails_harms_no_other(make_model, serve):
    model = make_model()
    batcher = serve(model, rows=2)
    deaf = [Job(prompt_of(3), SampleConfig(max_new_tokens=50), send, deadline=time.monotonic() + more)
            for send, more in ((lambda item: 1 / 0, 9), ("no function", 0.05))]
    well, heard = job(prompt_of(5))
    batcher.submit(*deaf, well)
    assert heard.until_the_end() == (said_by(model, [prompt_of(5)], well.config)[0], "length")


def test_one_request_too_many_is_refused_and_a_closed_batcher_takes_none(make_model, serve, monkeypatch):
    model, go = make_model(), threading.Event()
    features = model.features
    monkeypatch.setattr(model, "features", lambda *args, **more: go.wait() and features(*args, **more))
    batcher = serve(model, rows=1, most_waiting=2)
    first, heard = job(prompt_of(3), 2)
    batcher.submit(first)
    until(lambda: batcher.running)
    rest = [job(prompt_of(3), 2) for _ in range(3)]
    with pytest.raises(Full, match="1 texts"):
        batcher.submit(*(made for made, _ in rest))  # all or none
    batcher.submit(*(made for made, _ in rest[:2]))
    with pytest.raises(Full, match="3 texts are being made or wait already"):
        batcher.submit(rest[2][0])
    closer = threading.Thread(target=batcher.close)
    closer.start()
    until(lambda: batcher.closing)
    with pytest.raises(Closed):
        batcher.submit(rest[2][0])
    go.set()
    closer.join(timeout=20)
    for each in (heard, rest[0][1], rest[1][1]):  # those that were there are finished
        assert each.until_the_end()[1] == "length"


def test_time_runs_out_for_those_who_wait_and_those_who_run(make_model, serve):
    batcher = serve(make_model(), rows=1)
    running, first = job(prompt_of(3), 10**6)
    waiting, second = job(prompt_of(3), 1, deadline=time.monotonic() + 0.1)
    batcher.submit(running, waiting)
    assert isinstance(first.items.get(timeout=20), Token)
    assert isinstance(second.until_the_end()[1], TimeoutError) and batcher.running == [running]
    running.deadline = time.monotonic() + 0.1  # not before: one late look at the clock would end both
    assert isinstance(first.until_the_end()[1], TimeoutError)
    batcher.close(finish=False)


def test_a_closing_batcher_may_end_what_runs(make_model, serve):
    batcher = serve(make_model(), rows=1)
    jobs = [job(prompt_of(3), 10**6), job(prompt_of(3), 10**6)]
    batcher.submit(*(made for made, _ in jobs))
    batcher.close(finish=False)
    assert all(isinstance(heard.until_the_end()[1], Closed) for _, heard in jobs)


def test_an_error_of_the_model_ends_its_texts_and_not_the_batcher(make_model, serve, monkeypatch):
    model = make_model()
    batcher = serve(model)
    features = model.features
    monkeypatch.setattr(model, "features", lambda *args, **more: 1 / 0)
    first, heard = job(prompt_of(3))
    batcher.submit(first)
    assert isinstance(heard.until_the_end()[1], ZeroDivisionError)
    monkeypatch.setattr(model, "features", features)
    second, heard = job(prompt_of(3))
    batcher.submit(second)
    assert heard.until_the_end() == (said_by(model, [prompt_of(3)], second.config)[0], "length")


def test_a_cancelled_job_is_heard_of_no_more_and_frees_its_row(make_model, serve):
    batcher = serve(make_model(), rows=1)
    first, heard = job(prompt_of(3), 10**6)
    batcher.submit(first)
    heard.items.get(timeout=20)
    first.cancel()
    second, other = job(prompt_of(4), 2)
    batcher.submit(second)
    assert other.until_the_end()[1] == "length" and not batcher.running
    while not heard.items.empty():
        assert isinstance(heard.items.get(), Token)
