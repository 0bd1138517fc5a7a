"""Block-Skim (Guan et al., AAAI 2022): extractive question answering that stops reading blocks of the passage.

Every layer has a small CNN that sees the attention inside a block of b tokens, the b x b squares on the diagonal of the
attention maps with heads as channels, and says how likely the block holds the answer. It is trained with the task (equation
3), while nothing drops; since it only adds a loss, the model is the plain model when the policy is taken off. Afterwards
blocks whose probability is below a threshold stop being read.

Blocks are cut over a row's own tokens from its first, question included, as the paper cuts its input. A block with a token
of the question, or with any other protected token, is never dropped, nor is it learned from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_weights

from thresher.errors import OptionError, nearest
from thresher.evidence import NOTHING, Evidence, Wanted
from thresher.packed import PackedTokens, being_exported
from thresher.parts.blocks import Blocks
from thresher.parts.rules import margin
from thresher.policy import Batch, Geometry, Point, Policy, PolicyConfig, Stage, Trace

LOGITS = "block-skim logits"  # of each layer [K, 2]: irrelevant, relevant
PLACES = "block-skim places"  # of each layer [K, 4] int64: row, first and last column, whether of the passage
Learning = Literal["joint", "frozen", "skimming"]
LARGEST = 128


@dataclass(frozen=True, kw_only=True)
class BlockSkim(PolicyConfig):
    """Drop blocks of the passage in whose own attention a small CNN sees no answer.

    block: tokens of a block. full_map: the CNN sees the whole attention map instead of the diagonal (figure 3): every b x b
        tile of it, a block's features being the mean over the tiles in which it asks and those in which it is asked.
    layers: after whose attention blocks may drop, from 1; None: all but the last, after which there is nothing left to save.
    threshold: blocks drop whose probability of being relevant is below it. strength multiplies its odds by strength ** 4.
    keep_question: in rows of two segments, no block with a token of the first is dropped.
    alpha: the weight of the predictors' loss (.01 for ALBERT in the paper). beta: that of relevant blocks in it; None: how
        many irrelevant blocks there are for a relevant one in the rows of the training stage.
    learning: "joint", the paper's; "frozen" trains the predictors alone (ablation ID 3), "skimming" drops blocks while it
        trains (ID 4).
    """

    method: ClassVar[str] = "block-skim"
    serves: ClassVar[Literal["any", "pairs", "answers"]] = "answers"
    block: int = 32
    full_map: bool = False
    layers: tuple[int, ...] | None = None
    threshold: float = 1e-3
    keep_question: bool = True
    alpha: float = 0.1
    beta: float | None = None
    learning: Learning = "joint"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.block <= LARGEST:
            raise OptionError(f"block must be from 1 to {LARGEST} tokens, not {self.block!r}.")
        if not 0.0 <= self.threshold <= 1.0:
            raise OptionError(f"threshold must lie between 0 and 1, not {self.threshold!r}.")
        if not 0.0 <= self.alpha < math.inf:
            raise OptionError(f"alpha must be a number of at least 0, not {self.alpha!r}.")
        if self.beta is not None and not 0.0 < self.beta < math.inf:
            raise OptionError(f"beta must be a number above 0, or none, not {self.beta!r}.")
        if self.learning not in get_args(Learning):
            raise OptionError(f"There is no learning {self.learning!r}{nearest(self.learning, get_args(Learning))}")
        if self.layers is not None and any(layer < 1 for layer in self.layers):
            raise OptionError(f"layers are counted from 1, not {self.layers}.")

    def bar(self) -> float:
        """What the predictor's logits must differ by for a block to stay: the log-odds of the threshold, strength applied."""
        if not 0.0 < self.threshold < 1.0:
            return -math.inf if self.threshold == 0.0 or self.strength == 0.0 else math.inf
        return margin(self.strength, math.log(self.threshold) - math.log1p(-self.threshold))


