"""The recipe: one YAML file that says everything about a fine-tune. Frozen, hashed, printed back resolved.

Paths in a recipe are relative to the recipe's own folder; `Recipe.load` resolves them.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tunesmith.errors import InputError
from tunesmith.recipe_file import apply_override, read_yaml

DEFAULT_BASE = "smollm2-135m-instruct"
Auto = Literal["auto"]
Quantize = Literal["nf4", "int8", "keep"]  # keep: the quantised blocks of the base's own GGUF file
NO_LEASH = {  # why an objective takes no kl_to_base
    "dpo": "its beta holds the model near the one it starts from",
    "kto": "its beta holds the model near the one it starts from",
    "orpo": "it is made to do without a reference, and dpo is the one that has one",
    "compress": "what it learns is to differ from the base without the prompt",
}


def is_endpoint(name: str) -> bool:
    """Whether a name is of the form MODEL@URL: an OpenAI-compatible endpoint."""
    return "@http://" in name or "@https://" in name


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Base(Section):
    model: str = DEFAULT_BASE
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantize: Quantize | None = None
    chat_template: str | None = None  # chatml | plain | a file of Jinja; null: its own, or ChatML where it has none


class TrainFile(Section):
    path: str
    weight: float = Field(default=1.0, gt=0)


class Data(Section):
    train: str | tuple[TrainFile, ...]
    held_out: Annotated[float, Field(ge=0, lt=1)] | str = 0.15
    group_by: str | None = None
    format: Literal["auto", "messages", "prompt_completion", "input_output", "preference", "text"] = "auto"
    system: str | None = None
    schema_file: str | None = Field(None, alias="schema")
    train_on: Literal["assistant", "last", "all"] = "assistant"
    max_seq_len: Annotated[int, Field(ge=2)] | None = None
    on_long: Literal["error", "drop", "truncate"] = "error"
    balance: Literal["label", "source"] | None = None  # every label, or file, counts as much as any other
    replay: float = Field(default=0.0, ge=0, lt=1)  # share of general examples, answered by the base itself

    @field_validator("train")
    @classmethod
    def _at_least_one(cls, value: str | tuple[TrainFile, ...]) -> str | tuple[TrainFile, ...]:
        if not value:
            raise ValueError("name at least one training file")
        return value

    @property
    def train_files(self) -> tuple[TrainFile, ...]:
        return (TrainFile(path=self.train, weight=1.0),) if isinstance(self.train, str) else self.train


class Adapter(Section):
    kind: Literal["lora", "dora"] = "lora"
    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32, gt=0)
    target_modules: str | tuple[str, ...] = "all-linear"  # a regex when a string other than all-linear
    rslora: bool = False
    dropout: float = Field(default=0.0, ge=0, lt=1)
    init_from: str | None = None


class Sft(Section):
    kind: Literal["sft"] = "sft"
    kl_to_base: float = Field(default=0.0, ge=0)  # what a nat of KL(base || tuned) costs at each trained token


class Cpt(Section):
    kind: Literal["cpt"] = "cpt"
    kl_to_base: float = Field(default=0.0, ge=0)


class Dpo(Section):
    kind: Literal["dpo"] = "dpo"
    beta: float = Field(default=0.1, gt=0)  # how dear it is to leave the reference


class Orpo(Section):
    kind: Literal["orpo"] = "orpo"
    beta: float = Field(default=0.1, gt=0)  # the odds ratio's weight beside the chosen answer's loss


class Kto(Section):
    kind: Literal["kto"] = "kto"
    beta: float = Field(default=0.1, gt=0)  # how dear it is to leave the reference


class Compress(Section):
    """A long system prompt learned away. The teacher is the base with the prompt, the student the base without it."""

    kind: Literal["compress"] = "compress"
    prompt: str | None = None
    prompt_file: str | None = None  # a text, or a .json file of chat turns
    top_k: int = Field(default=50, ge=1)  # the teacher's likeliest tokens that are kept; the others count as one
    margin: float = Field(default=5.0, gt=0)  # points the student may be behind and still do as well

    @model_validator(mode="after")
    def _one_prompt(self) -> Compress:
        if (self.prompt is None) == (self.prompt_file is None):
            raise ValueError("give either prompt or prompt_file: the prompt that is to go into the weights")
        return self


class Distill(Section):
    """Learn from another model: an endpoint's answers, or the distributions of a model on this machine."""

    kind: Literal["distill"] = "distill"
    teacher: str  # MODEL@URL, a base, or a run
    kl_share: float = Field(default=0.5, ge=0, le=1)  # of the loss; the rest is the answers' own log-likelihood
    top_k: int = Field(default=50, ge=1)
    keep_above: Annotated[float, Field(ge=0, le=100)] | None = None  # points an answer must reach where one is expected
    kl_to_base: float = Field(default=0.0, ge=0)


