"""The output head and the loss behind it, for supervised rows only and a slice of them at a time.

TRL's way scores every position of every row, padding included; for a vocabulary of 262,144 that is most of the work.
Here the logits of a few rows at a time exist, and where the loss's derivative is known in advance (weighted negative
log-likelihood) the gradient is formed in the same pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from tunesmith.cpu import rowwise
from tunesmith.cpu.products import Panels, back_product, product

LOGITS_AT_ONCE = 1 << 22  # 16 MB of float32: what stays in a cache, and an allocator gives again without new pages
ROWS_AT_ONCE = 64  # at least, however large the vocabulary: for fewer the head's weights are fetched too often


@dataclass(frozen=True)
class Head:
    """hidden [rows, hidden] -> logits [rows, vocabulary] = cap(scale * (hidden @ weight.T + bias)).

    `panels`, where the weight is frozen and there is memory for it: a copy that is multiplied faster. `own`: ids [n] of
    tokens whose weight is another, and that, [n, hidden].
    """

    weight: Tensor  # [vocabulary, hidden]
    bias: Tensor | None = None
    scale: float = 1.0  # Granite, Cohere
    softcap: float | None = None  # Gemma 2: softcap * tanh(logits / softcap)
    panels: Panels | None = None
    own: tuple[Tensor, Tensor] | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        out = nn.functional.linear(hidden, self.weight, self.bias)
        if self.own is not None:
            out = out.index_copy(-1, self.own[0], hidden @ self.own[1].t())
        return self.finish(out)

    @property
    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What a gradient may be wanted of: weight, bias, and the weights of single tokens."""
        return self.weight, self.bias, None if self.own is None else self.own[1]

    def finish(self, out: Tensor) -> Tensor:
        """What the model does to its logits after the product with the head's weight."""
        out = out if self.scale == 1.0 else out * self.scale
        return out if self.softcap is None else self.softcap * torch.tanh(out / self.softcap)


def head_of(model: PreTrainedModel) -> Head:
    """The model's output head, with what its configuration says is done to the logits."""
    config, module = model.config.get_text_config(), model.get_output_embeddings()
    scale = getattr(config, "logit_scale", None) or 1.0
    if getattr(config, "logits_scaling", None):
        scale = 1.0 / config.logits_scaling
    softcap = getattr(config, "final_logit_softcapping", None)
    bias, own = getattr(module, "bias", None), getattr(module, "own", None)
    return Head(module.weight, bias, scale, softcap, own=own)  # type: ignore[union-attr]


@dataclass(frozen=True)
class Entries:
    """What is scored: entry i asks the log-probability of `targets[i]` at row `rows[i]` of the hidden states."""

    rows: Tensor  # [entries] ascending
    targets: Tensor  # [entries]


