"""OpenAI's grader objects, accepted as they are: string_check, text_similarity, score_model, label_model, multi.

`python` graders are code in data and are refused: name a file on the command line instead.
Templates see `sample.output_text`, `sample.output_json`, and `item`: the row's other columns, with `item.input` and
`item.expected` (also `item.reference_answer`) where no column has that name.
"""

from __future__ import annotations

import ast
import contextlib
import json
import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tunesmith.errors import InputError
from tunesmith.prove.answering import Prompt
from tunesmith.prove.json_answers import InvalidJson, find_json
from tunesmith.prove.scorers import Scorer, rouge_l_f1, words
from tunesmith.prove.task import question
from tunesmith.types import Item

Ask = Callable[[str, Prompt], str]  # (model's name, prompt) -> its answer; raises where there is none
GRADERS = ("string_check", "text_similarity", "score_model", "label_model", "multi")
_HOLE = re.compile(r"\{\{\s*([\w.\-]+)\s*\}\}")


def grader_scorer(grader: Mapping[str, Any], ask: Ask | None = None) -> Scorer:
    """A scorer from a grader object. Raises InputError where the object is none of the known ones."""
    kind, name = grader.get("type"), str(grader.get("name") or grader.get("type"))
    if kind == "python":
        raise InputError(f'grader "{name}": python graders are never run from data; name the file with --grader')
    if kind not in GRADERS:
        raise InputError(f'grader "{name}": type "{kind}" is unknown; known are {", ".join(GRADERS)}')
    grade = _grade_function(grader, name, ask)
    uses_expected = any(word in json.dumps(grader) for word in ("item.expected", "item.reference_answer"))
    return Scorer(name, f"OpenAI grader {kind}", grade, needs_expected=uses_expected)


def _grade_function(grader: Mapping[str, Any], name: str, ask: Ask | None) -> Callable[[str, Item], float]:
    builders: dict[str, Callable[..., Callable[[str, Item], float]]] = {
        "string_check": _string_check,
        "text_similarity": _text_similarity,
    }
    try:
        if grader["type"] in builders:
            return builders[grader["type"]](grader)
        if grader["type"] == "multi":
            return _multi(grader, ask)
        if ask is None:
            raise InputError(f'grader "{name}" asks a model, and none can be asked here')
        return (_score_model if grader["type"] == "score_model" else _label_model)(grader, ask)
    except KeyError as error:
        raise InputError(f'grader "{name}": the key {error} is required') from None


def fill(template: str, output: str, item: Item) -> str:
    """Replace {{ sample.… }} and {{ item.… }}. A name that isn't there is a KeyError: a fault, not an empty string."""

    def value(match: re.Match[str]) -> str:
        root, *path = match.group(1).split(".")
        found = _namespace(root, path[:1], output, item)
        for step in path:
            found = found[int(step)] if isinstance(found, list) else found[step]
        return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)

    return _HOLE.sub(value, template)


def _namespace(root: str, first: Sequence[str], output: str, item: Item) -> Any:
    if root == "sample":
        if list(first) == ["output_json"]:
            try:
                return {"output_json": find_json(output)}
            except InvalidJson:
                raise ValueError("the answer holds no JSON") from None
        return {"output_text": output}
    if root == "item":
        given = {"input": question(item), "expected": item.expected, "reference_answer": item.expected}
        return {**given, **item.columns}
    raise KeyError(root)


def _string_check(grader: Mapping[str, Any]) -> Callable[[str, Item], float]:
    """1 where `input` is equal to (eq), not equal to (ne), or contains (like; ilike without case) `reference`."""
    checks: dict[str, Callable[[str, str], bool]] = {
        "eq": operator.eq,
        "ne": operator.ne,
        "like": lambda text, part: part in text,
        "ilike": lambda text, part: part.casefold() in text.casefold(),
    }
    text, reference, check = grader["input"], grader["reference"], checks.get(grader["operation"])
    if check is None:
        raise InputError(f'string_check: operation "{grader["operation"]}" is unknown; known are {", ".join(checks)}')
    return lambda output, item: float(check(fill(text, output, item), fill(reference, output, item)))


def _text_similarity(grader: Mapping[str, Any]) -> Callable[[str, Item], float]:
    text, reference, metric = grader["input"], grader["reference"], grader["evaluation_metric"]
    if metric in ("cosine", "meteor"):
        raise InputError(
            f'text_similarity: "{metric}" needs a model of its own; use fuzzy_match, bleu, gleu or rouge_l'
        )
    if metric not in SIMILARITIES:
        raise InputError(f'text_similarity: metric "{metric}" is unknown; known are {", ".join(SIMILARITIES)}')
    similarity = SIMILARITIES[metric]
    return lambda output, item: similarity(fill(text, output, item), fill(reference, output, item))


def _fuzzy_match(text: str, reference: str) -> float:
    """rapidfuzz's normalised indel similarity: 2 · LCS of characters / total length."""
    from rapidfuzz import fuzz

    return fuzz.ratio(text, reference) / 100


