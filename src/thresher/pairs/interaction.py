"""MixEncoder's lightweight cross-attention: candidates look at their query, none at another candidate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thresher.backbones.opened import OpenedLayer
from thresher.pairs.layers import Linears, after_attention, together

Residual = Literal["attended", "previous"]
LookedAt = tuple[
    Tensor, Tensor, Tensor
]  # of a query: keys and values [H, n, d], and the states [n, D] they were made of


class Interaction(nn.Module):
    """One interaction layer (equations 1 and 2). Holds what the encoder's own layer lacks; that layer is handed in.

    Q', K' and V' are one product, which begins as the layer's own. Q* is the mean of a candidate's Q' (their projection of its
    mean state), so its logits are the mean of logits that are there already. The layer's attention output and feed-forward,
    shared by both sides, run once over E and H together, and over the candidates of all queries: where every query brings few,
    as in training, going over the weights for each of them would take longer than the products.
    """

    def __init__(self, layer: OpenedLayer, size: int, *, use_h: bool, use_e: bool, residual: Residual) -> None:
        super().__init__()
        own = (layer.query, layer.key, layer.value) if use_e else (layer.query,)
        self.project = nn.Linear(size, len(own) * size)
        with torch.no_grad():
            self.project.weight.copy_(torch.cat([linear.weight for linear in own]))
            self.project.bias.copy_(torch.cat([linear.bias for linear in own]))
        self.gate = nn.Linear(3 * size, size) if use_h else None
        if self.gate is not None:
            nn.init.normal_(self.gate.weight, std=0.02)
            nn.init.zeros_(self.gate.bias)
        self.use_e = use_e
        self.residual = residual

    def forward(
        self,
        layer: OpenedLayer,
        linears: Linears,
        queries: Sequence[LookedAt],
        counts: Sequence[int],
        e: Tensor,
        h: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """counts: of how many of the N candidates each query is looked at, in order. e: [N, k, D], E_{j-1}; h: [N, D], H_{j-1},
        None for zero.

        Returns E_j [N, k, D] and H_j [N, D] (None without H).
        """
        count, k, size = e.shape
        flat = e.reshape(count * k, size)
        parts = linears(self.project, flat).view(count * k, -1, layer.heads, size // layer.heads).unbind(1)
        pieces = zip(*(part.split([n * k for n in counts]) for part in parts), strict=True)
        mixed, contexts, attended = [], [], []
        for (key, value, states), piece in zip(queries, pieces, strict=True):
            logits = torch.matmul(piece[0].transpose(0, 1), key.transpose(1, 2)) * layer.scale  # [H, N k, n]
            if self.use_e:
                mixed.append(self._mixed(layer, piece, logits, value, k))
            if self.gate is not None:
                pooled = logits if k == 1 else logits.unflatten(1, (-1, k)).mean(2)
                attention = pooled.softmax(-1)  # [H, N, n]
                contexts.append(together(self._dropped(layer, attention) @ value))
                if self.residual == "attended":
                    attended.append(attention.mean(0) @ states)
        if self.gate is not None and self.residual == "previous":
            attended.append(flat.new_zeros(count, size) if h is None else h)
        residuals = [flat, *attended] if self.use_e else attended
        done = after_attention(layer, torch.cat([*mixed, *contexts]), torch.cat(residuals), linears)
        new_e = done[: count * k].view(count, k, size) if self.use_e else e
        if self.gate is None:
            return new_e, None
        return new_e, self._gated(e.mean(1), done[-count:], h, linears)

    def flops(self, layer: OpenedLayer, k: int, n: int) -> int:
        """Of one candidate of k vectors and a query of n tokens."""
        size, wide = self.project.in_features, layer.up.out_features
        vectors = k * self.use_e + (self.gate is not None)
        spent = 2 * k * self.project.weight.numel() + 2 * k * n * size  # Q', K', V', and the logits of the query's keys
        if self.use_e:
            spent += 4 * k * k * size + 2 * k * n * size
        if self.gate is not None:
            spent += 2 * n * size + 2 * self.gate.weight.numel()
            spent += 2 * n * size if self.residual == "attended" else 0
        return spent + vectors * (2 * size * size + 4 * size * wide)

    def _dropped(self, layer: OpenedLayer, attention: Tensor) -> Tensor:
        return F.dropout(attention, layer.dropout.p) if layer.dropout.training else attention

    def _mixed(self, layer: OpenedLayer, parts: tuple[Tensor, ...], logits: Tensor, value: Tensor, k: int) -> Tensor:
        """Equation 1, before the output projection: [N k, D]. One softmax over the query's keys and a candidate's own k."""
        heads, total, length = logits.shape
        q, own_key, own_value = (x.view(total // k, k, layer.heads, -1) for x in parts)
        # [N, k, 1, H, d] * [N, 1, k, H, d]: k is small, and a product of each with each other candidate's would be [N, N].
        own = (q.unsqueeze(2) * own_key.unsqueeze(1)).sum(-1) * layer.scale  # [N, k, k, H]
        own = own.permute(3, 0, 1, 2).reshape(heads, total, k)
        attention = self._dropped(layer, torch.cat([logits, own], -1).softmax(-1))
        context = torch.matmul(attention[..., :length], value).transpose(0, 1)  # [N k, H, d]
        weights = attention[..., length:].permute(1, 2, 0).view(total // k, k, k, heads, 1)
        mixed = context.reshape(total // k, k, heads, -1) + (weights * own_value.unsqueeze(1)).sum(2)
        return mixed.reshape(total, -1)

    def _gated(self, hint: Tensor, new: Tensor, h: Tensor | None, linears: Linears) -> Tensor:
        """Equation 2's gate, g = sigmoid(W [hint; new; old]), H_j = g * new + (1 - g) * old; hint: mean E_{j-1}."""
        assert self.gate is not None
        old = torch.zeros_like(new) if h is None else h
        gate = torch.sigmoid(linears(self.gate, torch.cat([hint, new, old], -1)))
        return old + gate * (new - old)
