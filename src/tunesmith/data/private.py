"""Secrets and personal data in text: finding them, and never printing them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

from tunesmith.data import wording

MASK = "•"
SECRET_PLUGINS = (
    ("aws", "AWSKeyDetector"),
    ("azure_storage_key", "AzureStorageKeyDetector"),
    ("basic_auth", "BasicAuthDetector"),
    ("discord", "DiscordBotTokenDetector"),
    ("github_token", "GitHubTokenDetector"),
    ("gitlab_token", "GitLabTokenDetector"),
    ("jwt", "JwtTokenDetector"),
    ("mailchimp", "MailchimpDetector"),
    ("npm", "NpmDetector"),
    ("openai", "OpenAIDetector"),
    ("private_key", "PrivateKeyDetector"),
    ("pypi_token", "PypiTokenDetector"),
    ("sendgrid", "SendGridDetector"),
    ("slack", "SlackDetector"),
    ("square_oauth", "SquareOAuthDetector"),
    ("stripe", "StripeDetector"),
    ("telegram_token", "TelegramBotTokenDetector"),
    ("twilio", "TwilioKeyDetector"),
)
# Text without any of this is not worth the detectors' time: a long run with a digit in it, or a telling word.
WORTH_A_LOOK = re.compile(r"[\w/+=-]{16,}|PRIVATE KEY|://[^\s/@]+:[^\s/@]+@")
ASSIGNED = re.compile(
    r"\b(?:password|passwd|pwd|secret|api[_-]?key|access[_-]?key|auth[_-]?token|access[_-]?token)"
    r"[\"']?\s*[:=]\s*[\"']?(?P<value>(?=[^\s\"']*\d)(?=[^\s\"']*[a-z])[^\s\"',;]{8,})",
    re.IGNORECASE,
)
ASSIGNED_WORDS = ("pass", "pwd", "secret", "key", "token")
EMAIL = re.compile(r"\b[A-Za-z0-9][\w.%+-]*@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*\.[A-Za-z]{2,}\b")
PHONE = re.compile(
    r"(?<![\w.+-])(?:"
    r"(?:\+?1[ .-]?)?(?:\([2-9]\d\d\) ?|[2-9]\d\d[ .-])\d{3}[ .-]\d{4}"  # North America
    r"|\+\d{1,3}(?:[ .-]?\(?\d{2,4}\)?){2,5}"  # anywhere, with its country code
    r")(?![\w-])"
)
CARD = re.compile(r"(?<![\w-])[3-6]\d{3}(?:[ -]?\d{3,4}){2}[ -]?\d{1,7}(?![\w-])")
SOCIAL_SECURITY = re.compile(r"(?<![\w-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])")
IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}(?: ?[A-Z0-9]{1,3})?\b")
DIGITS = re.compile(r"\d{3}")
REST_OF_RUN = re.compile(r"[\w/+=.-]+")


class Span(NamedTuple):
    """Characters `start` to `end` of a text, and what they are."""

    start: int
    end: int
    kind: str


def mask(text: str) -> str:
    """The text with every private character as •, its length unchanged."""
    spans = [*secrets(text), *personal_data(text)]
    if not spans:
        return text
    characters = list(text)
    for start, end, _ in spans:
        characters[start:end] = [c if c.isspace() else MASK for c in characters[start:end]]
    return "".join(characters)


def quote(text: str, length: int = 60) -> str:
    """A text as a report may print it: masked, on one line, shortened."""
    flat = " ".join(wording.printable(mask(text[: 100 * length])).split())
    return f'"{flat if len(flat) <= length else flat[: length - 1] + "…"}"'


def secrets(text: str) -> list[Span]:
    """Keys, tokens and passwords, by detect-secrets' patterns for known issuers and by `password: …`."""
    found: list[Span] = []
    if any(not run.group().isalpha() for run in WORTH_A_LOOK.finditer(text)):
        for kind, search in _detectors():
            for value in {*search(text)} - {""}:
                for hit in re.finditer(re.escape(value), text):
                    found.append(Span(hit.start(), _secret_end(text, hit.end(), kind), kind))
    lowered = text.lower()
    if any(word in lowered for word in ASSIGNED_WORDS):
        found.extend(Span(*hit.span("value"), "password") for hit in ASSIGNED.finditer(text))
    return found


def _secret_end(text: str, end: int, kind: str) -> int:
    """Detectors may report only a secret's start: take in the rest of the run, or of the key block."""
    if kind == "private key":
        closing = text.find("-----END", end)
        return len(text) if closing < 0 else closing
    rest = REST_OF_RUN.match(text, end)
    return rest.end() if rest else end


def personal_data(text: str) -> list[Span]:
    """E-mail addresses, telephone, card and bank account numbers, US social security numbers."""
    found = [Span(*hit.span(), "e-mail address") for hit in EMAIL.finditer(text)] if "@" in text else []
    if DIGITS.search(text):
        found.extend(Span(*hit.span(), "telephone number") for hit in PHONE.finditer(text) if _is_phone(hit.group()))
        found.extend(Span(*hit.span(), "card number") for hit in CARD.finditer(text) if is_card(hit.group()))
        found.extend(Span(*hit.span(), "social security number") for hit in SOCIAL_SECURITY.finditer(text))
        found.extend(Span(*hit.span(), "bank account") for hit in IBAN.finditer(text) if is_iban(hit.group()))
    return found


def is_card(text: str) -> bool:
    """13 to 19 digits whose Luhn sum is right."""
    digits = [int(c) for c in text if c.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return 13 <= len(digits) <= 19 and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def is_iban(text: str) -> bool:
    """The check of ISO 13616: letters as numbers, the first four signs at the end, modulo 97."""
    plain = text.replace(" ", "")
    return 15 <= len(plain) <= 34 and int("".join(str(int(c, 36)) for c in plain[4:] + plain[:4])) % 97 == 1


def _is_phone(text: str) -> bool:
    return 8 <= sum(c.isdigit() for c in text) <= 15


@cache
def _detectors() -> list[tuple[str, Callable[[str], Iterator[str]]]]:
    from importlib import import_module

    found: list[tuple[str, Any]] = []
    for module, name in SECRET_PLUGINS:
        plugin = getattr(import_module(f"detect_secrets.plugins.{module}"), name)()
        found.append((plugin.secret_type.lower(), plugin.analyze_string))
    return found
