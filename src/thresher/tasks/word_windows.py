"""Rows of words longer than a model reads, as overlapping windows of whole words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

INSIDE = 10**9  # tokens to an end of a row, past which there is nothing to see


@dataclass(frozen=True)
class WordWindows:
    """Windows over rows, row after row.

    Attributes:
        sizes: of every row the tokens of each word.
        owners: of every window its row.
        spans: of every window its first word, and the one after its last.
    """

    sizes: Sequence[Sequence[int]]
    owners: list[int]
    spans: list[tuple[int, int]]

    @classmethod
    def over(cls, sizes: Sequence[Sequence[int]], room: int, shared: int) -> WordWindows:
        """Windows of at most `room` tokens, or of one longer word; neighbours share at most `shared` tokens."""
        found = [(row, span) for row, of in enumerate(sizes) for span in _spans(of, room, shared)]
        return cls(sizes, [row for row, _ in found], [span for _, span in found])

    def parts(self, rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """Of something that every word of every row has what each window shows."""
        return [list(rows[row][start:end]) for row, (start, end) in zip(self.owners, self.spans, strict=True)]

    def homes(self) -> list[list[int]]:
        """Of every word the window in which the nearer end is farthest, in tokens; the earlier one of two."""
        ends = [[0, *accumulate(of)] for of in self.sizes]
        best: list[list[tuple[int, int]]] = [[(-1, 0)] * len(of) for of in self.sizes]
        for window, (row, (start, end)) in enumerate(zip(self.owners, self.spans, strict=True)):
            at, words = ends[row], len(self.sizes[row])
            for word in range(start, end):
                before = INSIDE if start == 0 else at[word] - at[start]
                after = INSIDE if end == words else at[end] - at[word + 1]
                if (near := min(before, after)) > best[row][word][0]:
                    best[row][word] = near, window
        return [[window for _, window in row] for row in best]

    def joined(self, parts: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """Of something that every word of every window has (see `parts`) that of each word's home."""
        return [
            [parts[window][word - self.spans[window][0]] for word, window in enumerate(row)] for row in self.homes()
        ]


def _spans(sizes: Sequence[int], room: int, shared: int) -> list[tuple[int, int]]:
    spans: list[tuple[int, int]] = []
    start = end = 0
    while not spans or end < len(sizes):
        end = min(start + 1, len(sizes))
        held = sum(sizes[start:end])
        while end < len(sizes) and held + sizes[end] <= room:
            held += sizes[end]
            end += 1
        spans.append((start, end))
        first, held = end, 0
        while first - 1 > start and held + sizes[first - 1] <= shared:
            first -= 1
            held += sizes[first]
        start = first
    return spans


__all__ = ["WordWindows"]
