"""LoRA (Hu et al. 2021, arXiv:2106.09685): y = W x + s B A x, with A [rank, in], B [out, rank], s = alpha / rank.

One layer class serves training and serving: it holds any number of adapters over one frozen linear, and the model's
`Routing` says which rows of a forward pass go through which adapter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tunesmith.errors import InputError
from tunesmith.models.dora import gain, lengths
from tunesmith.models.embedding import LoraEmbedding, TokenRows
from tunesmith.models.quantised import QuantisedLinear
from tunesmith.recipe import Adapter as AdapterSection

EVERY_ROW = 1 << 62
PARTS = ("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")  # PEFT's names; an embedding's


@dataclass
class Routing:
    """Which adapter each row of the flat token sequence uses. Rows in no segment go through the base alone."""

    segments: tuple[tuple[str, int, int], ...] = ()  # (adapter name, first row, one past the last row)


@dataclass
class LoraWeights:
    a: nn.Parameter  # [rank, in]
    b: nn.Parameter  # [out, rank]
    scaling: float
    dropout: float = 0.0
    magnitude: nn.Parameter | None = None  # [out]: of DoRA


class LoraLinear(nn.Module):
    """A frozen linear and the adapters over it. Input [..., tokens, in] with leading dimensions of 1."""

    def __init__(self, base: nn.Linear | Conv1D | QuantisedLinear, routing: Routing) -> None:
        super().__init__()
        self.base = base
        self.routing = routing
        self.adapters: dict[str, LoraWeights] = {}
        self.tokens: dict[str, TokenRows] = {}  # of the output head
        self.transposed = isinstance(base, Conv1D)  # Conv1D keeps its weight as [in, out]
        if isinstance(base, Conv1D):
            self.in_features, self.out_features = int(base.nx), int(base.nf)
        else:
            self.in_features, self.out_features = base.in_features, base.out_features

    def forward(self, x: Tensor) -> Tensor:
        if self._learns_alone(x):
            adapter = self.adapters[self.routing.segments[0][0]]
            return _LoraProduct.apply(
                x, self.base.weight, self.base.bias, adapter.a, adapter.b, adapter.scaling, self.transposed
            )
        y = self.base(x)
        for name, start, stop in self.routing.segments:
            if name not in self.adapters and name not in self.tokens:
                continue
            stop = min(stop, x.shape[-2])
            part = self.turned(name, x[..., start:stop, :], y[..., start:stop, :])
            whole = stop - start == x.shape[-2]
            y = part if whole else torch.cat((y[..., :start, :], part, y[..., stop:, :]), dim=-2)
        return y

    def turned(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """y = W x + bias as an adapter makes it. x [..., rows, in]; y and the result [..., rows, out]."""
        adapter, tokens = self.adapters.get(name), self.tokens.get(name)
        y = y if adapter is None else y + self._delta(adapter, x, y)
        return y if tokens is None else tokens.scored(x, y)

    def _delta(self, adapter: LoraWeights, x: Tensor, y: Tensor) -> Tensor:
        rows = F.dropout(x, adapter.dropout, self.training)
        delta = F.linear(F.linear(rows.to(adapter.a.dtype), adapter.a), adapter.b) * adapter.scaling
        if adapter.magnitude is not None:
            weight = self.dense()
            dropped = self.training and adapter.dropout > 0  # then W x is of what was left of x, as in PEFT
            plain = F.linear(rows, weight) if dropped else y if self.base.bias is None else y - self.base.bias
            g = gain(weight, adapter)
            delta = (g - 1) * plain + g * delta
        return delta.to(y.dtype)

    def _learns_alone(self, x: Tensor) -> bool:
        """A gradient is wanted, one adapter covers every row, and nothing stands between it and the plain formula."""
        if not torch.is_grad_enabled() or len(self.routing.segments) != 1:
            return False
        name, start, stop = self.routing.segments[0]
        adapter = self.adapters.get(name)
        if (
            adapter is None
            or self.tokens
            or start > 0
            or stop < x.shape[-2]
            or not isinstance(self.base, nn.Linear | Conv1D)
        ):
            return False
        if adapter.magnitude is not None or (adapter.dropout and self.training):
            return False
        return adapter.a.dtype == self.base.weight.dtype == x.dtype

    @property
    def weight(self) -> Tensor:
        """[out, in] as the adapter that every row uses makes it (without dropout): an output head is scored with it."""
        adapter = self.adapters.get(str(self._covering()))
        if adapter is None:
            return self.dense()
        turned = torch.addmm(self.dense().to(adapter.a.dtype), adapter.b, adapter.a, alpha=adapter.scaling)
        turned = turned if adapter.magnitude is None else gain(self.dense(), adapter)[:, None] * turned
        return turned.to(self.base.weight.dtype)

    @property
    def own(self) -> tuple[Tensor, Tensor] | None:
        """ids [n] and weights [n, in] of the tokens that the adapter of every row has itself."""
        tokens = self.tokens.get(str(self._covering()))
        return None if tokens is None else (tokens.ids, tokens.rows)

    def _covering(self) -> str | None:
        """The adapter that the model is set to."""
        return next((name for name, start, stop in self.routing.segments if start == 0 and stop == EVERY_ROW), None)

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def dense(self) -> Tensor:
        """W [out, in], however the base keeps it."""
        return self.base.weight.t() if self.transposed else self.base.weight


class _LoraProduct(torch.autograd.Function):
    """y = x W^T + bias + s (x A^T) B^T with a backward that keeps only x and the thin product h = x A^T.

    With g = s dy B:  dx = dy W + g A,  dA = g^T x,  dB = s dy^T h.  The base is frozen: W and bias get no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        transposed: bool,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        base = weight if transposed else weight.t()  # [in, out]
        y = torch.mm(flat, base) if bias is None else torch.addmm(bias, flat, base)
        thin = flat @ a.t()
        y.addmm_(thin, b.t(), alpha=scaling)
        ctx.save_for_backward(flat, weight, a, b, thin)
        ctx.scaling, ctx.transposed, ctx.shape = scaling, transposed, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        flat, weight, a, b, thin = ctx.saved_tensors
        dy = upstream[0].reshape(len(flat), -1)
        g = (dy @ b).mul_(ctx.scaling)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ (weight.t() if ctx.transposed else weight)).addmm_(g, a).view(ctx.shape)
        db = (thin.t() @ dy).t().mul(ctx.scaling)
        return dx, None, None, g.t() @ flat, db, None, None


