"""The losses of one training step, as a module: what a trainer wraps, and what a loop of your own can call."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thresher.errors import OptionError
from thresher.pairs.cache import Block
from thresher.pairs.reading import longest
from thresher.pairs.scorer import Asked, Scorer
from thresher.settings import is_number, is_whole

NO_TOKEN = -1  # beyond a row's end in a batch


@dataclass(frozen=True, kw_only=True)
class PairLoss:
    """What a step learns from.

    temperature: scores are divided by it before the softmax over candidates; for cosine .05 is usual.
    negatives: candidates of other queries of the batch that each query is ranked against; None for all of them. A scorer that
        reads pairs together reads that many more.
    label_weight, distil_weight: of the labels' loss, and of what a teacher says (its scores, and for DeFormer and VIRT what
        happens inside it). distil_temperature: T, of both softmaxes; the loss is multiplied by its square (Hinton et al. 2015).
    apart: where a MixEncoder starts as a dual-encoder, its encoder learns as that one's does, from what both sides say before
        they interact, and what the encoder did not bring learns from the whole score.
    """

    temperature: float = 1.0
    negatives: int | None = None
    label_weight: float = 1.0
    apart: bool = False
    distil_weight: float = 0.0
    distil_temperature: float = 2.0
    numbers: bool | None = None

    def __post_init__(self) -> None:
        above = {"temperature": 0.0, "distil_temperature": 0.0}
        for name in ("temperature", "label_weight", "distil_weight", "distil_temperature"):
            value = getattr(self, name)
            low = above.get(name, -1e-300)
            if not is_number(value) or not low < value < math.inf:
                raise OptionError(f"Training cannot have {name}={value!r}.")
        if self.negatives is not None and (not is_whole(self.negatives) or self.negatives < 0):
            raise OptionError(f"Training cannot have negatives={self.negatives!r}.")
        if self.apart and not self.label_weight:
            raise OptionError(
                "With label_weight=0 there is nothing that both sides could learn apart; leave apart out."
            )
        if not (self.label_weight or self.distil_weight):
            raise OptionError("With label_weight=0 and distil_weight=0 nothing is learned; give one of them a weight.")


class PairLearner(nn.Module):
    """Scorer and losses together, as a trainer wants them.

    forward(queries, candidates, owners, targets, labels, hidden) → {"loss"}:
        queries: [B, n], candidates: [C, m], token ids as `query_rows` and `candidate_rows` frame them, NO_TOKEN behind a row's
            end. owners: [C], the query that brought a candidate. targets: [B], the right candidate of each query.
        labels: [C] float, for scorers with classes. hidden: [B, C] bool, candidates that a query is not ranked against: those
            that are right as well, or the same text.
    """

    # Else Trainer thinks that **batch takes num_items_in_batch and leaves the loss undivided when accumulating.
    accepts_loss_kwargs = False

    def __init__(self, scorer: Scorer[Any], loss: PairLoss, teacher: Scorer[Any] | None = None) -> None:
        super().__init__()
        if loss.distil_weight and teacher is None:
            raise OptionError(
                "Distillation needs a teacher; give a trained cross-encoder, or leave distil_weight at 0."
            )
        if loss.apart and not scorer.speaks_apart:
            raise OptionError("apart is for a MixEncoder that ranks and starts as a dual-encoder; leave it out.")
        if teacher is not None:
            _check_teacher(scorer, teacher)
            for parameter in teacher.parameters():
                parameter.requires_grad_(False)
            teacher.eval()
        self.scorer = scorer
        self.loss = loss
        self._teacher = [teacher]  # in a list: not a submodule, so neither trained nor saved

    def forward(
        self, queries: Tensor, candidates: Tensor, owners: Tensor, targets: Tensor, labels: Tensor, hidden: Tensor
    ) -> dict[str, Tensor]:
        query_rows, candidate_rows = _rows(queries), _rows(candidates)
        asked = self.scorer.ask(query_rows)
        block = self.scorer.offer(candidate_rows)
        own = [[c for c, owner in enumerate(owners.tolist()) if owner == b] for b in range(len(asked))]
        loss = queries.new_zeros((), dtype=torch.float32)
        if self.loss.label_weight:
            learned = (
                self._from_labels(asked, block, own, labels)
                if self.scorer.config.classes
                else self._from_ranks(asked, block, own, targets.tolist(), hidden.tolist())
            )
            loss = loss + self.loss.label_weight * learned
        if self.loss.distil_weight:
            taught = self._from_teacher(asked, block, own, query_rows, candidate_rows)
            loss = loss + self.loss.distil_weight * taught
        return {"loss": loss}

    def _from_ranks(
        self, asked: list[Asked], block: Block, own: list[list[int]], targets: list[int], hidden: list[list[bool]]
    ) -> Tensor:
        """Cross entropy of the right candidate among its query's own and those that the batch brought (in-batch negatives)."""
        parts, places = [], []
        for b in range(len(asked)):
            others = [c for c in _after(len(block), own[b]) if not hidden[b][c]]
            kept = [c for c in own[b] if not hidden[b][c]]
            picked = kept + (others if self.loss.negatives is None else others[: self.loss.negatives])
            picked.sort()
            parts.append(block if len(picked) == len(block) else block.select(picked))
            places.append(picked.index(targets[b]))
        loss = self._ranking(self.scorer.compare_each(asked, parts), places)
        if not self.loss.apart:
            return loss
        apart = self._ranking(self.scorer.apart_each([one.states for one in asked], parts), places)
        return apart + self._not_through_the_encoder(loss)

    def _not_through_the_encoder(self, loss: Tensor) -> Tensor:
        """The same loss, whose gradient reaches only what is not the encoder's."""
        if not loss.requires_grad:
            return loss
        own = [p for name, p in self.scorer.named_parameters() if p.requires_grad and not name.startswith("encoder.")]
        pulls = torch.autograd.grad(loss, own, retain_graph=True, allow_unused=True, materialize_grads=True)
        handed = torch.stack([((p - p.detach()) * pull).sum() for p, pull in zip(own, pulls, strict=True)])
        return loss.detach() + handed.sum()

    def _ranking(self, said: list[Tensor], places: list[int]) -> Tensor:
        logs = [(scores.float() / self.loss.temperature).log_softmax(0) for scores in said]
        return -torch.stack([log[place] for log, place in zip(logs, places, strict=True)]).mean()

    def _from_labels(self, asked: list[Asked], block: Block, own: list[list[int]], labels: Tensor) -> Tensor:
        """Cross entropy of classes; of one logit what `PairLoss.numbers` says."""
        said = torch.cat(self.scorer.compare_each(asked, [block.select(mine) for mine in own]))
        wanted = labels[[c for mine in own for c in mine]]
        if self.scorer.config.classes > 1:
            return F.cross_entropy(said.float(), wanted.long())
        if self.loss.numbers:
            return F.mse_loss(said.float(), wanted.float())
        return F.binary_cross_entropy_with_logits(said.float(), wanted.float())

    def _from_teacher(
        self,
        asked: list[Asked],
        block: Block,
        own: list[list[int]],
        query_rows: list[list[int]],
        candidate_rows: list[list[int]],
    ) -> Tensor:
        """KL(teacher || student) over each query's own candidates (with one that another brought, where it has one alone), or
        over classes; of one logit the squared difference. And what the scorer imitates beside it."""
        teacher = self._teacher[0]
        assert teacher is not None
        if teacher.device != self.scorer.device:
            teacher.to(self.scorer.device)
        classes, losses, pairs = self.scorer.config.classes, [], []
        offered = [mine if classes or len(mine) > 1 else [*mine, *_after(len(block), mine)[:1]] for mine in own]
        said = self.scorer.compare_each(asked, [block.select(compared) for compared in offered])
        for b, (ours, compared) in enumerate(zip(said, offered, strict=True)):
            texts = [self._content(candidate_rows[c], self.scorer.candidate_room()) for c in compared]
            text = self._content(query_rows[b], self.scorer.query_room())
            with torch.no_grad():
                theirs = _taught(teacher, text, texts).float()
            losses.append(self._distance(ours.float(), theirs))
            pairs += [(text, candidate) for candidate in texts]
        loss = torch.stack(losses).mean()
        imitated = self.scorer.imitation(teacher, pairs)
        return loss if imitated is None else loss + imitated

    def _distance(self, ours: Tensor, theirs: Tensor) -> Tensor:
        if self.scorer.config.classes == 1:
            return F.mse_loss(ours, theirs)
        t = self.loss.distil_temperature
        # Classes are distilled as they are; scores are compared by what they say of the candidates beside each other.
        scale = 1.0 if self.scorer.config.classes else self.loss.temperature
        logs = [(x / (t * s)).log_softmax(-1) for x, s in ((ours, scale), (theirs, 1.0))]
        rows = ours.shape[0] if ours.dim() == 2 else 1
        return t * t * F.kl_div(logs[0], logs[1], log_target=True, reduction="sum") / rows

    @staticmethod
    def _content(row: list[int], room: tuple[list[int], list[int]]) -> list[int]:
        """A row without its special tokens."""
        before, after = room
        return row[len(before) : len(row) - len(after)]


