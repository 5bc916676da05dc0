"""The contenders a recipe names, built. Each is a few lines: a model, and a way to write the prompt.

prompt            the base and an honest instruction, or the prompt that a run with objective compress makes needless
few_shot          the same, with worked examples from the training rows as earlier turns
retrieval         the same, with passages found by BM25 before the question
tuned             the adapter, given exactly the prompt it was trained on
tuned+retrieval   the same, with passages before the question
tfidf             TF-IDF and logistic regression, for label tasks
X+schema          any of these, decoding under data.schema
MODEL@URL         an OpenAI-compatible endpoint, prompted
any other name    an earlier run or adapter that the caller has added to the engine
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tunesmith.data.lazy import evenly
from tunesmith.data.prompts import with_prompt
from tunesmith.errors import InputError
from tunesmith.prove.answering import EngineModel, Model, Prompt, ReplyCache, Weights
from tunesmith.prove.choice import LOOKS, Choice, choose
from tunesmith.prove.classifier import Classifier
from tunesmith.prove.contender import Contender, Kind, Prompted
from tunesmith.prove.endpoint import Endpoint
from tunesmith.prove.key_order import decoding_schema
from tunesmith.prove.retrieval import Index, as_context, read_knowledge
from tunesmith.prove.scorers import Scorer
from tunesmith.prove.shots import Shots, fixed_shots, similar_shots
from tunesmith.prove.task import Task, question
from tunesmith.prove.wordings import Page, Wording, wordings
from tunesmith.recipe import Prove, is_endpoint
from tunesmith.types import Item, Message

PASSAGES = 3
BUILT_IN = ("prompt", "few_shot", "retrieval", "tuned", "tuned+retrieval", "tfidf")
TUNED = "tuned"
Context = Callable[[Item], list[str]]


@dataclass
class Bench:
    """What contenders are built from. `tuned` holds "tuned" and any earlier run or adapter, by contender name."""

    base: Weights
    tuned: Mapping[str, Weights]
    train: Sequence[Item]
    task: Task
    prove: Prove
    scorer: Scorer
    cache: ReplyCache
    max_tokens: int
    prompt: tuple[Message, ...] = ()  # what `prompt` is given where the recipe has a prompt to compress
    choices: list[Choice] = field(default_factory=list)

    def model(self, weights: Weights, schema: dict[str, Any] | None = None) -> EngineModel:
        """The weights as a model that answers."""
        return EngineModel(weights, self.max_tokens, schema)

    @cached_property
    def page(self) -> Page:
        """How prompts are laid out for this base."""
        return Page(self.base.engine.renderer.has_template, self._accepts_system())

    @cached_property
    def pool(self) -> list[Item]:
        """Training rows with an answer, each once."""
        seen: dict[tuple[str, str], Item] = {}
        for row in self.train:
            if row.expected is not None:
                seen.setdefault((question(row), row.expected), row)
        return list(seen.values())

    @cached_property
    def trial_rows(self) -> list[Item]:
        """The training rows that variants are tried on: spread evenly over the rows ordered by id."""
        rows = sorted(self.pool, key=lambda row: row.id)
        return [*evenly(rows, LOOKS[-1])]

    @cached_property
    def wording(self) -> Wording:
        """The wording that does best on training rows."""
        tried = wordings(self.task)
        variants = [(each.name, self._prompted("prompt", "prompt", each)) for each in tried]
        choice = self._choose("prompt", variants)
        return next(each for each in tried if each.name == choice.chosen)

    @cached_property
    def shots(self) -> Shots:
        """A fixed set of worked examples, or the most similar to each question: what does better on training rows."""
        k, tried_on = self.prove.few_shot, {row.id for row in self.trial_rows}
        rest = [row for row in self.pool if row.id not in tried_on] or self.pool
        variants = {"fixed": fixed_shots(rest, k, self.task), "similar": similar_shots(rest, k)}
        contenders = [
            (name, self._prompted("few_shot", "prompt", self.wording, shots)) for name, shots in variants.items()
        ]
        if self._choose("few_shot", contenders).chosen == "fixed":
            return fixed_shots(self.pool, k, self.task)
        return similar_shots(self.pool, k)

    @cached_property
    def context(self) -> Context:
        """The passages for a question: from prove.knowledge, or solved training rows."""
        if self.prove.knowledge is not None:
            passages = read_knowledge(Path(self.prove.knowledge))
            index = Index([passage.text for passage in passages])
            return lambda item: [passages[i].text for i in index.nearest(question(item), PASSAGES)]
        nearest = similar_shots(self.pool, PASSAGES)
        return lambda item: [f"{shot.question}\nAnswer: {shot.answer}" for shot in reversed(nearest(item))]

    @cached_property
    def decoding_schema(self) -> dict[str, Any] | None:
        """data.schema as answers are held to it: with the keys in any order where the training rows' is another."""
        if self.task.schema is None:
            return None
        return decoding_schema(self.task.schema, [row.expected or "" for row in self.pool])

    def build(self, name: str) -> Contender:
        """The contender of that name. Raises InputError for one that is unknown or can't be had here."""
        if is_endpoint(name):
            return self._prompted(name, "endpoint", wordings(self.task)[0], model=Endpoint(name, self.max_tokens))
        plain = name.removesuffix("+schema")
        if plain != name and self.task.schema is None:
            raise InputError(f'contender "{name}" decodes under data.schema, and the recipe names none')
        schema = self.decoding_schema if plain != name else None
        if plain in self.tuned and plain not in BUILT_IN:
            return self._tuned(name, "previous", self.model(self.tuned[plain], schema))
        base = self.model(self.base, schema)
        if plain == "prompt" and self.prompt:
            return Prompted(name, "prompt", base, lambda item: _behind(self.prompt, item))
        if plain == "prompt":
            return self._prompted(name, "prompt", self.wording, model=base)
        if plain == "few_shot":
            return self._prompted(name, "prompt", self.wording, self.shots, model=base)
        if plain == "retrieval":
            return self._prompted(name, "retrieval", self.wording, context=self.context, model=base)
        if plain in (TUNED, "tuned+retrieval"):
            if TUNED not in self.tuned:
                raise InputError(f'contender "{name}" needs a tuned model, and there is none here')
            context = self.context if plain != TUNED else None
            return self._tuned(name, "tuned", self.model(self.tuned[TUNED], schema), context)
        if name == "tfidf":
            if self.task.kind != "label":
                raise InputError('contender "tfidf" is for label tasks, and these answers are no labels; take it out')
            return Classifier(self.pool)
        raise no_contender(name)

    def _choose(self, name: str, variants: Sequence[tuple[str, Prompted]]) -> Choice:
        choice = choose(name, variants, self.trial_rows, self.scorer, self.cache)
        self.choices.append(choice)
        return choice

    def _prompted(
        self,
        name: str,
        kind: Kind,
        wording: Wording,
        shots: Shots | None = None,
        context: Context | None = None,
        model: Model | None = None,
    ) -> Prompted:
        asked = model or self.model(self.base)

        def write(item: Item) -> Prompt:
            examples, passages = shots(item) if shots else [], context(item) if context else []
            prompt = self.page.write(item, wording, examples, as_context(passages))
            while (examples or passages) and isinstance(asked, EngineModel) and not asked.fits(prompt):
                examples, passages = examples[1:], passages[:-1]  # the least similar goes first
                prompt = self.page.write(item, wording, examples, as_context(passages))
            return prompt

        return Prompted(name, kind, asked, write)

    def _tuned(self, name: str, kind: Kind, model: EngineModel, context: Context | None = None) -> Prompted:
        def write(item: Item) -> Prompt:
            passages = context(item) if context else []
            prompt = self.page.as_trained(item, as_context(passages))
            while passages and not model.fits(prompt):
                passages = passages[:-1]
                prompt = self.page.as_trained(item, as_context(passages))
            return prompt

        return Prompted(name, kind, model, write)

    def _accepts_system(self) -> bool:
        """Some templates refuse a system turn; the instruction then opens the first user turn."""
        try:
            self.base.engine.renderer.prompt_ids([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}])
        except InputError:
            return False
        return True


