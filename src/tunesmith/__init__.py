"""tunesmith: fine-tune a small open model on your examples, with proof that it beats prompting."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunesmith.engine.engine import Engine
    from tunesmith.engine.request import Answer, Request
    from tunesmith.pipeline import check, plan, prove, run, train, verify
    from tunesmith.recipe import Recipe

__version__ = "0.1.0"

__all__ = ["Answer", "Engine", "Recipe", "Request", "__version__", "check", "plan", "prove", "run", "train", "verify"]

_WHERE = {"Engine": "engine.engine", "Request": "engine.request", "Answer": "engine.request", "Recipe": "recipe"}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that the command line starts without torch."""
    if name not in __all__:
        raise AttributeError(f"module 'tunesmith' has no attribute '{name}'")
    return getattr(importlib.import_module(f"tunesmith.{_WHERE.get(name, 'pipeline')}"), name)


class _Package(ModuleType):
    """Keeps `tunesmith.train` and `tunesmith.prove` the functions, though subpackages have the same names.

    Python binds a subpackage to its parent's attribute when it is first imported; `from tunesmith.train.loop import …`
    needs no such attribute.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
