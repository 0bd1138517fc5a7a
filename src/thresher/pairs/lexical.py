"""Which of the query's tokens a candidate has: BM25 (Robertson and Zaragoza 2009) beside any scorer that keeps vectors.

MixEncoder's known weakness is token overlap (its section A.4): k vectors lose which words a text had. Here a candidate's
strongest tokens are kept beside its vectors, and their overlap with the query is added to the score with a learned weight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

K1, B = 1.2, 0.75  # BM25's usual ones
LEVELS = 255  # a token's weight is kept in 8 bits, beside its id
RATE = 100.0  # how much faster than its parameter the weight of the signal moves, for one number has a long way to go


class Lexical(nn.Module):
    """The inverse document frequencies of a vocabulary, and the weight of the signal.

    A candidate's terms are [M] int32: id * 256 + code, ascending, of its M strongest tokens; 0 stands where it has fewer. The
    code is how often the token is there, as BM25 saturates it, from 1 to 255. The signal is sum idf * saturated / sum idf,
    over the different tokens of the query; it is 0 for no common token, and at most k1 + 1.

    idf: [V]; 1 for every token until `count` was called, 0 always for special ones. average: tokens of a candidate.
    weight: of the signal, 0 before training.
    """

    idf: Tensor
    average: Tensor

    def __init__(self, vocabulary: int, special: Iterable[int], most: int, length: int) -> None:
        """most: M, terms kept of a candidate. length: what stands for the average until it is counted."""
        super().__init__()
        self.most = most
        self._special = sorted(special)
        self.register_buffer("idf", torch.ones(vocabulary))
        self.register_buffer("average", torch.tensor(float(length)))
        self.idf[self._special] = 0.0
        self.slow_weight = nn.Parameter(torch.zeros(()))

    @property
    def weight(self) -> Tensor:
        # Its gradient counts little: clipped by their common norm, all others would else be cut down to next to nothing.
        little = self.slow_weight / RATE
        return RATE * self.slow_weight.detach() + (little - little.detach())

    def count(self, candidates: Iterable[Sequence[int]]) -> None:
        """Take idf and the average length from token ids of texts, the same text counted once."""
        texts = {tuple(ids) for ids in candidates}
        found = Counter(number for ids in texts for number in set(ids))
        if not found:
            return
        documents = torch.zeros(len(self.idf), dtype=torch.float64)
        documents[list(found)] = torch.tensor(list(found.values()), dtype=torch.float64)
        idf = torch.log1p((len(texts) - documents + 0.5) / (documents + 0.5)).float()
        idf[self._special] = 0.0
        self.idf.copy_(idf)
        self.average.fill_(sum(map(len, texts)) / len(texts))

    def terms(self, candidates: Sequence[Sequence[int]]) -> Tensor:
        """[N, M] int32 on the CPU, of token ids."""
        idf, average = self.idf.tolist(), float(self.average)
        made = torch.zeros(len(candidates), self.most, dtype=torch.int32)
        for row, ids in enumerate(candidates):
            longer = K1 * (1 - B + B * len(ids) / average)
            there = {n: c * (K1 + 1) / (c + longer) for n, c in Counter(ids).items() if idf[n] > 0}
            kept = sorted(sorted(there, key=lambda n: (-idf[n] * there[n], n))[: self.most])
            codes = [n * 256 + max(1, round(there[n] * LEVELS / (K1 + 1))) for n in kept]
            made[row, : len(codes)] = torch.tensor(codes, dtype=torch.int32)
        return made

    def asked(self, ids: Sequence[int]) -> Tensor:
        """[V], what each token counts for a query: its share of the idf of all of the query's different tokens."""
        shares = torch.zeros_like(self.idf)
        numbers = torch.tensor(sorted(set(ids)), dtype=torch.int64, device=shares.device)
        shares[numbers] = self.idf[numbers]
        return shares / shares.sum().clamp(min=torch.finfo(shares.dtype).tiny)

    def forward(self, asked: Tensor, terms: Tensor) -> Tensor:
        """asked: [V]; terms: [N, M] → [N], the signal times its weight."""
        saturated = (terms & 255).to(asked.dtype) * ((K1 + 1) / LEVELS)
        return self.weight * (asked[terms >> 8] * saturated).sum(-1)