Objective = Annotated[Sft | Cpt | Dpo | Orpo | Kto | Compress | Distill, Field(discriminator="kind")]


class Train(Section):
    epochs: float = Field(default=2, gt=0)
    max_steps: Annotated[int, Field(ge=1)] | None = None
    batch_examples: int = Field(default=16, ge=1)
    lr: Annotated[float, Field(gt=0)] | Auto = "auto"
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = Field(default=0.03, ge=0, le=1)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    seed: int = 0
    shuffle: bool = True
    eval_every: Annotated[int, Field(ge=0)] | Auto = "auto"
    save_every: Annotated[int, Field(ge=0)] | Auto = "auto"
    patience: Annotated[int, Field(ge=1)] | None = None


class Prove(Section):
    scorers: tuple[str | dict[str, Any], ...] | Auto = "auto"
    contenders: tuple[str, ...] = ("prompt", "few_shot", "retrieval", "tuned", "tuned+retrieval")
    few_shot: int = Field(default=5, ge=1)
    knowledge: str | None = None
    max_new_tokens: Annotated[int, Field(ge=1)] | Auto = "auto"
    retention: bool = True


class Runtime(Section):
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    threads: Annotated[int, Field(ge=1)] | Auto = "auto"
    memory_limit: str | Auto = "auto"  # "4GB", "800MB"
    workers: int = Field(default=1, ge=1)  # processes that share every step
    shard: bool | Auto = "auto"  # spread weights and optimiser over the workers; auto: where every weight is trained
    price_per_hour: Annotated[float, Field(ge=0)] | None = None  # of this machine, in any currency
    vllm: str | None = None  # the address of a vLLM server that answers for the base in place of the own engine


class Recipe(Section):
    name: str = "run"
    base: Base = Field(default_factory=lambda: Base())
    data: Data
    adapter: Adapter | None = Field(default_factory=lambda: Adapter())
    objective: Objective = Field(default_factory=lambda: Sft())
    train: Train = Field(default_factory=lambda: Train())
    prove: Prove = Field(default_factory=lambda: Prove())
    runtime: Runtime = Field(default_factory=lambda: Runtime())

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, raw: Any) -> Any:
        """`base: NAME`, and an objective that names no kind."""
        if not isinstance(raw, dict):
            return raw
        base, objective = raw.get("base"), raw.get("objective")
        if isinstance(base, str):
            raw = {**raw, "base": {"model": base}}
        if isinstance(objective, dict):
            raw = {**raw, "objective": {"kind": "sft", **objective}}
        return raw

    @model_validator(mode="before")
    @classmethod
    def _leash_has_a_use(cls, raw: Any) -> Any:
        objective = raw.get("objective") if isinstance(raw, dict) else None
        if isinstance(objective, dict) and "kl_to_base" in objective:
            kind = str(objective.get("kind"))
            if kind in NO_LEASH:
                raise ValueError(f"objective {kind} takes no kl_to_base: {NO_LEASH[kind]}; leave it out")
        return raw

    @model_validator(mode="after")
    def _patience_sees_something(self) -> Recipe:
        if self.train.patience is not None and (self.train.eval_every == 0 or self.data.held_out == 0):
            key = "train.eval_every" if self.train.eval_every == 0 else "data.held_out"
            raise ValueError(f"train.patience waits for better evaluations, and {key} is 0, so there are none")
        return self

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if not value or any(c in value for c in "/\\\0") or value.startswith("."):
            raise ValueError("a name is a plain word, without slashes or a leading dot")
        return value

    @model_validator(mode="after")
    def _quantised_weights_stay(self) -> Recipe:
        if self.base.quantize is not None and self.adapter is None:
            raise ValueError(
                f"base.quantize is {self.base.quantize}, but quantised weights can't be tuned; "
                "give the run an adapter, or take base.quantize out"
            )
        return self

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
        """Read a recipe file, apply `a.b=c` overrides, and resolve its paths. Raises InputError."""
        path = Path(path)
        raw, lines = read_yaml(path)
        raw.setdefault("name", path.stem)
        return cls._build(raw, overrides, path, lines)

    @classmethod
    def of_data(cls, path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
        """The recipe of a bare data file: every other key at its default."""
        path = Path(path)
        raw = {"name": path.name.split(".")[0] or "data", "data": {"train": str(path.resolve())}}
        return cls._build(raw, overrides, path, {})

    @classmethod
    def _build(
        cls, raw: dict[str, Any], overrides: Iterable[str], path: Path, lines: dict[tuple[str, ...], int]
    ) -> Recipe:
        for override in overrides:
            apply_override(raw, override)
        _resolve_paths(raw, path.parent)
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            raise _as_input_error(error, path, lines) from None

    def hash(self) -> str:
        """SHA-256 over every value that can change the result: not `name`, `runtime`, nor the folders files lie in.

        What the files hold is hashed by itself, in the lineage.
        """
        content = _without_folders(self.model_dump(mode="json", by_alias=True, exclude={"name", "runtime"}))
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True)


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


