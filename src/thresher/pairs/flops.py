"""What one query against N candidates costs, by scorer. A multiply-add is 2 FLOPs; softmax, norms and learned heads are left
out, as in `thresher.measure.flops`, and what was computed of candidates beforehand is in the store already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from thresher.measure.flops import flops
from thresher.model import attachment_of
from thresher.pairs.cache import Cache
from thresher.pairs.reading import passes
from thresher.pairs.scorer import Scorer
from thresher.pairs.texts import Text
from thresher.policy import Trace


@dataclass(frozen=True)
class PairFlops:
    """reading: of the query, once, with the work of a policy on the encoder. matching: of all candidates with it."""

    reading: int
    matching: int

    @property
    def total(self) -> int:
        return self.reading + self.matching


def pair_flops(scorer: Scorer[Any], query: Text, candidates: Cache | Sequence[Text]) -> PairFlops:
    """FLOPs of `scorer.score(query, candidates)`, counted from what its passes read and from the sizes of what is kept.

    candidates: encoded by this scorer; or texts, whose encoding is not counted. A cross-encoder and its policy are run for it.
    Raises DataError as `score` does.
    """
    cache = candidates if isinstance(candidates, Cache) else scorer.encode_candidates(candidates)
    rows, _ = scorer.query_rows([query])
    with scorer.answering(), passes() as read:
        (asked,) = scorer.ask(rows)
    left = _left(read[-1]) if read else 0
    reading = _of(scorer, read) + scorer.ask_flops(asked.states, left)
    matching = 0
    with scorer.answering():
        for block in cache.blocks(scorer.chunk, scorer.device):
            if scorer.joint:
                with passes() as read:
                    scorer.compare(asked, block)
                matching += _of(scorer, read)
            else:
                matching += scorer.match_flops(asked.states, block)
    return PairFlops(reading, matching + 2 * scorer.config.lexical * len(cache))


def _left(trace: Trace) -> int:
    """Tokens of the one row that it ends with, or leaves with."""
    if not trace.reads:
        return 0
    last = trace.exited_at[0]
    return trace.asked[last - 1][0] if last < len(trace.reads) else trace.reads[-1][1][0]


def _of(scorer: Scorer[Any], traces: Sequence[Trace]) -> int:
    attachment = attachment_of(scorer.encoder)
    geometry = attachment.engine.entrance.geometry
    return sum(sum(flops(trace, geometry, attachment.policy, attachment.exit)) for trace in traces)


__all__ = ["PairFlops", "pair_flops"]
