"""The losses of one stage, as a module: what a trainer wraps, and what a loop of your own can call."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thresher.errors import OptionError
from thresher.measure.run import said
from thresher.model import attachment_of, detach, find_encoder, is_attached
from thresher.policy import Draw, Stage, Trace, tracing
from thresher.targets import LABELS
from thresher.training.row_losses import row_losses

FOR_THE_POLICY = ("evidence", "saliency")  # [B, N], a value a token: columns that no model takes


def stock_copy(model: Any) -> Any:
    """A frozen copy of `model` as it is now, without its policy: the teacher of self-distillation."""
    teacher = copy.deepcopy(model)
    if is_attached(teacher):
        detach(teacher)
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
    return teacher.eval()


def distillation_loss(
    student: Any, teacher: Any, mask: Tensor | None = None, *, reverse: bool = False, sigmoid: bool = False
) -> Tensor:
    """How far the student's outputs are from the teacher's.

    Sentence embeddings: 1 - cosine, plus what `neighbourhood_loss` says. One logit: the squared difference. Several:
    KL(teacher || student), or KL(student || teacher) when `reverse`; of token logits over the real tokens, of span logits over
    the positions of each row. Logits of probabilities (`sigmoid`), one or several: each as if it were two.
    """
    ours, theirs = said(student, mask).float(), said(teacher, mask).float()
    if "sentence_embedding" in student or "last_hidden_state" in student:
        return (1 - F.cosine_similarity(ours, theirs, dim=-1)).mean() + neighbourhood_loss(ours, theirs)
    if "start_logits" in student:
        assert mask is not None
        hide = ~mask.bool().unsqueeze(-1)
        ours, theirs = (x.masked_fill(hide, -1e4).transpose(1, 2).flatten(0, 1) for x in (ours, theirs))
    elif ours.dim() == 3:
        assert mask is not None
        ours, theirs = ours[mask.bool()], theirs[mask.bool()]
    if ours.shape[-1] == 1 and not sigmoid:
        return F.mse_loss(ours, theirs)
    if sigmoid:
        ours, theirs = (F.pad(x.reshape(-1, 1), (1, 0)) for x in (ours, theirs))
    if reverse:
        ours, theirs = theirs, ours
    return F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="batchmean")


def neighbourhood_loss(ours: Tensor, theirs: Tensor, temperature: float = 0.05) -> Tensor:
    """How far each embedding's similarities to the others of the batch have moved: what a search ranks by.

    ours, theirs: [B, D]. KL between softmax(theirs_i . theirs_j / temperature) and softmax(ours_i . theirs_j / temperature)
    over j != i, times the temperature (so that it weighs like a cosine). Zero for a batch of one.
    """
    if len(ours) < 2:
        return ours.new_zeros(())
    ours, theirs = F.normalize(ours, dim=-1), F.normalize(theirs, dim=-1)
    own = torch.eye(len(ours), dtype=torch.bool, device=ours.device)
    wanted, got = ((x @ theirs.T / temperature).masked_fill(own, -1e4).log_softmax(-1) for x in (theirs, ours))
    return temperature * F.kl_div(got, wanted, log_target=True, reduction="batchmean")


class Learner(nn.Module):
    """Model, policy, exit and the stage's losses together, so that a trainer saves, moves and synchronises both.

    forward(**batch) → {"loss", "logits"}; batch is what the model takes, with labels where the stage uses them, and what only
    the policy's own loss reads.
    """

    # Else Trainer thinks that **batch takes num_items_in_batch and leaves the loss undivided when accumulating.
    accepts_loss_kwargs = False

    def __init__(self, model: Any, stage: Stage, teacher: Any = None) -> None:
        super().__init__()
        attachment = attachment_of(model)
        if stage.distil_weight and teacher is None:
            teacher = stock_copy(model)
        self.model = model
        self.policy = attachment.policy
        self.exit = attachment.exit
        self.stage = stage
        self._teacher = [teacher]  # in a list: not a submodule, so neither trained nor saved
        self.takes_features = find_encoder(model) is not model
        # Logits learned by binary cross-entropy, which transformers wants labels [B, C] for, also where there is one.
        self.sigmoid = getattr(find_encoder(model).config, "problem_type", None) == "multi_label_classification"

    def train(self, mode: bool = True) -> Learner:
        return super().train(mode and self.stage.dropout)

    def _call(self, model: Any, batch: dict[str, Tensor]) -> Any:
        if self.sigmoid and "labels" in batch:
            labels = batch["labels"]
            batch = {**batch, "labels": labels.reshape(len(labels), -1).float()}
        return model(batch) if self.takes_features else model(**batch)

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        stage, mask, given = self.stage, batch.get("attention_mask"), batch
        hidden = FOR_THE_POLICY if stage.label_weight else (*FOR_THE_POLICY, *LABELS)
        batch = {k: v for k, v in batch.items() if k not in hidden}
        # A stage of the exit is one plain pass of what the policy's stages have made.
        policy = self.policy if not stage.exits else None
        judged = policy is not None and policy.reads_row_losses
        made: list[tuple[Trace, Tensor]] = []
        loss, first = None, None
        for draw in policy.draws(stage) if policy else (Draw(None, stage.label_weight, stage.distil_weight),):
            with tracing() as traces, draw.applied():
                outputs = self._call(self.model, dict(batch))
            first = outputs if first is None else first
            added = self._loss(draw, outputs, first, batch)
            if policy is not None:
                added = policy.total_loss(added, traces[-1], given)
            if self.exit is not None and stage.exits:
                own = self.exit.auxiliary_loss(traces[-1], said(outputs, mask), given)
                added = added if own is None else added + own
            loss = added if loss is None else loss + added
            if judged:
                made.append((traces[-1], row_losses(outputs, given, sigmoid=self.sigmoid)))
        assert first is not None
        assert loss is not None
        if policy is not None and made:
            passes, losses = zip(*made, strict=True)
            together = policy.step_loss(passes, losses, given)
            loss = loss if together is None else loss + together
        return {"loss": loss, "logits": said(first, mask)}

    def _loss(self, draw: Draw, outputs: Any, first: Any, batch: dict[str, Tensor]) -> Tensor:
        """What one pass of the step adds to the loss."""
        loss = said(outputs, batch.get("attention_mask")).new_zeros((), dtype=torch.float32)
        if draw.label_weight:
            if outputs.get("loss") is None:
                raise OptionError(f"The stage {self.stage.name!r} learns from labels, but the batch has none.")
            loss = loss + draw.label_weight * outputs["loss"]
        if draw.distil_weight:
            wanted = _detached(first) if draw.from_first else self._taught(batch)
            loss = loss + draw.distil_weight * distillation_loss(
                outputs, wanted, batch.get("attention_mask"), reverse=draw.reverse, sigmoid=self.sigmoid
            )
        return loss

    def _taught(self, batch: dict[str, Tensor]) -> Any:
        """What the teacher says of the batch."""
        teacher = self._teacher[0]
        if teacher.device != self.model.device:
            teacher.to(self.model.device)
        with torch.no_grad():
            return self._call(teacher, {k: v for k, v in batch.items() if k not in LABELS})


def _detached(outputs: Any) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in outputs.items() if isinstance(value, Tensor)}
