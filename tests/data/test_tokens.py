"""Token ids are made once, never out of date, never half written, and whether they were found changes nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from data_rows import chat, examples_of, recipe_data, varied

from conftest import CHATML, byte_tokenizer
from tunesmith.chat.renderer import Renderer
from tunesmith.data import mapped, tokenize, tokens
from tunesmith.errors import InputError

SRC = str(Path(tokens.__file__).parents[2])


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of the cache, in a home of the test's own."""
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "cache" / "tokens"


@pytest.fixture
def made(monkeypatch):
    """How many rows were rendered, as a list of one number."""
    count, render = [0], tokenize.render

    def counting(*args):
        count[0] += 1
        return render(*args)

    monkeypatch.setattr(tokenize, "render", counting)
    return count


def run(rows, renderer, limit=400, **keys):
    how = {name: keys.pop(name) for name in ("pieces", "strangers") if name in keys}
    return tokenize.tokenize(rows, renderer, recipe_data("rows.jsonl", **keys), limit, **how)


def same(one, other):
    for a, b in zip(one.examples, other.examples, strict=True):
        assert (a.example_id, a.input_ids.tolist(), a.weights.tolist()) == (
            b.example_id,
            b.input_ids.tolist(),
            b.weights.tolist(),
        )
    assert one.sentences(9) == other.sentences(9)
    return one.rows.tolist() == other.rows.tolist()


def test_what_was_made_once_is_found_and_equal(tmp_path, renderer, cache, made):
    short = [chat(row["input"], row["output"]) for row in varied(20)]
    rows = examples_of(tmp_path, [*short, chat("a" * 500, "b", "c", "d")])
    first = run(rows, renderer, on_long="truncate")
    count = made[0]
    assert count >= 21
    again = run(rows, renderer, on_long="truncate")
    assert made[0] == count
    assert same(first, again)
    assert (first.lost_answers, first.examples[20].input_ids.dtype) == (1, np.int32)
    (file,) = cache.iterdir()
    assert (file.stat().st_mode & 0o777, cache.stat().st_mode & 0o777) == (0o600, 0o700)


def test_whatever_matters_has_a_file_of_its_own(tmp_path, renderer, cache):
    rows = examples_of(tmp_path, varied(4))
    other_template = Renderer.from_tokenizer(byte_tokenizer(CHATML.replace("user", "User") + " "))
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["kettle"])
    runs = [
        (rows, renderer, 400, {}),
        (examples_of(tmp_path, [*varied(3), {**varied(4)[3], "output": "another"}]), renderer, 400, {}),
        (rows[::-1], renderer, 400, {}),
        (rows[:3], renderer, 400, {}),
        (rows, other_template, 400, {}),
        (rows, Renderer.from_tokenizer(tokenizer), 400, {}),
        (rows, Renderer.from_tokenizer(byte_tokenizer(), default_system="Be brief."), 400, {}),
        (rows, Renderer.from_tokenizer(byte_tokenizer(), stop_ids=[7]), 400, {}),
        (rows, renderer, 401, {}),
        (rows, renderer, 400, {"on_long": "drop"}),
        (rows, renderer, 400, {"train_on": "last"}),
        (rows, renderer, 400, {"pieces": True}),
    ]
    for number, (these, by, limit, keys) in enumerate(runs, start=1):
        run(these, by, limit, **keys)
        assert len([*cache.iterdir()]) == number, keys


def test_lessons_with_the_id_of_another_row_are_not_taken_for_it(tmp_path, renderer, cache):
    from dataclasses import replace

    (row,) = examples_of(tmp_path, varied(1))
    lesson = replace(row, messages=(row.messages[0], {"role": "assistant", "content": "by a teacher"}))
    assert len(run([row], renderer).examples[0].input_ids) != len(run([lesson], renderer).examples[0].input_ids)


def test_another_version_of_the_program_makes_its_own(tmp_path, renderer, cache, made, monkeypatch):
    rows = examples_of(tmp_path, varied(3))
    run(rows, renderer)
    monkeypatch.setattr(tokenize, "_program", lambda: "another")
    run(rows, renderer)
    assert made[0] == 6


@pytest.mark.parametrize("damage", ["cut", "changed", "emptied"])
def test_a_damaged_file_is_made_anew(tmp_path, renderer, cache, made, damage):
    rows = examples_of(tmp_path, varied(6))
    first = run(rows, renderer)
    expected = [each.input_ids.tolist() for each in first.examples]
    (file,) = cache.iterdir()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink()  # its pages are still mapped
    file.write_bytes({"cut": content[:-100], "changed": content, "emptied": b""}[damage])
    again = run(rows, renderer)
    assert [each.input_ids.tolist() for each in again.examples] == expected
    assert made[0] == 12
    run(rows, renderer)
    assert made[0] == 12
    assert len([*cache.iterdir()]) == 1