class Scores:
    """Log-probabilities of entries, computed when a loss asks for them. hidden [rows, hidden]; each method once."""

    def __init__(self, hidden: Tensor, head: Head, entries: Entries) -> None:
        self.hidden, self.head, self.entries = hidden, head, entries
        self.correct: Tensor | None = None  # [entries] bool: the target was the likeliest token; set by either method

    def weighted_nll(self, weights: Tensor) -> Tensor:
        """-sum(weights * logprobs), its gradient formed in the forward pass. weights [entries]."""
        value, self.correct = _WeightedNll.apply(self.hidden, *self.head.tensors, self.head, self.entries, weights)
        return value

    def logprobs(self) -> Tensor:
        """[entries] float32, differentiable in any way; the backward pass computes the logits again."""
        value, self.correct = _LogProbs.apply(self.hidden, *self.head.tensors, self.head, self.entries)
        return value

    @torch.no_grad()
    def likeliest(self, k: int, vocabulary: int) -> tuple[Tensor, Tensor]:
        """[entries, k] the k likeliest tokens below `vocabulary` at each entry's row, and their log-probabilities."""
        count, k = len(self.entries.rows), min(k, vocabulary)
        tokens = torch.empty(count, k, dtype=torch.long, device=self.hidden.device)
        logprobs = torch.empty(count, k, device=self.hidden.device)
        for here in _slices(self.hidden, self.head, self.entries):
            lse, _ = _normalise(here.logits)
            values, ids = here.logits[:, :vocabulary].topk(k, dim=-1)
            tokens[here.entries], logprobs[here.entries] = ids[here.rows], (values - lse)[here.rows].float()
        return tokens, logprobs

    def of_tokens(self, entries: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of several tokens at the row of one entry each, and which of them were the likeliest.

        entries [n], tokens [n, k] -> [n, k] both; the first is differentiable.
        """
        rows = self.entries.rows[entries]
        order = torch.argsort(rows, stable=True)
        wide = Entries(rows[order].repeat_interleave(tokens.shape[1]), tokens[order].reshape(-1))
        scores = Scores(self.hidden, self.head, wide)
        found = scores.logprobs().view_as(tokens)
        assert scores.correct is not None
        back = torch.argsort(order)
        return found[back], scores.correct.view_as(tokens)[back]


@dataclass
class _Slice:
    """The logits of rows [start, stop) and the entries that ask about them."""

    start: int
    stop: int
    entries: slice
    rows: Tensor  # [entries] counted from start
    targets: Tensor
    logits: Tensor  # [stop - start, vocabulary], capped

    @property
    def picked(self) -> Tensor:
        return self.logits[self.rows, self.targets]


def rows_at_once(vocabulary: int) -> int:
    """Of how many rows the logits exist at a time."""
    return max(ROWS_AT_ONCE, LOGITS_AT_ONCE // vocabulary)


def _slices(hidden: Tensor, head: Head, entries: Entries) -> Iterator[_Slice]:
    vocabulary, dtype = head.weight.shape[0], torch.promote_types(hidden.dtype, torch.float32)
    size = rows_at_once(vocabulary)
    buffer = hidden.new_empty(min(size, len(hidden)), vocabulary)
    for start in range(0, len(hidden), size):
        stop = min(start + size, len(hidden))
        first, last = torch.searchsorted(entries.rows, torch.tensor([start, stop], device=hidden.device)).tolist()
        if head.panels is None:
            logits = torch.mm(hidden[start:stop], head.weight.t(), out=buffer[: stop - start]).to(dtype)
        else:
            logits = product(hidden[start:stop], head.panels, out=buffer[: stop - start])
        if head.bias is not None:
            logits += head.bias
        if head.own is not None:
            logits[:, head.own[0]] = (hidden[start:stop] @ head.own[1].detach().t()).to(logits.dtype)
        if head.scale != 1.0:
            logits *= head.scale
        if head.softcap is not None:
            logits.div_(head.softcap).tanh_().mul_(head.softcap)
        asked = slice(first, last)
        yield _Slice(start, stop, asked, entries.rows[asked] - start, entries.targets[asked], logits)


def _normalise(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and maximum of each row, [rows, 1] both."""
    if rowwise.usable(logits):
        lse, top = (logits.new_empty(len(logits), 1) for _ in range(2))
        rowwise.normalise(logits, lse, top)
        return lse, top
    top = logits.amax(-1, keepdim=True)
    return torch.logsumexp(logits, -1, keepdim=True), top


def _probabilities(logits: Tensor, lse: Tensor, factor: Tensor) -> Tensor:
    """exp(logits - lse) * factor, where the logits were. lse and factor [rows, 1]."""
    if rowwise.usable(logits):
        rowwise.probabilities(logits, lse, factor)
        return logits
    return logits.sub_(lse).exp_().mul_(factor)


class _Gradients:
    """Collects the gradients of hidden and of the head's tensors, slice by slice, where they are wanted."""

    def __init__(self, hidden: Tensor, head: Head, wanted: Sequence[bool]) -> None:
        self.source, self.head = hidden, head
        self.hidden = torch.empty_like(hidden) if wanted[0] else None
        self.weight = torch.zeros_like(head.weight) if wanted[1] else None
        self.bias = torch.zeros_like(head.bias) if wanted[2] and head.bias is not None else None
        self.own = torch.zeros_like(head.own[1]) if wanted[3] and head.own is not None else None

    @property
    def found(self) -> tuple[Tensor | None, ...]:
        return self.hidden, self.weight, self.bias, self.own

    def add(self, here: _Slice, lse: Tensor, by_entry: Tensor) -> None:
        """`by_entry` [entries]: derivative of the loss by each log-probability. Overwrites the logits."""
        by_row = torch.zeros_like(lse).index_add_(0, here.rows, by_entry[:, None])
        capped = None if self.head.softcap is None else here.logits.clone()
        grad = _probabilities(here.logits, lse, -by_row)
        grad.index_put_((here.rows, here.targets), by_entry, accumulate=True)
        if capped is not None and self.head.softcap is not None:
            grad *= 1 - (capped / self.head.softcap).square_()
        if self.head.scale != 1.0:
            grad *= self.head.scale
        grad = grad.to(self.source.dtype)
        apart = None
        if self.head.own is not None:
            ids, rows = self.head.own
            apart = grad[:, ids]
            grad[:, ids] = 0
            if self.own is not None:
                self.own.addmm_(apart.t(), self.source[here.start : here.stop])
            apart = apart @ rows.detach()
        if self.hidden is not None:
            into = self.hidden[here.start : here.stop]
            if self.head.panels is None:
                torch.mm(grad, self.head.weight, out=into)
            else:
                back_product(grad, self.head.panels, out=into)
            if apart is not None:
                into += apart
        if self.weight is not None:
            self.weight.addmm_(grad.t(), self.source[here.start : here.stop])
        if self.bias is not None:
            self.bias += grad.sum(0)


class _WeightedNll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        own: Tensor | None,
        head: Head,
        entries: Entries,
        weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        grads = _Gradients(hidden, head, ctx.needs_input_grad[:4]) if any(ctx.needs_input_grad[:4]) else None
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        correct = torch.empty(len(entries.rows), dtype=torch.bool, device=hidden.device)
        for here in _slices(hidden, head, entries):
            lse, top = _normalise(here.logits)
            picked, by_entry = here.picked, -weights[here.entries].to(lse.dtype)
            correct[here.entries] = picked == top[here.rows, 0]
            total += torch.dot(by_entry.double(), (picked - lse[here.rows, 0]).double())
            if grads is not None:
                grads.add(here, lse, by_entry)
        ctx.grads = () if grads is None else grads.found
        ctx.mark_non_differentiable(correct)
        return total, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        scaled = tuple(None if g is None else g.mul_(upstream[0].to(g.dtype)) for g in ctx.grads)
        return *scaled, None, None, None


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, own: Tensor | None, head: Head, entries: Entries
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        out = torch.empty(len(entries.rows), dtype=dtype, device=hidden.device)
        lses = torch.empty(len(hidden), 1, dtype=dtype, device=hidden.device)
        correct = torch.empty(len(entries.rows), dtype=torch.bool, device=hidden.device)
        for here in _slices(hidden, head, entries):
            lse, top = _normalise(here.logits)
            lses[here.start : here.stop] = lse
            out[here.entries] = here.picked - lse[here.rows, 0]
            correct[here.entries] = here.picked == top[here.rows, 0]
        ctx.save_for_backward(hidden, lses)
        ctx.head, ctx.entries = head, entries
        ctx.mark_non_differentiable(correct)
        return out, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, lses = ctx.saved_tensors
        grads = _Gradients(hidden, ctx.head, ctx.needs_input_grad[:4])
        for here in _slices(hidden, ctx.head, ctx.entries):
            grads.add(here, lses[here.start : here.stop], upstream[0][here.entries])
        return *grads.found, None, None