def _resolve_paths(raw: dict[str, Any], folder: Path) -> None:
    """Make paths absolute against the recipe's folder, where they point at something there or look like a path."""

    def resolve(text: Any) -> Any:
        if not isinstance(text, str) or text.startswith("hub:"):
            return text
        return str((folder / Path(text).expanduser()).resolve())

    data = raw.get("data")
    if isinstance(data, dict):
        train = data.get("train")
        if isinstance(train, str):
            data["train"] = resolve(train)
        elif isinstance(train, list):
            data["train"] = [
                {"path": resolve(entry)}
                if isinstance(entry, str)
                else {**entry, "path": resolve(entry.get("path"))}
                if isinstance(entry, dict)
                else entry
                for entry in train
            ]
        for key in ("held_out", "schema"):
            if isinstance(data.get(key), str):
                data[key] = resolve(data[key])
    for section, key in (("adapter", "init_from"), ("prove", "knowledge"), ("objective", "prompt_file")):
        if isinstance(raw.get(section), dict) and raw[section].get(key) is not None:
            raw[section][key] = resolve(raw[section][key])
    objective = raw.get("objective")
    if isinstance(objective, dict) and str(objective.get("teacher", "")).startswith((".", "~", "/")):
        objective["teacher"] = resolve(objective["teacher"])
    base = raw.get("base")
    model = base.get("model") if isinstance(base, dict) else base
    if isinstance(model, str) and (model.endswith(".gguf") or model.startswith((".", "~", "/"))):
        resolved = resolve(model)
        raw["base"] = base = {**base, "model": resolved} if isinstance(base, dict) else resolved
    if isinstance(base, dict) and base.get("chat_template") not in (None, "chatml", "plain"):
        base["chat_template"] = resolve(base["chat_template"])


def _as_input_error(error: ValidationError, path: Path, lines: dict[tuple[str, ...], int]) -> InputError:
    """The first fault as one sentence, an unknown key before any other."""
    faults = error.errors()
    fault = next((f for f in faults if f["type"] == "extra_forbidden"), faults[0])
    parts, objective = [str(part) for part in fault["loc"]], "sft"
    if parts[:1] == ["objective"] and len(parts) > 1:
        objective = parts.pop(1)  # pydantic puts the kind there
    where = tuple(parts)
    line = next((lines[where[:n]] for n in range(len(where), 0, -1) if where[:n] in lines), None)
    dotted = ".".join(where)
    if fault["type"] == "extra_forbidden":
        known = _known_keys(where[:-1], objective)
        near = difflib.get_close_matches(where[-1], known, n=1, cutoff=0.5)
        hint = f'did you mean "{near[0]}"?' if near else f"known here: {', '.join(known)}"
        return InputError(f'unknown key "{dotted}"; {hint}', file=path, line=line)
    if fault["type"] == "missing":
        return InputError(f'the key "{dotted}" is required', file=path, line=line)
    message = fault["msg"].removeprefix("Value error, ")
    said = f'"{dotted}": {message[:1].lower()}{message[1:]}' if dotted else message  # of several keys together
    return InputError(said, file=path, line=line)


def _known_keys(where: tuple[str, ...], objective: str) -> list[str]:
    """The keys allowed under a dotted place of a recipe with this objective."""
    kinds = {section.model_fields["kind"].default: section for section in get_args(get_args(Objective)[0])}
    sections: dict[str, type[Section]] = {
        "base": Base,
        "data": Data,
        "adapter": Adapter,
        "objective": kinds[objective],
        "train": Train,
        "prove": Prove,
        "runtime": Runtime,
    }
    model: type[Section] = Recipe if not where else TrainFile if where[:2] == ("data", "train") else sections[where[0]]
    return [info.alias or name for name, info in model.model_fields.items()]
