"""From a recipe to all that training and proving start from: rows on two sides, a base, a renderer, token ids."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain

from tunesmith.chat.renderer import Renderer
from tunesmith.chat.template import special_tokens, template_to_install
from tunesmith.data.balance import balanced
from tunesmith.data.formats import read_examples, read_held_out
from tunesmith.data.split import Split, split
from tunesmith.data.tokenize import Tokenized, tokenize
from tunesmith.errors import InputError
from tunesmith.models.catalogue import on_disk
from tunesmith.models.loading import LoadedBase, load_base, load_tokenizer
from tunesmith.models.memory import release_memory
from tunesmith.models.quantise import describe
from tunesmith.models.vocabulary import install, install_tokens
from tunesmith.progress import Reporter
from tunesmith.recipe import Recipe
from tunesmith.replay import with_replay
from tunesmith.store.runs import Run
from tunesmith.teaching import teach
from tunesmith.train import parallel
from tunesmith.train.methods import method_of
from tunesmith.types import Example

KINDS = {
    "chat": "a chat row",
    "completion": "a prompt with its completion",
    "text": "a text",
    "preference": "a preference pair",
    "input": "a question without its answer",
}


@dataclass(frozen=True, slots=True)
class Prepared:
    """A recipe made concrete. `limit` is the longest row allowed, in tokens."""

    recipe: Recipe
    split: Split
    base: LoadedBase
    renderer: Renderer
    limit: int
    train: Tokenized
    held_out: Tokenized | None  # None where nothing is held out
    lessons_hash: str | None = None  # of what a teacher answered

    def name_row(self, example_id: str) -> str:
        """Example id -> file and line."""
        for example in chain(self.split.train, self.split.held_out):
            if example.id == example_id:
                return str(example.source)
        return example_id


def read_and_split(recipe: Recipe, say: Callable[[str], None]) -> Split:
    """The training and the held-out rows. Raises InputError."""
    inputs = method_of(recipe.objective).taught
    examples = read_examples(recipe.data, say=say, inputs=inputs)
    held_out = read_held_out(recipe.data, say=say, inputs=inputs)
    _refuse_strange(chain(examples, held_out or ()), recipe)
    given = recipe.data.held_out
    assert held_out is not None or not isinstance(given, str)
    return split(examples, given if held_out is None else held_out, recipe.data.group_by)  # type: ignore[arg-type]


def _refuse_strange(examples: Iterable[Example], recipe: Recipe) -> None:
    """Raises InputError for a row of a kind that the objective can't learn from."""
    taken, objective = method_of(recipe.objective).rows, recipe.objective.kind
    row = next((example for example in examples if example.kind not in taken), None)
    if row is not None:
        wanted = " or ".join(KINDS[kind] for kind in taken)
        raise InputError(
            f"the row is {KINDS[row.kind]}, but objective {objective} learns from {wanted}; give such rows, or set "
            "objective.kind to what these rows are for",
            file=row.source.file,
            line=row.source.line,
        )


def prepare(recipe: Recipe, rows: Split, reporter: Reporter, run: Run | None = None) -> Prepared:
    """Load the base and tokenise both sides. Raises InputError.

    Where an objective has a teacher, it answers first, into the folder of `run`; a few rows only where there is none.
    """
    reporter.stage(f"base {recipe.base.model}")
    base = load_base(
        recipe.base.model,
        revision=recipe.base.revision,
        dtype=recipe.base.dtype,
        device=recipe.runtime.device,
        quantize=recipe.base.quantize,
    )
    if base.quantize is not None:
        reporter.say(describe(base.model, base.quantize))
    if rows.train and rows.train[0].kind in ("chat", "preference", "input"):
        base = with_template(base, recipe.base.chat_template, reporter.say)
    renderer = Renderer.from_tokenizer(base.tokenizer, stop_ids=base.stop_ids)
    if rows.train and rows.train[0].kind == "chat":
        for note in renderer.notes:
            reporter.say(note)
    limit = length_limit(recipe, base)
    method, lessons_hash = method_of(recipe.objective), None
    if parallel.size() > 1 and (method.taught or recipe.data.replay):
        raise InputError("what the base answers before training it answers in one process; set runtime.workers to 1")
    how = {"pieces": method.pieces, "strangers": method.strangers}
    if method.taught:
        taught = teach(recipe, rows, base, renderer, limit, run, reporter)
        rows, train, held_out, lessons_hash = taught.split, taught.train, taught.held_out, taught.hash
        release_memory()
    else:
        train = tokenize(rows.train, renderer, recipe.data, limit, **how)
        held_out = tokenize(rows.held_out, renderer, recipe.data, limit, **how) if rows.held_out else None
    if recipe.data.balance is not None:
        train = balanced(train, rows.train, recipe.data.balance)
    if recipe.data.replay:
        train = with_replay(recipe, train, base, renderer, limit, run, reporter)
        release_memory()
    for side in (train, held_out):
        for sentence in side.sentences(limit) if side is not None else ():
            reporter.say(sentence)
    return Prepared(recipe, rows, base, renderer, limit, train, held_out, lessons_hash)


def with_template(base: LoadedBase, asked: str | None, say: Callable[[str], None]) -> LoadedBase:
    """The base with the chat template that `base.chat_template` asks for. Raises InputError."""
    source = template_to_install(base.tokenizer, asked)
    if source is None:
        return base
    known, tokens = base.tokenizer.get_vocab(), special_tokens(source)
    new = ", ".join(token for token in tokens if token not in known) or "none"
    say(f"a chat template was installed ({asked or 'chatml: the base has none'}); new tokens: {new}")
    return install(base, source, tokens)


def length_limit(recipe: Recipe, base: LoadedBase) -> int:
    """`data.max_seq_len`, or the base's own limit. Raises InputError where the first is beyond the second."""
    asked = recipe.data.max_seq_len
    if asked is not None and asked > base.context_length:
        raise InputError(
            f"data.max_seq_len is {asked}, but {base.name} was made for {base.context_length} tokens; lower it"
        )
    return asked or base.context_length


def renderer_on_disk(recipe: Recipe) -> Renderer | None:
    """The base's renderer without its weights, or None where the base is not on this machine yet."""
    folder = on_disk(recipe.base.model, recipe.base.revision)
    if folder is None:
        return None
    tokenizer = load_tokenizer(folder)
    source = template_to_install(tokenizer, recipe.base.chat_template)
    if source is not None:
        install_tokens(tokenizer, source, special_tokens(source))
    return Renderer.from_tokenizer(tokenizer)
