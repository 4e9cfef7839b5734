"""Continuous batching: texts that are made together, each joining and leaving at any step.

To make one token for eight texts takes little longer than for one: either way the weights pass
through the processor once, and that is most of the time. So one thread makes a token for all
running texts a step. A new one joins as soon as a row of the cache is free; its prompt is read
in pieces between the steps, so that the others hardly wait. Nothing here knows of HTTP.

Source: Yu et al. 2022 (Orca), iteration-level scheduling.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from nanochat import InputError
from nanochat.generate import Reader, SampleConfig, newest, next_token, shared_prefix
from nanochat.model import GPT

PROMPT_PIECE = 256  # most ids of a prompt that are read between two steps of the others


class Full(Exception):
    """So many texts wait already that one more is refused."""


class Closed(Exception):
    """No more texts are taken, or made: the batcher is closing."""


class Token(NamedTuple):
    """One step of one text."""

    id: int
    logprob: float  # ln p by the model itself, before temperature and filters
    top: list[tuple[int, float]]  # the likeliest ids with theirs, as many as were asked for


@dataclass(eq=False)
class Job:
    """One text to make.

    `send` is called in the batcher's thread: with a Token for each id, then once with the end: "stop" (one
    of stop_ids came, which is not sent), "length" (max_new_tokens), or the exception that ended it:
    TimeoutError past the deadline, Closed, or whatever the model raised. After cancel() it hears nothing more.
    """

    prompt: list[int]
    config: SampleConfig
    send: Callable
    stop_ids: frozenset[int] = frozenset()
    top: int | None = None  # how many likeliest ids beside each; None: no logprobs either (NaN)
    deadline: float = float("inf")  # on time.monotonic()'s clock
    cancelled: bool = field(default=False, init=False)

    def __post_init__(self):
        self.text = list(self.prompt)  # all ids so far, once outgrown the newest
        self.made = 0
        self.generator: torch.Generator | None = None
        self.arrived = time.monotonic()

    def cancel(self) -> None:
        """Nobody waits for the rest. Any thread may say so."""
        self.cancelled = True


class Batcher:
    """Makes the texts of up to `rows` jobs at once, in a thread of its own; up to `most_waiting` more wait their turn."""

    def __init__(self, model: GPT, rows: int = 8, most_waiting: int = 64):
        self.model, self.rows, self.most_waiting = model.eval(), rows, most_waiting
        self.reader = Reader(model, rows)
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []  # job i has row i of the reader
        self.ready = 0  # the first so many have read their prompts, the others are about to
        self.closing = self.hurry = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self.run, name="batcher", daemon=True)
        self.thread.start()

    def submit(self, *jobs: Job) -> None:
        """Take all of them, or none. Raises Full or Closed."""
        with self.changed:
            if self.closing:
                raise Closed("the server is shutting down")
            if len(self.running) + len(self.waiting) + len(jobs) > self.rows + self.most_waiting:
                raise Full(f"{len(self.running) + len(self.waiting)} texts are being made or wait already")
            self.waiting.extend(jobs)
            self.changed.notify()

    def close(self, finish: bool = True) -> None:
        """Take no more jobs; finish those that are there, or end them with Closed. Returns when all have ended."""
        with self.changed:
            self.closing = True
            self.hurry = self.hurry or not finish
            self.changed.notify()
        self.thread.join()

    def run(self) -> None:
        """The thread: steps for as long as there is work."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.running or self.closing)
                if not (self.waiting or self.running):
                    return
            try:
                self.drop_unwanted()
                self.admit()
                self.read_prompt()
                self.step()
            except Exception as error:  # such as out of memory: these texts are lost, the server is not
                for job in self.running:
                    self.tell(job, error)
                self.running, self.ready = [], 0
                self.reader.forget()

    def tell(self, job: Job, item: Token | str | Exception) -> None:
        """Send something, unless nobody listens any more."""
        if not job.cancelled:
            try:
                job.send(item)
            except Exception:  # whoever listened is gone
                job.cancel()

    def admit(self) -> None:
        """Give waiting jobs the free rows, each the one whose reading serves it best: what is shared, less what is lost.

        A chat's next turn finds what was said before; another chat, with which it shares only the
        beginning, does not take that from it while there is an emptier row.
        """
        while (row := len(self.running)) < self.rows:
            with self.changed:
                if not self.waiting:
                    return
                job = self.waiting.popleft()
                self.running.append(job)
            job.text = newest(job.text, self.model.config.block_size)
            ids = self.reader.ids
            self.reader.swap(row, max(range(row, self.rows), key=lambda r: 2 * shared_prefix(ids[r], job.text) - len(ids[r])))

    def read_prompt(self) -> None:
        """Read a piece of the prompt that has waited longest, all but its last id: that is for `step`."""
        unread = range(self.ready, len(self.running))
        if not unread:
            return
        row = min(unread, key=lambda r: self.running[r].arrived)
        prompt = self.running[row].text[:-1]
        known = shared_prefix(self.reader.ids[row], prompt)
        self.reader.read(row, prompt[: known + PROMPT_PIECE])
        if known + PROMPT_PIECE >= len(prompt):
            self.swap(row, self.ready)
            self.ready += 1

    @torch.inference_mode()
    def step(self) -> None:
        """One more token for each job that is ready."""
        jobs = self.running[: self.ready]
        if not jobs:
            return
        for job in jobs:
            job.text = newest(job.text, self.model.config.block_size)
        logits = self.reader.logits([job.text for job in jobs])
        for row in reversed(range(len(jobs))):  # a job that leaves is replaced by one of a later row
            try:
                if end := self.choose(jobs[row], logits[row : row + 1]):
                    self.leave(row, end)
            except InputError as error:  # logits that are not finite, and so is what the row has read
                self.reader.forget(slice(row, row + 1))
                self.leave(row, error)

    def choose(self, job: Job, logits: torch.Tensor) -> str | None:
        """Give one job its next token, of logits (1, V); → why it ends with it, or None."""
        if job.generator is None:
            job.generator = torch.Generator(logits.device).manual_seed(job.config.seed % 2**63)
        new = int(next_token(logits, job.config, [job.text], job.generator))
        if new in job.stop_ids:
            return "stop"
        logprob, top = float("nan"), []
        if job.top is not None:
            logprobs = logits[0].float().log_softmax(dim=-1)
            logprob = logprobs[new].item()
            values, ids = logprobs.topk(min(job.top, len(logprobs)))
            top = list(zip(ids.tolist(), values.tolist()))
        job.text.append(new)
        job.made += 1
        self.tell(job, Token(new, logprob, top))
        return "length" if job.made == job.config.max_new_tokens else None

    def leave(self, row: int, end: str | Exception) -> None:
        """End a job and free its row. What its text has read stays there, for a next turn."""
        job = self.running[row]
        if row < self.ready:
            self.ready -= 1
            self.swap(row, self.ready)
            row = self.ready
        self.swap(row, len(self.running) - 1)
        self.running.pop()
        self.tell(job, end)

    def drop_unwanted(self) -> None:
        """Let go of those whom nobody awaits any more, or whose time is over."""
        now = time.monotonic()

        def over(job: Job) -> Exception | None:
            if self.hurry or job.cancelled:
                return Closed("the server is shutting down")
            return TimeoutError("the time for this request is over") if job.deadline < now else None

        for row in reversed(range(len(self.running))):
            if end := over(self.running[row]):
                self.leave(row, end)
        with self.changed:
            dropped = [(job, end) for job in self.waiting if (end := over(job))]
            for job, _ in dropped:
                self.waiting.remove(job)
        for job, end in dropped:
            self.tell(job, end)

    def swap(self, a: int, b: int) -> None:
        """Let two jobs change rows."""
        self.running[a], self.running[b] = self.running[b], self.running[a]
        self.reader.swap(a, b)