@dataclass
class LoraModel:
    """A base whose linears carry adapters, and its two ends, the embedding and the output head."""

    model: PreTrainedModel
    routing: Routing
    layers: dict[str, LoraLinear] = field(default_factory=dict)  # by the inner linear's name in the base
    ends: dict[str, LoraLinear | LoraEmbedding] = field(default_factory=dict)

    @property
    def everywhere(self) -> dict[str, LoraLinear | LoraEmbedding]:
        """All that can carry an adapter, by name."""
        return {**self.layers, **self.ends}

    @property
    def head(self) -> LoraLinear | None:
        """The output head where it is wrapped."""
        return next((end for end in self.ends.values() if isinstance(end, LoraLinear)), None)

    def parameters(self, adapter: str) -> Iterator[tuple[str, nn.Parameter]]:
        """The adapter's parameters by PEFT's names, in a fixed order."""
        for name, layer in self.everywhere.items():
            weights = layer.adapters.get(adapter)
            if weights is not None:
                a, b = PARTS[isinstance(layer, LoraEmbedding)]
                yield f"base_model.model.{name}.{a}", weights.a
                yield f"base_model.model.{name}.{b}", weights.b
                if weights.magnitude is not None:
                    yield f"base_model.model.{name}.lora_magnitude_vector", weights.magnitude
        for name, tokens in self.token_rows(adapter).items():
            yield f"base_model.model.{name}.token_adapter.trainable_tokens_delta", tokens.rows

    def token_rows(self, adapter: str) -> dict[str, TokenRows]:
        """The adapter's own rows by the end they are for: once where both ends share them."""
        found = {name: end.tokens[adapter] for name, end in self.ends.items() if adapter in end.tokens}
        shared = len({id(tokens) for tokens in found.values()}) < len(found)
        return dict([*found.items()][:1]) if shared else found

    def use(self, adapter: str | None) -> None:
        """Send every row through one adapter (training, evaluation), or through the base alone."""
        self.routing.segments = () if adapter is None else ((adapter, 0, EVERY_ROW),)