def _behind(prompt: Sequence[Message], item: Item) -> Prompt:
    return Prompt(with_prompt(prompt, item.messages), item.tools)


def no_contender(name: str) -> InputError:
    """What to say of a name in prove.contenders that stands for nothing."""
    known = ", ".join((*BUILT_IN, "MODEL@URL"))
    return InputError(f'prove.contenders: "{name}" is no contender, run or adapter; contenders are {known}')


def earlier_names(prove: Prove) -> list[str]:
    """The recipe's contenders that must be runs or adapters: the caller loads them and gives them in `tuned`."""
    plain = dict.fromkeys(name.removesuffix("+schema") for name in prove.contenders if not is_endpoint(name))
    return [name for name in plain if name not in BUILT_IN]


def contender_names(prove: Prove, task: Task, *, compressed: bool = False) -> list[str]:
    """The recipe's contenders; a list left at its default grows by tfidf for labels and +schema where there is one.

    Where a prompt was compressed the default is that prompt against the tune, and nothing else.
    """
    names = list(dict.fromkeys(prove.contenders))
    if prove.contenders == Prove.model_fields["contenders"].default:
        if compressed:
            return ["prompt", TUNED]
        if task.kind == "label":
            names.append("tfidf")
        if task.kind == "json" and task.schema is not None:
            names += ["prompt+schema", "tuned+schema"]
    return names