def _bleu(text: str, reference: str) -> float:
    """Sentence BLEU (Papineni 2002), sacrebleu's, effective order."""
    from sacrebleu import sentence_bleu

    return sentence_bleu(text, [reference]).score / 100


def gleu(text: str, reference: str) -> float:
    """GLEU (Wu 2016): the smaller of precision and recall over all word 1- to 4-grams together."""
    answered, expected = (_ngrams(words(each), range(1, 5)) for each in (text, reference))
    return (answered & expected).total() / max(answered.total(), expected.total(), 1)


def rouge_n(n: int) -> Callable[[str, str], float]:
    """ROUGE-N (Lin 2004), F1 over word n-grams."""

    def score(text: str, reference: str) -> float:
        answered, expected = (_ngrams(words(each), (n,)) for each in (text, reference))
        return 2 * (answered & expected).total() / max(answered.total() + expected.total(), 1)

    return score


def _ngrams(tokens: Sequence[str], orders: Sequence[int] | range) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for n in orders for i in range(len(tokens) - n + 1))


SIMILARITIES: dict[str, Callable[[str, str], float]] = {
    "fuzzy_match": _fuzzy_match,
    "bleu": _bleu,
    "gleu": gleu,
    "rouge_l": lambda text, reference: rouge_l_f1(words(text), words(reference)),
    **{f"rouge_{n}": rouge_n(n) for n in range(1, 6)},
}


def _score_model(grader: Mapping[str, Any], ask: Ask) -> Callable[[str, Item], float]:
    """The number a model answers with, clamped to `range` (default 0 to 1) and scaled onto 0 to 1."""
    low, high = (float(end) for end in grader.get("range") or (0, 1))
    if not low < high:
        raise InputError(f"score_model: range [{low}, {high}] is empty")
    messages, model = grader["input"], grader["model"]

    def grade(output: str, item: Item) -> float:
        answer = ask(model, _filled(messages, output, item))
        number = re.search(r"-?\d+(?:\.\d+)?", answer)
        if number is None:
            raise ValueError(f"the grading model gave no number: {answer[:80]!r}")
        return (min(high, max(low, float(number.group()))) - low) / (high - low)

    return grade


def _label_model(grader: Mapping[str, Any], ask: Ask) -> Callable[[str, Item], float]:
    """1 where the label a model gives is one of `passing_labels`."""
    from tunesmith.prove.scorers import LabelReader

    messages, model, passing = grader["input"], grader["model"], set(grader["passing_labels"])
    reader = LabelReader(grader["labels"])

    def grade(output: str, item: Item) -> float:
        answer = ask(model, _filled(messages, output, item))
        label = reader.read(answer)
        if label is None:
            raise ValueError(f"the grading model gave no label: {answer[:80]!r}")
        return float(label in passing)

    return grade


def _filled(messages: Sequence[Mapping[str, Any]], output: str, item: Item) -> Prompt:
    filled: list[Any] = []
    for message in messages:
        content = message["content"]
        text = content if isinstance(content, str) else str(content["text"])
        filled.append({"role": message["role"], "content": fill(text, output, item)})
    return Prompt(messages=tuple(filled))


def _multi(grader: Mapping[str, Any], ask: Ask | None) -> Callable[[str, Item], float]:
    """`calculate_output`, an arithmetic formula over the named graders' scores."""
    inner: Any = grader["graders"]
    named = dict(inner) if "type" not in inner else {inner["name"]: inner}
    scorers = {name: grader_scorer({"name": name, **each}, ask) for name, each in named.items()}
    formula = parse_formula(grader["calculate_output"], set(scorers))

    def grade(output: str, item: Item) -> float:
        return formula({name: scorer.grade(output, item) for name, scorer in scorers.items()})

    return grade


_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.BitXor: lambda a, b: math.pow(a, b),  # OpenAI writes powers as ^
    ast.Pow: lambda a, b: math.pow(a, b),
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "min": min, "max": max, "abs": abs, "floor": math.floor, "ceil": math.ceil,
    "exp": math.exp, "sqrt": math.sqrt, "log": math.log,
}  # fmt: skip


def parse_formula(text: str, names: set[str]) -> Callable[[Mapping[str, float]], float]:
    """Numbers, the given names, + - * / ^, parentheses and a few functions; anything else raises InputError."""
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise InputError(f'multi: calculate_output "{text}" is no formula') from None

    def compute(node: ast.AST, values: Mapping[str, float]) -> float:
        match node:
            case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
                return float(number)
            case ast.Name(id=name) if name in values:
                return values[name]
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](compute(left, values), compute(right, values))
            case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](compute(operand, values))
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
                return float(_FUNCTIONS[name](*(compute(arg, values) for arg in args)))
        raise InputError(f'multi: "{ast.unparse(node)}" has no place in calculate_output "{text}"')

    with contextlib.suppress(ArithmeticError, ValueError, TypeError):
        compute(tree, dict.fromkeys(names, 0.5))  # an unknown name is found now, not after the run
    return lambda values: compute(tree, values)
