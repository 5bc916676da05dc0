"""Rebuild the tokenizer a GGUF file describes.

The file names the kind of its pre-tokenizer (`tokenizer.ggml.pre`), which decides what text the merges may span. A
kind that is not known here is refused: a tokenizer that is nearly right trains and serves nearly right, silently.
The kinds and their defaults are those of llama.cpp's `llama-vocab.cpp`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from tunesmith.errors import InputError
from tunesmith.models.gguf import REMEDY, GGUFFile

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # of tokenizer.ggml.token_type

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Kind:
    """How a byte-level vocabulary's text is cut before merging."""

    split: str | None = None  # None: GPT-2's own expression
    single_digits: bool = False
    whole_words: bool = False  # a piece that is itself a token is taken whole, without merging
    adds_bos: bool = False  # where the file does not say
    nfc: bool = False


GPT2 = Kind()
SINGLE_DIGITS = Kind(single_digits=True)
LLAMA3 = Kind(LLAMA3_SPLIT, whole_words=True, adds_bos=True)
QWEN2 = Kind(QWEN2_SPLIT, nfc=True)
TEKKEN = Kind(TEKKEN_SPLIT, whole_words=True, adds_bos=True)
KINDS = {
    **dict.fromkeys(("gpt-2", "phi-2", "olmo"), GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell", "command-r"), SINGLE_DIGITS),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "lfm2"), LLAMA3),
    **dict.fromkeys(("smaug-bpe", "dbrx"), Kind(LLAMA3_SPLIT)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), QWEN2),
    "tekken": TEKKEN,
}


def read_tokenizer(file: GGUFFile) -> PreTrainedTokenizerFast:
    """The fast tokenizer with its special tokens and chat template. Raises InputError for a kind not known."""
    family = file.fields.get("tokenizer.ggml.model")
    tokens: list[str] | None = file.fields.get("tokenizer.ggml.tokens")
    if not tokens:
        raise InputError(f"the file holds no vocabulary; {REMEDY}", file=file.path)
    if family == "gpt2":
        backend, adds_bos = _byte_level(file, tokens)
    elif family == "llama":
        backend, adds_bos = _sentencepiece(file, tokens), True
    else:
        raise InputError(
            f"tokenizers of kind {family} are not read from GGUF (gpt2, llama are); {REMEDY}", file=file.path
        )
    _add_tokens(file, backend, tokens)
    special = {
        name: tokens[index]
        for name in ("bos", "eos", "unk", "pad")
        if (index := _special_id(file, name)) is not None and index < len(tokens)
    }
    _add_ends(file, backend, special, adds_bos)
    template = file.fields.get("tokenizer.chat_template")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        model_max_length=file.about("context_length", 1 << 30),
        chat_template=template,
        **{f"{name}_token": token for name, token in special.items()},
    )


def stop_ids(file: GGUFFile) -> list[int]:
    """Every token the file says ends an answer: end of text, of turn, of message."""
    keys = ("eos", "eot", "eom")
    return sorted({index for key in keys if (index := _special_id(file, key)) is not None})


def _special_id(file: GGUFFile, name: str) -> int | None:
    long = {"unk": "unknown", "pad": "padding"}.get(name, name)
    return file.fields.get(f"tokenizer.ggml.{long}_token_id")


def _byte_level(file: GGUFFile, tokens: list[str]) -> tuple[Tokenizer, bool]:
    """GPT-2's byte-level BPE, cut as the file's kind says. -> (tokenizer, whether it adds BOS by default)"""
    name = file.fields.get("tokenizer.ggml.pre")
    kind = KINDS.get(str(name))
    if kind is None:
        raise InputError(f"its pre-tokenizer {name} is not one of {', '.join(sorted(KINDS))}; {REMEDY}", file=file.path)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(BPE(vocabulary, _merges(file, vocabulary), ignore_merges=kind.whole_words))
    cuts: list[Any] = []
    if kind.split is not None:
        cuts.append(pre_tokenizers.Split(Regex(kind.split), behavior="isolated"))
    if kind.single_digits:
        cuts.append(pre_tokenizers.Digits(individual_digits=True))
    cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind.split is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(cuts)  # type: ignore[assignment]
    if kind.nfc:
        backend.normalizer = normalizers.NFC()  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return backend, kind.adds_bos


def _merges(file: GGUFFile, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    merges: list[tuple[str, str]] = []
    for merge in file.fields.get("tokenizer.ggml.merges", ()):
        left, _, right = merge.partition(" ")
        if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise InputError(f'its merge "{merge}" is not of its own vocabulary; fetch the file again', file=file.path)
        merges.append((left, right))
    return merges


def _sentencepiece(file: GGUFFile, tokens: list[str]) -> Tokenizer:
    """SentencePiece BPE as Llama 2 and Mistral use it: spaces become U+2581, unknown characters bytes."""
    vocabulary = {token: index for index, token in enumerate(tokens)}
    scores = file.fields.get("tokenizer.ggml.scores")
    if not scores or len(scores) != len(tokens):
        raise InputError(f"its vocabulary has no scores; {REMEDY}", file=file.path)
    kinds = file.fields.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    unknown = next((token for token, kind in zip(tokens, kinds, strict=False) if kind == UNKNOWN), None)
    model = BPE(vocabulary, _implied_merges(vocabulary, scores), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    backend = Tokenizer(model)
    prefix = bool(file.fields.get("tokenizer.ggml.add_space_prefix", True))
    replace = normalizers.Replace(" ", "▁")
    backend.normalizer = (  # type: ignore[assignment]
        normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    )
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(content=" ", left=1, right=0))
    backend.decoder = decoders.Sequence(steps)  # type: ignore[assignment]
    return backend


def _implied_merges(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece stores no merges: any two tokens that join to a third may merge, the best-scored third first."""
    merges: list[tuple[float, int, int, str, str]] = []
    for token, index in vocabulary.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                merges.append((-scores[index], vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


def _add_tokens(file: GGUFFile, backend: Tokenizer, tokens: list[str]) -> None:
    """Control tokens are matched whole and dropped when decoding; user-defined ones are matched whole and kept."""
    kinds = file.fields.get("tokenizer.ggml.token_type") or []
    pairs = list(zip(tokens, kinds, strict=False))
    backend.add_special_tokens([AddedToken(token, normalized=False) for token, kind in pairs if kind == CONTROL])
    backend.add_tokens([AddedToken(token, normalized=False) for token, kind in pairs if kind == USER_DEFINED])


def _add_ends(file: GGUFFile, backend: Tokenizer, special: dict[str, str], adds_bos: bool) -> None:
    """Put the beginning- and end-of-text tokens around a text, where the file or its kind wants them."""
    first = special.get("bos") if file.fields.get("tokenizer.ggml.add_bos_token", adds_bos) else None
    last = special.get("eos") if file.fields.get("tokenizer.ggml.add_eos_token", False) else None
    around = [token for token in (first, "$A", last) if token is not None]
    if len(around) > 1:
        ids = [(token, backend.token_to_id(token)) for token in around if token != "$A"]
        backend.post_processor = processors.TemplateProcessing(single=around, special_tokens=ids)  # type: ignore[assignment]
