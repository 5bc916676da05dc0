"""What the parity gate compares, and what it found."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from tunesmith.chat.renderer import Renderer
from tunesmith.types import Message

END = "end"  # the check that answers end


@dataclass(frozen=True, slots=True)
class Row:
    """One answer: what was asked, the ids both sides see, and the trainer's log-probability of each answer token."""

    name: str  # where it stands in the data
    prompt_ids: list[int]
    answer_ids: list[int]
    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    prompt: str | None = None
    ends: bool = True  # the answer is whole, its last token ends it
    logprobs: list[float] = field(default_factory=list)

    def rendered(self, renderer: Renderer) -> list[int]:
        """The prompt as the engine would be given it."""
        if self.messages:
            return renderer.prompt_ids(self.messages, list(self.tools))
        return self.prompt_ids if self.prompt is None else renderer.completion_prompt_ids(self.prompt)


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that must hold; `passed` is None where there is nothing to hold it against."""

    name: str
    passed: bool | None
    said: str


@dataclass(frozen=True, slots=True)
class Parity:
    """What the gate found. `reason` is the first thing that does not hold."""

    checks: tuple[Check, ...]
    rows: tuple[Row, ...] = ()

    @property
    def reason(self) -> str | None:
        return next((check.said for check in self.checks if check.passed is False), None)

    @property
    def passed(self) -> bool:
        return self.reason is None

    @property
    def publishable(self) -> bool:
        """All holds but perhaps that answers end, which more training mends."""
        return all(check.passed is not False for check in self.checks if check.name != END)

    def to_json(self) -> dict[str, Any]:
        return {"passed": self.passed, "reason": self.reason, "checks": [asdict(check) for check in self.checks]}

    def render(self) -> str:
        """One line a check, then the verdict."""
        marks = {True: "ok", False: "REFUSED", None: "-"}
        lines = [f"{marks[check.passed]:8} {check.name:10} {check.said}" for check in self.checks]
        return "\n".join([*lines, "served as trained" if self.passed else "refused"])
