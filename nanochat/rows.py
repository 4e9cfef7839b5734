"""Pieces of text with what is learned in them → rows of the block's length → batches.

A window is a piece with its mask. Several short ones share a row, kept apart by their segment numbers:
none sees another, so nothing is learned from the company it happens to be in.
test_packed_windows_cost_what_they_cost_alone holds them to that.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from nanochat.model import IGNORED, Batch


@dataclass
class Window:
    """A piece of text that fits the block: each id but the last is an input, each but the first may be a target."""

    ids: list[int]  # at most block_size + 1
    supervised: list[bool]  # whether the id is a target
    source: int = field(default=0, compare=False)  # which conversation or text it comes from


@dataclass
class Rows:
    """Rows of block_size inputs, ready to batch; `rows[i]` are the windows that share row i."""

    rows: list[list[Window]]
    block_size: int
    cuts: object = ""  # str(cuts) says what was shortened

    @classmethod
    def of(cls, windows: list[Window], block_size: int, cuts: object = "", pack: bool = True) -> "Rows":
        """Pack windows; pack=False gives each a row of its own, to compare."""
        return cls(best_fit(windows, block_size) if pack else [[window] for window in windows], block_size, cuts)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all rows, in order: equal only for equal windows with equal masks in equal rows."""
        digest = hashlib.sha256()
        for row in self.rows:
            for window in row:
                digest.update(np.array([len(row), len(window.ids), *window.ids], "<i4").tobytes())
                digest.update(bytes(window.supervised))
        return digest.hexdigest()

    @property
    def supervised_tokens(self) -> int:
        """Targets that are learned."""
        return sum(sum(window.supervised) for row in self.rows for window in row)

    @property
    def input_tokens(self) -> int:
        """Inputs, without padding."""
        return sum(len(window.ids) - 1 for row in self.rows for window in row)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Rows → Batch (B, T); T is the longest row, rounded up to a multiple of 64.

        Padding is id 0 in segment 0, its targets IGNORED; windows are segments 1, 2, …
        """
        rows = [self.rows[i] for i in indices]
        longest = max(sum(len(window.ids) - 1 for window in row) for row in rows)
        T = min(-(-longest // 64) * 64, self.block_size)
        inputs = torch.zeros(len(rows), T, dtype=torch.int64)
        targets = torch.full((len(rows), T), IGNORED)
        segments = torch.zeros(len(rows), T, dtype=torch.int64)
        for b, row in enumerate(rows):
            start = 0
            for number, window in enumerate(row, start=1):
                ids, supervised = torch.tensor(window.ids), torch.tensor(window.supervised)
                end = start + len(ids) - 1
                inputs[b, start:end] = ids[:-1]
                targets[b, start:end] = torch.where(supervised, ids, IGNORED)[1:]  # THE shift
                segments[b, start:end] = number
                start = end
        return Batch(inputs, targets, segments)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """All rows once, in order: for evaluation."""
        for start in range(0, len(self), batch_size):
            yield self.batch(range(start, min(start + batch_size, len(self))))


def best_fit(found: list[Window], block_size: int) -> list[list[Window]]:
    """Pack windows into rows: longest first, each into the fullest row with room for it.

    (Best-fit decreasing: at most 11/9 of the fewest rows possible and a few more, Johnson 1973.)
    """
    rows: list[list[Window]] = []
    with_space: list[list[list[Window]]] = [[] for _ in range(block_size + 1)]  # [n]: rows with n places left
    for window in sorted(found, key=lambda w: -len(w.ids)):
        size = len(window.ids) - 1
        space = next((n for n in range(size, block_size) if with_space[n]), block_size)
        if space == block_size:
            rows.append([])
            with_space[space].append(rows[-1])
        row = with_space[space].pop()
        row.append(window)
        with_space[space - size].append(row)
    return rows