def _taught(teacher: Scorer[Any], query: list[int], candidates: list[list[int]]) -> Tensor:
    rows = [[*teacher.query_room()[0], *query, *teacher.query_room()[1]]]
    (asked,) = teacher.ask(rows)
    before, after = teacher.candidate_room()
    return teacher.compare(asked, teacher.offer([[*before, *one, *after] for one in candidates]))


def _check_teacher(scorer: Scorer[Any], teacher: Scorer[Any]) -> None:
    if scorer.config.classes != teacher.config.classes:
        raise OptionError(
            f"The teacher has {teacher.config.classes} classes and the scorer {scorer.config.classes}; they must be the same."
        )
    if scorer.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        raise OptionError("Teacher and scorer read other tokens; distil from one with the same tokenizer.")
    limits = scorer.config.max_query, scorer.config.max_candidate
    most = longest(teacher.encoder)
    if (sum(limits) if teacher.joint else max(limits)) > most:
        raise OptionError(
            f"The scorer reads max_query={limits[0]} and max_candidate={limits[1]} tokens, and its teacher has positions for "
            f"{most}{' of a pair' if teacher.joint else ''}; lower the scorer's limits, or take a teacher that reads as much."
        )


def _after(count: int, mine: list[int]) -> list[int]:
    """The candidates of others, those behind one's own first, so that every query of a batch draws other ones."""
    start = mine[-1] + 1
    owned = set(mine)
    return [c % count for c in range(start, start + count) if c % count not in owned]


def _rows(padded: Tensor) -> list[list[int]]:
    return [[number for number in row if number != NO_TOKEN] for row in padded.tolist()]
