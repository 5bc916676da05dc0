"""A recipe's file: its text, its keys with the lines they stand on, and `--set` over it."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import yaml

from tunesmith.errors import InputError


def read_text_file(path: Path, what: str) -> str:
    """The text of a `what` (recipe, schema) that the user named. Raises InputError."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise InputError(f"this is a folder; name a {what} file", file=path)
        if not stat.S_ISREG(mode):  # opening a FIFO would wait for ever
            raise InputError(f"this is a pipe or a device, not a {what}; save it to a file first", file=path)
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"there is no such {what}; check the path", file=path) from None
    except UnicodeDecodeError:
        raise InputError(f"the {what} is not UTF-8 text; save it as UTF-8", file=path) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"the {what} cannot be read ({reason})", file=path) from None


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    text = read_text_file(path, "recipe")
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise InputError(f"not valid YAML: {problem}", file=path, line=mark.line + 1 if mark else None) from None
    if not isinstance(raw, dict) or not all(isinstance(key, str) for key in raw):
        raise InputError("a recipe is a mapping such as `data: {train: rows.jsonl}`; this file holds none", file=path)
    lines: dict[tuple[str, ...], int] = {}
    _collect_lines(node, (), lines, path)
    return raw, lines


def _collect_lines(
    node: yaml.Node | None, where: tuple[str, ...], lines: dict[tuple[str, ...], int], path: Path
) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        here, line = (*where, str(key.value)), key.start_mark.line + 1
        if here in lines:
            raise InputError(f'the key "{".".join(here)}" stands twice; keep one', file=path, line=line)
        lines[here] = line
        _collect_lines(value, here, lines, path)


def apply_override(raw: dict[str, Any], override: str) -> None:
    dotted, sign, text = override.partition("=")
    if not sign or not dotted:
        raise InputError(f'--set "{override}" is not of the form a.b=c')
    try:
        value: Any = yaml.safe_load(text) if text else None
    except yaml.YAMLError:
        value = text
    *parents, last = dotted.strip().split(".")
    section = raw
    for parent in parents:
        inner: Any = section.get(parent)
        if parent == "base" and isinstance(inner, str):
            inner = {"model": inner}
        section[parent] = inner = {} if inner is None else inner
        if not isinstance(inner, dict):
            raise InputError(f'--set "{override}": "{parent}" is a value, not a section')
        section = inner
    section[last] = value
