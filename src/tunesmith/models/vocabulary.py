"""A base that gets a chat template, and rows for the special tokens the template needs.

A new token starts at the mean of all the base's embeddings (Hewitt 2021): no logit then stands out before it is
learned. What is learned of these rows is the adapter's own (embedding.TokenRows); the tokenizer lies beside it, and
`adopt` gives a base as it is on disk the same tokens and template again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from tunesmith.errors import InputError
from tunesmith.models.loading import LoadedBase, load_tokenizer

TEMPLATE_FILE = "chat_template.jinja"


def install(base: LoadedBase, template: str, tokens: Sequence[str]) -> LoadedBase:
    """The base with a chat template and its special tokens; those the vocabulary has keep their rows."""
    ids = install_tokens(base.tokenizer, template, tokens)
    fit_rows(base.model, len(base.tokenizer))
    return replace(base, template_tokens=ids)


def install_tokens(tokenizer: PreTrainedTokenizerBase, template: str, tokens: Sequence[str]) -> tuple[int, ...]:
    """The same for a tokenizer alone; the tokens' ids."""
    tokenizer.chat_template = template
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], special_tokens=True)
    known = tokenizer.get_vocab()
    return tuple(known[token] for token in tokens)


def brought_template(folder: Path) -> str | None:
    """The chat template that an adapter brings, or None where it speaks as its base does."""
    path = folder / TEMPLATE_FILE
    try:
        return path.read_text(encoding="utf-8") if (folder / "tokenizer.json").is_file() else None
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the adapter's chat template cannot be read ({error})", file=path) from None


def adopt(base: LoadedBase, folder: Path) -> LoadedBase:
    """The base with the tokenizer and template that an adapter brings, if it does. Raises InputError."""
    template = brought_template(folder)
    if template is None or template == base.tokenizer.chat_template:
        return base
    if base.template_tokens is not None:
        raise InputError("the adapter speaks by another chat template than the one before it", file=folder)
    tokenizer = load_tokenizer(folder)
    known = tokenizer.get_vocab()
    if any(known.get(token) != index for token, index in base.tokenizer.get_vocab().items()):
        raise InputError("the adapter's tokenizer is not that of this base with tokens added", file=folder)
    fit_rows(base.model, len(tokenizer))
    return replace(base, tokenizer=tokenizer, template_tokens=())


@torch.no_grad()
def fit_rows(model: PreTrainedModel, tokens: int) -> None:
    """Grow the embedding and the head to `tokens` rows, where they have fewer; tied ones stay tied."""
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr]
    if tokens <= rows:
        return
    model.resize_token_embeddings(tokens, mean_resizing=False)
    for end in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight: torch.Tensor = end.weight  # type: ignore[union-attr, assignment]
        weight[rows:] = weight[:rows].float().mean(0).to(weight.dtype)
    model.requires_grad_(False)