def linears(model: PreTrainedModel) -> dict[str, nn.Linear | Conv1D | QuantisedLinear]:
    """Every linear of the model by name, the output head left out (as PEFT's all-linear)."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D | QuantisedLinear) and module is not head
    }


def target_names(names: list[str], ends: list[str], target_modules: str | tuple[str, ...]) -> list[str]:
    """Which of a base's modules a recipe's `target_modules` selects, by PEFT's rules. Raises InputError if none.

    `names` are the inner linears; `ends`, the embedding and the head, must be asked for.
    """
    inner, names = names, [*names, *ends]
    if target_modules == "all-linear":
        chosen = inner
    elif isinstance(target_modules, str):
        try:
            pattern = re.compile(target_modules)
        except re.error as error:
            raise InputError(f'adapter.target_modules "{target_modules}" is not a regex: {error}') from None
        chosen = [name for name in names if pattern.fullmatch(name)]
    else:
        chosen = [n for n in names if any(n == target or n.endswith("." + target) for target in target_modules)]
    if not chosen:
        kinds = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
        raise InputError(f'adapter.target_modules "{target_modules}" matches no linear of the base; it has {kinds}')
    return chosen


def wrap(model: PreTrainedModel) -> LoraModel:
    """Put a LoraLinear over every linear of the base (and its ends) and freeze it. Base weights' names gain `.base`."""
    model.requires_grad_(False)
    lora = LoraModel(model, Routing())
    ends = {name: module for name, module in model.named_modules() if _is_end(model, module)}
    for name, linear in linears(model).items():
        lora.layers[name] = LoraLinear(linear, lora.routing)
    for name, end in ends.items():
        lora.ends[name] = (LoraEmbedding if isinstance(end, nn.Embedding) else LoraLinear)(end, lora.routing)  # type: ignore[arg-type]
    for name, layer in lora.everywhere.items():
        replace_module(model, name, layer)
    return lora


def replace_module(model: PreTrainedModel, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def _is_end(model: PreTrainedModel, module: nn.Module) -> bool:
    if module is model.get_input_embeddings():
        return isinstance(module, nn.Embedding)
    return module is model.get_output_embeddings() and isinstance(module, nn.Linear)


def add_new_adapter(lora: LoraModel, name: str, section: AdapterSection, seed: int) -> None:
    """A fresh adapter: A Kaiming-uniform, B zero, so the model starts as the base. Deterministic in `seed`.

    Over an embedding it is A that is zero, and B normal, as in PEFT: a token that is not seen stays as it was.
    """
    generator = torch.Generator().manual_seed(seed)
    scaling = section.alpha / (math.sqrt(section.rank) if section.rslora else section.rank)
    for target in target_names(list(lora.layers), list(lora.ends), section.target_modules):
        layer = lora.everywhere[target]
        a, b = torch.zeros(section.rank, layer.in_features), torch.zeros(layer.out_features, section.rank)
        if isinstance(layer, LoraEmbedding):
            nn.init.normal_(b, generator=generator)
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        device = lora.model.device
        adapter = layer.adapters[name] = LoraWeights(
            a=nn.Parameter(a.to(device)),
            b=nn.Parameter(b.to(device)),
            scaling=scaling,
            dropout=section.dropout,
        )
        if section.kind == "dora":
            adapter.magnitude = nn.Parameter(lengths(layer.dense(), adapter))


def add_token_rows(lora: LoraModel, name: str, ids: Sequence[int]) -> None:
    """Rows of an adapter's own for these tokens, as the base has them now; the two ends share them if it shares its."""
    if not ids:
        return
    weights = {end.base.weight.data_ptr(): end.base.weight for end in lora.ends.values()}
    index = torch.tensor(ids, device=lora.model.device)
    own = {key: TokenRows(index, nn.Parameter(weight[index].float())) for key, weight in weights.items()}
    for end in lora.ends.values():
        end.tokens[name] = own[end.base.weight.data_ptr()]