class BlockPredictor(nn.Module):
    """Two 3 x 3 convolutions with batch norm, ReLU and 2 x 2 average pooling, a 1 x 1 convolution with ReLU, a linear layer.

    Channels are the heads throughout. A square of side 1 is not pooled, an odd one loses its last row and column to the
    pooling (after the convolution has spread them): sides 32 → 16 → 8, 3 → 1, 1 → 1.
    """

    def __init__(self, heads: int, size: int) -> None:
        super().__init__()
        self.heads = heads
        self.sides = size, _pooled(size), _pooled(_pooled(size))
        self.conv1 = nn.Conv2d(heads, heads, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(heads)
        self.conv2 = nn.Conv2d(heads, heads, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(heads)
        self.conv3 = nn.Conv2d(heads, heads, 1)
        self.linear = nn.Linear(heads * self.sides[2] ** 2, 2)

    def features(self, tiles: Tensor) -> Tensor:
        """[K, H, b, b] → [K, H, s, s]"""
        if not (self.training or torch.is_grad_enabled() or being_exported()):
            return self._inferred(tiles)
        x = self._pool(_norm(self.norm1, self.conv1(tiles)).relu())
        x = self._pool(_norm(self.norm2, self.conv2(x)).relu())
        return self.conv3(x).relu()  # type: ignore[no-any-return]

    def _inferred(self, tiles: Tensor) -> Tensor:
        """The same in half the time: norms are part of the convolutions, and the few channels of a place lie side by side."""
        x = tiles.contiguous(memory_format=torch.channels_last)
        for conv, norm in ((self.conv1, self.norm1), (self.conv2, self.norm2)):
            mean, variance = norm.running_mean, norm.running_var
            assert mean is not None
            assert variance is not None
            weight, bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, mean, variance, norm.eps, norm.weight, norm.bias
            )
            x = self._pool(F.conv2d(x, weight.contiguous(memory_format=torch.channels_last), bias, padding=1).relu_())
        return self.conv3(x).relu_()  # type: ignore[no-any-return]

    def forward(self, features: Tensor) -> Tensor:
        """[K, H, s, s] → [K, 2]"""
        return self.linear(features.flatten(1))  # type: ignore[no-any-return]

    def flops(self, tiles: int, blocks: int) -> int:
        """Of the features of so many tiles and the logits of so many blocks; a multiply-add is 2."""
        h, (first, second, last) = self.heads, self.sides
        return tiles * 2 * h * h * (9 * first**2 + 9 * second**2 + last**2) + blocks * 4 * h * last**2

    @staticmethod
    def _pool(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2) if x.shape[-1] > 1 else x


def _pooled(side: int) -> int:
    return max(side // 2, 1)


def _norm(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Batch norm, by its running statistics also where a training batch has but one value a channel."""
    if norm.training and x.numel() == x.shape[1]:
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
    return norm(x)  # type: ignore[no-any-return]


class BlockSkimPolicy(Policy[BlockSkim]):
    """A predictor for every layer; blocks drop before the feed-forward of the layer whose attention it saw.

    The paper drops them after it. The feed-forward works token by token and nobody reads a dropped token, so the answers are
    the same and its work is saved too. A trace tells what each predictor said, see `predictor_accuracy`.
    """

    dropped_may_answer = False

    def __init__(self, config: BlockSkim, geometry: Geometry) -> None:
        super().__init__(config, geometry)
        for layer in config.layers or ():
            if layer > geometry.layers:
                raise OptionError(f"layers names layer {layer} but the model has {geometry.layers}.")
        self.predictors = nn.ModuleList(
            BlockPredictor(geometry.heads, config.block) for _ in range(geometry.layers)
        )  # also for layers that never drop: all of them are trained
        self.seen: Tensor
        # Irrelevant and relevant blocks: of a stage's rows; where nobody told of them beforehand, of the batches so far.
        self.register_buffer("seen", torch.zeros(2, dtype=torch.int64))
        self.told = False
        self.grain = config.block
        self.skims = frozenset(range(1, geometry.layers) if config.layers is None else config.layers)

    @property
    def learns(self) -> bool:
        """Whether a pass now is one that the predictors are trained by."""
        return self.mode == "soft" or (self.mode == "hard" and self.config.learning == "skimming" and self.training)

    def drops_at(self, layer: int) -> bool:
        return self.mode == "hard" and layer in self.skims and self.config.bar() > -math.inf

    def wants(self, layer: int) -> Wanted:
        if not self.learns and not self.drops_at(layer):
            return NOTHING
        detached = not self.learns or self.config.learning == "frozen"
        if self.config.full_map:
            return Wanted(full=True, detached=detached)
        return Wanted(block=self.config.block, detached=detached)

    def act(self, point: Point, layer: int, tokens: PackedTokens, evidence: Evidence, trace: Trace) -> PackedTokens:
        if point is Point.BEFORE_LAYER and layer == 1 and self.config.keep_question:
            return _question_protected(tokens)
        if point is not Point.AFTER_ATTENTION or not self.wants(layer):
            return tokens
        blocks = Blocks.of(tokens, self.config.block)
        passage = ~blocks.any(tokens.layout.protected)
        if tokens.alive is not None:
            passage = passage & blocks.any(tokens.alive)
        logits = self._logits(layer, tokens, evidence, blocks)
        if not being_exported():
            trace.add(LOGITS, logits)
            trace.add(PLACES, _places(blocks, tokens, passage))
        if not self.drops_at(layer):
            return tokens
        relevant = logits[:, 1] - logits[:, 0] >= self.config.bar()
        return tokens.keep(blocks.spread(relevant | ~passage))

    def _logits(self, layer: int, tokens: PackedTokens, evidence: Evidence, blocks: Blocks) -> Tensor:
        """[K, 2] float32"""
        predictor = self.predictors[layer - 1]
        assert isinstance(predictor, BlockPredictor)
        if not self.config.full_map:
            assert evidence.blocks is not None
            tiles = evidence.blocks.detach() if self.config.learning == "frozen" else evidence.blocks
            return predictor(predictor.features(tiles)).float()  # type: ignore[no-any-return]
        assert evidence.full is not None
        maps = [_tiles(one, self.config.block) for one in evidence.full]
        found = torch.cat([m.flatten(0, 1) for m in maps])
        features = predictor.features(found.detach() if self.config.learning == "frozen" else found)
        sides = [len(m) for m in maps]
        living = torch.ones(sum(sides), device=found.device)
        if tokens.alive is not None:
            living = blocks.any(tokens.alive).to(living.dtype)
        by_row = zip(features.split([k * k for k in sides]), living.split(sides), strict=True)
        means = [_crossing_means(f.unflatten(0, (len(alive), -1)), alive) for f, alive in by_row]
        return predictor(torch.cat(means)).float()  # type: ignore[no-any-return]

    def before_stage(self, batches: Iterable[tuple[PackedTokens, Batch]]) -> None:
        """Count the blocks that beta is derived from."""
        if self.config.beta is not None:
            return
        self.seen.zero_()
        for tokens, batch in batches:
            if self.config.keep_question:
                tokens = _question_protected(tokens)
            blocks = Blocks.of(tokens, self.config.block)
            passage = ~blocks.any(tokens.layout.protected)
            self._count(block_labels(_places(blocks, tokens, passage), batch)[passage])
        self.told = True

    def auxiliary_loss(self, trace: Trace, batch: Batch) -> Tensor | None:
        """alpha * sum over layers of (beta * L_{y=1} + L_{y=0}), equation 3, over blocks of the passage.

        L_{y=1} and L_{y=0} are sums of cross-entropies over the blocks with and without a relevant token (equation 2), divided
        by the sum of all blocks' weights: the authors' code takes this mean, and alpha = .1 belongs to it.
        """
        logits, places = trace.auxiliary.get(LOGITS), trace.auxiliary.get(PLACES)
        if not self.learns or not logits or not places:
            return None
        labels = [block_labels(where, batch) for where in places]
        beta = self._beta(labels[0][places[0][:, 3] > 0])
        total = logits[0].new_zeros(())
        for said, where, label in zip(logits, places, labels, strict=True):
            weight = torch.where(label, beta, 1.0) * where[:, 3]
            losses = F.cross_entropy(said, label.to(torch.int64), reduction="none") * weight
            total = total + losses.sum() / weight.sum().clamp(min=1e-6)
        return self.config.alpha * total

    def _beta(self, labels: Tensor) -> Tensor:
        """The weight of a relevant block. labels: [k] bool, of this batch's passage blocks."""
        if self.config.beta is not None:
            return self.seen.new_tensor(self.config.beta, dtype=torch.float32)
        if self.training and not self.told:
            self._count(labels)
        irrelevant, relevant = self.seen.to(torch.float32).clamp(min=1.0).unbind()
        return irrelevant / relevant

    def _count(self, labels: Tensor) -> None:
        relevant = labels.sum()
        self.seen += torch.stack([len(labels) - relevant, relevant])

    def stages(self) -> tuple[Stage, ...]:
        """One, of the paper's settings, but that the predictors, which start from nothing, learn faster than the model."""
        stage = Stage(name="joint", mode="soft", epochs=2.0, learning_rate=3e-5, policy_learning_rate=1e-3)
        if self.config.learning == "frozen":
            stage = replace(stage, name="frozen", learning_rate=0.0, label_weight=0.0)
        elif self.config.learning == "skimming":
            stage = replace(stage, name="skimming", mode="hard")
        return (stage,)

    def overhead_flops(self, layer: int, n: int, entering: int | None = None) -> int:
        """The predictor's; that it reads parts of the attention map costs no multiplication."""
        if not self.wants(layer):
            return 0
        predictor, number = self.predictors[layer - 1], -(-n // self.config.block)
        assert isinstance(predictor, BlockPredictor)
        return predictor.flops(number**2 if self.config.full_map else number, number)


def _question_protected(tokens: PackedTokens) -> PackedTokens:
    """The same tokens, those of segment 0 protected in rows that have another segment too."""
    layout = tokens.layout
    passage = layout.segments > 0
    question = ~passage & (layout.spread(layout.count(passage)) > 0)
    new = replace(layout, protected=layout.protected | question)
    return replace(tokens, layout=new.knowing(layout.sizes) if not layout.single else new)


def _places(blocks: Blocks, tokens: PackedTokens, passage: Tensor) -> Tensor:
    """[K, 4] int64, what a trace has as PLACES. passage: [K] bool."""
    return torch.stack([blocks.rows, *blocks.ends(tokens.positions), passage.to(torch.int64)], 1)


def _tiles(probabilities: Tensor, size: int) -> Tensor:
    """[H, n, n] → [k, k, H, b, b], zero beyond n; the first index is the querying block's."""
    short = -probabilities.shape[-1] % size
    padded = F.pad(probabilities, (0, short, 0, short))
    tiles: Tensor = padded.unflatten(2, (-1, size)).unflatten(1, (-1, size))
    return tiles.permute(1, 3, 0, 2, 4)


def _crossing_means(features: Tensor, living: Tensor) -> Tensor:
    """[k, k, H, s, s] → [k, H, s, s]: the mean over the tiles of each block's row and column, those of living blocks ([k])."""
    weight = living / living.sum()
    asks = torch.einsum("ijhst,j->ihst", features, weight)
    asked = torch.einsum("jihst,j->ihst", features, weight)
    return (asks + asked) / 2


def block_labels(places: Tensor, batch: Batch) -> Tensor:
    """[K] bool, whether a block is relevant: it has a token of the answer or of the evidence.

    places: [K, 4] of the trace. batch: start_positions and end_positions, [B], columns of the answer's first and last token
    (both 0: there is none); or evidence, [B, N], 1 where a token is a supporting fact; or all of them.
    Raises OptionError when it has neither.
    """
    row, first, last, _ = places.unbind(1)
    label = torch.zeros_like(row, dtype=torch.bool)
    start, end, evidence = (batch.get(name) for name in ("start_positions", "end_positions", "evidence"))
    if (start is None or end is None) and evidence is None:
        raise OptionError("Block-Skim learns from start_positions and end_positions, or evidence; the batch has none.")
    if start is not None and end is not None:
        start, end = start.reshape(-1)[row], end.reshape(-1)[row]
        label = label | ((first <= end) & (last >= start) & (start <= end) & ((start > 0) | (end > 0)))
    if evidence is not None:
        sums = F.pad((evidence > 0).to(torch.int64).cumsum(1), (1, 0))
        label = label | (sums[row, last + 1] > sums[row, first])
    return label


class Accuracy(NamedTuple):
    """What one layer's predictor said of passage blocks, at probability one half: how many it was right about, how many
    there were, how many of the relevant ones it found, and how many those were."""

    right: int
    blocks: int
    found: int
    relevant: int


def predictor_accuracy(trace: Trace, batch: Batch) -> list[Accuracy]:
    """Of every layer whose predictor ran in a pass, in the order of layers, against what `batch` says (see `block_labels`).

    In soft mode every layer's predictor sees every block; in hard mode those of layers that drop see what is left.
    """
    found = []
    for logits, places in zip(trace.auxiliary.get(LOGITS, []), trace.auxiliary.get(PLACES, []), strict=True):
        passage = places[:, 3] > 0
        label, said = block_labels(places, batch)[passage], logits.argmax(1)[passage] > 0
        counts = (label == said).sum(), label.numel(), (label & said).sum(), label.sum()
        found.append(Accuracy(*(int(count) for count in counts)))
    return found


__all__ = ["Accuracy", "BlockPredictor", "BlockSkim", "BlockSkimPolicy", "block_labels", "predictor_accuracy"]