def test_rows_that_are_refused_leave_nothing(tmp_path, renderer, cache):
    rows = examples_of(tmp_path, varied(6))
    with pytest.raises(InputError, match="6 rows are over it"):
        run(rows, renderer, 20)
    assert [*cache.iterdir()] == []


@pytest.mark.parametrize("why", ["a file in its place", "no room"])
def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, renderer, cache, monkeypatch, why):
    if why == "no room":
        monkeypatch.setattr(tokens, "_kept", full_disk)
    else:
        cache.parent.mkdir(parents=True)
        cache.write_text("")
    rows = examples_of(tmp_path, varied(6))
    assert len(run(rows, renderer).examples) == 6
    assert cache.is_file() or [*cache.iterdir()] == []


def full_disk(*args):
    raise OSError(28, "No space left on device")


def test_a_full_disk_is_a_sentence_and_in_writing_leaves_nothing(tmp_path, renderer, cache, monkeypatch):
    rows = examples_of(tmp_path, varied(6))

    def write(file, made):
        with open("/dev/full", "wb", buffering=0) as full:
            real(full, made)

    real = tokens._write
    monkeypatch.setattr(tokens, "_write", write)
    with pytest.raises(InputError, match=r"no room .* TMPDIR"):
        run(rows, renderer)
    assert [*cache.iterdir()] == []
    monkeypatch.setattr(mapped.os, "posix_fallocate", full_disk)
    with pytest.raises(InputError, match="no room"):
        mapped.scratch((mapped.SMALL,), np.uint32)


def test_what_was_used_longest_ago_goes_first(tmp_path, renderer, cache, monkeypatch):
    rows = examples_of(tmp_path, varied(6))
    for limit in (400, 401, 402):
        run(rows, renderer, limit)
        for file in cache.iterdir():
            os.utime(file, (file.stat().st_atime, file.stat().st_mtime - 100))
    run(rows, renderer, 400)  # found, so used now
    monkeypatch.setattr(tokens, "MOST_BYTES", 2 * next(cache.iterdir()).stat().st_size + 10)
    before = {*cache.iterdir()}
    run(rows, renderer, 403)
    assert len(before & {*cache.iterdir()}) == 1
    assert len([*cache.iterdir()]) == 2
    monkeypatch.setattr(tokens, "_kept", full_disk)
    count = len([*cache.iterdir()])
    run(rows, renderer, 400)
    assert len([*cache.iterdir()]) == count


CHILD = """
import sys, time
from conftest import byte_tokenizer
from data_rows import recipe_data
from tunesmith.chat.renderer import Renderer
from tunesmith.data import tokenize
from tunesmith.data.formats import read_examples
data = recipe_data(sys.argv[1])
rows, render = read_examples(data), tokenize.render
def slow(*args):
    print("rendering", flush=True)
    time.sleep(float(sys.argv[2]))
    return render(*args)
tokenize.render = slow
found = tokenize.tokenize(rows, Renderer.from_tokenizer(byte_tokenizer()), data, 400)
print(sum(int(each.input_ids.sum()) for each in found.examples))
"""


def child(tmp_path, seconds):
    path = os.pathsep.join([SRC, str(Path(__file__).parent)])
    command = [sys.executable, "-c", CHILD, str(tmp_path / "rows.jsonl"), str(seconds)]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True)


def test_two_processes_at_once_both_have_it(tmp_path, renderer, cache):
    rows = examples_of(tmp_path, varied(10))
    both = [child(tmp_path, 0.1) for _ in range(2)]
    sums = {process.communicate()[0].split()[-1] for process in both}
    assert len([*cache.iterdir()]) == 1
    assert sums == {str(sum(int(each.input_ids.sum()) for each in run(rows, renderer).examples))}


def test_a_killed_writer_leaves_no_half_file_and_its_rest_is_swept_up(tmp_path, renderer, cache, made):
    rows = examples_of(tmp_path, varied(10))
    process = child(tmp_path, 60)
    assert process.stdout is not None
    assert process.stdout.readline() == "rendering\n"
    (left,) = cache.iterdir()
    assert left.suffix == ".partial"
    tokens._evict(cache, tokens.MOST_BYTES)
    assert left.exists()  # its process lives
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.1)
    assert len(run(rows, renderer).examples) == 10
    assert made[0] == 10
    assert [file.suffix for file in cache.iterdir()] == [".arrow"]
