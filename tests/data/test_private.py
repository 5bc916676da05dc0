"""What is private is found, and what only looks like it is left alone."""

from __future__ import annotations

import pytest

from tunesmith.data.private import is_card, is_iban, mask, personal_data, quote, secrets


@pytest.mark.parametrize(
    "text",
    [
        "8128 S. DR MARTIN LUTHER KING JR Drive, Chicago IL 60601-1234",
        "On 2024-01-15 at 10:30:00 order 12345678901234 arrived",
        "version 1.2.3.4 of numpy-2.3.1, see https://example.org/a/very/long/path/with-words-1234567",
        "def keyword_only_argument_function_2(self): return internationalization",
        "The password: please reset it soon",
        "call f(x) @ y, or 3.14159265358979 times",
        "ISBN 978-3-16-148410-0",
    ],
)
def test_ordinary_text(text):
    assert [*secrets(text), *personal_data(text)] == []
    assert mask(text) == text


def test_masking_keeps_length_and_all_else():
    text = "key=AKIAIOSFODNN7EXAMPLE, mail a@b.org, twice a@b.org."
    hidden = mask(text)
    assert len(hidden) == len(text)
    assert hidden.startswith("key=")
    assert hidden.endswith(", twice •••••••.") or hidden.count("•") == 20 + 7 + 7


def test_a_secret_is_masked_whole_and_everywhere():
    token = "ghp_abcdefghijklmnopqrstuvwxyz0123456789"
    assert "abcdef" not in mask(f"{token} and again {token}")
    assert "MIIE" not in mask("-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKC\nAQEA7\n-----END RSA PRIVATE KEY-----")


def test_checksums():
    assert is_card("4111 1111 1111 1111")
    assert not is_card("4111 1111 1111 1112")
    assert is_iban("GB82 WEST 1234 5698 7654 32")
    assert not is_iban("GB82 WEST 1234 5698 7654 33")


def test_quotes_are_short_and_on_one_line():
    assert quote("a\nb " * 100, 10) == '"a b a b a…"'


def test_no_control_character_reaches_the_terminal():
    assert quote("red\x1b[31m\x00 \u202eleft") == '"red [31m left"'
