"""The house rules, held by a test: who may import whom, sizes, and the lists that outsiders rely on."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tunesmith
from tunesmith import recipe

SRC = Path(tunesmith.__file__).parent
FILES = sorted(SRC.rglob("*.py"))

# A module imports only from rows below its own (a package's own modules are always allowed).
ROWS = [
    {"cli"},
    {"pipeline", "conversation"},
    {"data_need", "workers"},
    {"fitting", "proof", "parity"},
    {"trainable"},
    {"planning", "lineage", "watch", "stopping", "parity_facts"},
    {"preparation"},
    {"teaching", "replay"},
    {"teachers"},
    {"train", "prove"},
    {"data", "engine"},
    {"chat", "models", "tree", "store"},
    {"recipe"},
    {"recipe_file"},
    {"types", "errors", "home", "progress", "disk", "cpu"},
]


def part_of(path: Path) -> str:
    first = path.relative_to(SRC).parts[0]
    return first.removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Every module a file imports, anywhere in it, outside `if TYPE_CHECKING`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            if node.module == "tunesmith":
                found.update(f"tunesmith.{alias.name}" for alias in node.names)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_imports_point_downwards(path: Path) -> None:
    part = part_of(path)
    if part == "__init__":
        return
    height = next((i for i, row in enumerate(ROWS) if part in row), None)
    assert height is not None, f"{part} has no row"
    allowed = {part}.union(*ROWS[height + 1 :])
    used = {name.split(".")[1] for name in imports(path) if name.startswith("tunesmith.")}
    assert used - {"__version__"} <= allowed, f"{part} imports {sorted(used - allowed)}"


def test_the_nouns_and_the_store_never_import_torch() -> None:
    light = [p for p in FILES if part_of(p) in {"recipe", "types", "errors", "home", "disk", "store"}]
    for path in light:
        assert not {name.split(".")[0] for name in imports(path)} & {"torch", "transformers"}, path


def test_help_needs_no_heavy_import() -> None:
    code = (
        "import sys, tunesmith.cli; print(sorted({'torch','transformers','numpy','scipy','altair'} & set(sys.modules)))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_sizes(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 400, f"{path.name} has {text.count(chr(10))} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name} is too long"


def test_no_pickle_and_no_code_from_data() -> None:
    for path in FILES:
        tree = ast.parse(path.read_text())
        assert not {name.split(".")[0] for name in imports(path)} & {"pickle", "dill", "cloudpickle", "marshal"}, path
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
        for call in calls:
            called = ast.unparse(call.func)
            assert called not in {"eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load"} or (
                called == "yaml.load" and "Safe" in ast.unparse(call)
            ), f"{path.name}: {called}"
            for keyword in call.keywords:
                # left out, transformers would ask on the terminal: only a plain refusal is allowed
                assert keyword.arg != "trust_remote_code" or ast.unparse(keyword.value) == "False", path


def test_recipe_keys_are_a_reviewed_list() -> None:
    def keys(model: type[recipe.Section], prefix: str = "") -> list[str]:
        found = []
        for name, info in model.model_fields.items():
            full = prefix + (info.alias or name)
            inside = [a for a in (info.annotation, *getattr(info.annotation, "__args__", ())) if _is_section(a)]
            found += [key for section in inside for key in keys(section, full + ".")] or [full]
        return list(dict.fromkeys(found))  # objectives of several kinds share keys

    assert " ".join(keys(recipe.Recipe)) == (
        "name base.model base.revision base.dtype base.quantize base.chat_template "
        "data.train data.held_out data.group_by data.format data.system data.schema data.train_on data.max_seq_len "
        "data.on_long data.balance data.replay "
        "adapter.kind adapter.rank adapter.alpha adapter.target_modules adapter.rslora adapter.dropout "
        "adapter.init_from "
        "objective.kind objective.kl_to_base objective.beta "
        "objective.prompt objective.prompt_file objective.top_k objective.margin "
        "objective.teacher objective.kl_share objective.keep_above "
        "train.epochs train.max_steps train.batch_examples train.lr train.schedule train.warmup_ratio "
        "train.weight_decay train.max_grad_norm train.betas train.eps train.seed train.shuffle "
        "train.eval_every train.save_every "
        "train.patience "
        "prove.scorers prove.contenders prove.few_shot prove.knowledge prove.max_new_tokens prove.retention "
        "runtime.device runtime.threads runtime.memory_limit runtime.workers runtime.shard runtime.price_per_hour "
        "runtime.vllm"
    )


def _is_section(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, recipe.Section)


def test_commands_are_a_reviewed_list() -> None:
    from typer.main import get_command

    from tunesmith.cli import app

    def names(command: object, prefix: str = "") -> list[str]:
        inner = getattr(command, "commands", None)
        if inner is None:
            return [prefix.strip()]
        return [name for key in inner for name in names(inner[key], f"{prefix} {key}")]

    assert sorted(names(get_command(app))) == sorted(
        ["check", "plan", "train", "prove", "run", "chat", "export", "verify"]
        + [f"runs {verb}" for verb in ("list", "show", "compare", "rm")]
        + [f"models {verb}" for verb in ("list", "pull", "rm")]
    )


def test_public_names_are_a_reviewed_list() -> None:
    assert sorted(tunesmith.__all__) == [
        "Answer", "Engine", "Recipe", "Request", "__version__", "check", "plan", "prove", "run", "train", "verify",
    ]  # fmt: skip
    for name in tunesmith.__all__:
        assert getattr(tunesmith, name) is not None


def test_readme_stays_short() -> None:
    assert (SRC.parents[1] / "README.md").read_text().count("\n") < 120
