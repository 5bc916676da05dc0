"""From an answer's text back to a message: tool calls in the notations that chat templates teach."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from tunesmith.types import Message

# <tool_call>{"name": ..., "arguments": {...}}</tool_call>     Hermes, Qwen, SmolLM
TAGGED = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
# [TOOL_CALLS] [{"name": ..., "arguments": {...}}]             Mistral
LISTED = re.compile(r"\[TOOL_CALLS\]\s*(\[.*\])", re.DOTALL)
# {"name": ..., "parameters": {...}}                           Llama 3
BARE = re.compile(r"(?:<\|python_tag\|>)?\s*(\{.*\})", re.DOTALL)


# <think>...</think>The answer.     also where the prompt itself opened the thought
THOUGHT = re.compile(r"^.*</think>\s*", re.DOTALL)


def spoken(text: str) -> str:
    """An answer without the reasoning before it: what is compared with an expected answer, or shown to a user."""
    return THOUGHT.sub("", text)


def parse_answer(*, raw: str, text: str) -> Message:
    """An assistant message without reasoning. `raw` has special tokens (calls are written with them), `text` none."""
    raw, text = spoken(raw), spoken(text)
    for pattern in (TAGGED, LISTED):
        calls = [call for found in pattern.findall(raw) for call in _calls(found)]
        if calls:
            rest = pattern.sub("", raw).strip()
            return {"role": "assistant", "content": rest or None, "tool_calls": calls}
    whole = BARE.fullmatch(raw.strip())
    if whole and "parameters" in raw and (calls := _calls(whole.group(1))):
        return {"role": "assistant", "content": None, "tool_calls": calls}
    return {"role": "assistant", "content": text}


def _calls(text: str) -> list[dict[str, Any]]:
    """The calls in a piece of JSON, in OpenAI's shape; none where it is not a call."""
    try:
        found = json.loads(text)
    except ValueError:
        return []
    calls = []
    for number, call in enumerate(found if isinstance(found, list) else [found]):
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return []
        arguments = call.get("arguments", call.get("parameters", {}))
        # An id that depends on nothing but the call: the same answer always parses to the same message.
        digest = hashlib.sha256(f"{number} {text}".encode()).hexdigest()[:16]
        function = {"name": call["name"], "arguments": json.dumps(arguments, ensure_ascii=False)}
        calls.append({"id": f"call_{digest}", "type": "function", "function": function})
    return calls
