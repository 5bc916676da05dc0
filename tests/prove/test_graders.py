"""OpenAI's grader objects, and the judge."""

from __future__ import annotations

import pytest

from tunesmith.errors import InputError
from tunesmith.prove.graders import gleu, grader_scorer, parse_formula, rouge_n
from tunesmith.prove.judge import judge
from tunesmith.types import Item, Source

ITEM = Item(
    "a1",
    Source("rows.jsonl", 1),
    ({"role": "user", "content": "capital of France?"},),
    expected="Paris",
    columns={"reference_answer": "Paris", "facts": {"country": "France", "alternatives": ["Paris", "Lutetia"]}},
)


def grade(grader, output, ask=None):
    return grader_scorer(grader, ask).grade(output, ITEM)


@pytest.mark.parametrize(
    ("operation", "output", "score"),
    [("eq", "Paris", 1), ("eq", "paris", 0), ("ne", "Rome", 1), ("like", "In Paris.", 1), ("ilike", "in paris", 1)],
)
def test_string_check(operation, output, score):
    grader = {
        "type": "string_check",
        "name": "c",
        "operation": operation,
        "input": "{{ sample.output_text }}",
        "reference": "{{item.reference_answer}}",
    }
    assert grade(grader, output) == score


def test_templates_reach_into_columns_and_json():
    grader = {
        "type": "string_check",
        "name": "c",
        "operation": "eq",
        "input": "{{sample.output_json.city}}",
        "reference": "{{item.facts.alternatives.1}}",
    }
    assert grade(grader, '{"city": "Lutetia"}') == 1
    with pytest.raises(ValueError, match="no JSON"):
        grade(grader, "Lutetia")
    with pytest.raises(KeyError):
        grade({**grader, "input": "{{item.nothing}}"}, "x")


@pytest.mark.parametrize(
    ("metric", "score"),
    # "the capital is Paris" against "Paris is the capital": 4 words shared; bigrams shared: (the capital)
    [("rouge_1", 1.0), ("rouge_2", 1 / 3), ("rouge_3", 0.0), ("rouge_l", 0.5), ("gleu", 5 / 10)],
)
def test_text_similarity_by_hand(metric, score):
    grader = {
        "type": "text_similarity",
        "name": "s",
        "evaluation_metric": metric,
        "input": "{{sample.output_text}}",
        "reference": "Paris is the capital",
    }
    assert grade(grader, "the capital is Paris") == pytest.approx(score)


def test_similarities_of_equal_texts_are_one():
    for metric in ("fuzzy_match", "bleu", "gleu", "rouge_1", "rouge_5", "rouge_l"):
        text = "one two three four five six"
        grader = {"type": "text_similarity", "name": "s", "evaluation_metric": metric, "input": text, "reference": text}
        assert grade(grader, "x") == pytest.approx(1.0)
    assert gleu("", "") == 0.0
    assert rouge_n(2)("a", "a") == 0.0


def test_score_and_label_models():
    asked = []

    def ask(model, prompt):
        asked.append((model, prompt.messages[0]["content"]))
        return "8 out of 10" if model == "scorer" else "Good."

    score = {
        "type": "score_model",
        "name": "s",
        "model": "scorer",
        "range": [0, 10],
        "input": [{"role": "user", "content": "Rate {{sample.output_text}}"}],
    }
    label = {
        "type": "label_model",
        "name": "l",
        "model": "labeller",
        "labels": ["good", "bad"],
        "passing_labels": ["good"],
        "input": [{"role": "user", "content": {"type": "input_text", "text": "{{item.input}}"}}],
    }
    assert grade(score, "Paris", ask) == pytest.approx(0.8)
    assert grade(label, "Paris", ask) == 1.0
    assert asked == [("scorer", "Rate Paris"), ("labeller", "capital of France?")]
    with pytest.raises(ValueError, match="gave no number"):
        grade(score, "x", lambda model, prompt: "well")
    with pytest.raises(ValueError, match="gave no label"):
        grade(label, "x", lambda model, prompt: "maybe")


def test_multi_combines_by_formula():
    check = {
        "type": "string_check",
        "name": "c",
        "operation": "eq",
        "reference": "Paris",
        "input": "{{sample.output_text}}",
    }
    grader = {
        "type": "multi",
        "name": "m",
        "graders": {"exact": check, "loose": {**check, "operation": "like", "reference": "ari"}},
        "calculate_output": "0.75 * exact + 0.25 * loose",
    }
    assert grade(grader, "Paris") == 1.0
    assert grade(grader, "Paris!") == 0.25


@pytest.mark.parametrize(
    ("formula", "value"),
    [("a + 2 * b", 2.0), ("max(a, b) ^ 2", 0.25), ("-(a - 1) / b", -2.0), ("sqrt(4) * floor(b + 1.6)", 4.0)],
)
def test_formulas(formula, value):
    values = {"a": 1.0, "b": 0.5} if "max" not in formula else {"a": 0.5, "b": 0.1}
    expected = {"-(a - 1) / b": 0.0}.get(formula, value)
    assert parse_formula(formula, set(values))(values) == pytest.approx(expected)


@pytest.mark.parametrize(
    "formula", ["__import__('os')", "a.b", "a if b else a", "[a]", "lambda: a", "c", "a +", "'x'", "f(a)"]
)
def test_a_formula_is_arithmetic_and_nothing_else(formula):
    with pytest.raises(InputError):
        parse_formula(formula, {"a", "b"})


@pytest.mark.parametrize(
    "grader",
    [
        {"type": "python", "name": "p", "source": "def grade(s, i): return 1"},
        {"type": "unknown", "name": "u"},
        {"type": "string_check", "name": "c", "operation": "almost", "input": "a", "reference": "b"},
        {"type": "string_check", "name": "c", "operation": "eq"},
        {"type": "text_similarity", "name": "s", "evaluation_metric": "cosine", "input": "a", "reference": "b"},
        {"type": "score_model", "name": "s", "model": "m", "input": []},
    ],
)
def test_graders_that_cannot_be_had_are_a_sentence(grader):
    with pytest.raises(InputError):
        grader_scorer(grader)


def test_a_judge_that_favours_a_place_is_found_out():
    score, agreement = judge("m", lambda model, prompt: "A")
    assert score.grade("Rome", ITEM) == 0.5
    assert agreement.grade("Rome", ITEM) == 0.0


def test_a_judge_that_sees_quality_agrees_with_itself():
    asked = []

    def ask(model, prompt):
        text = prompt.messages[0]["content"]
        asked.append(text)
        return "A" if text.index("Paris") < text.index("Rome") else "B"

    score, agreement = judge("m", ask)
    assert score.grade("Rome", ITEM) == 0.0
    assert agreement.grade("Rome", ITEM) == 1.0
    assert len(asked) == 2
    assert score.grade("Paris", ITEM) == 0.5
    with pytest.raises(ValueError, match="no vote"):
        judge("m", lambda model, prompt: "I cannot say")[0].grade("Rome", ITEM)
