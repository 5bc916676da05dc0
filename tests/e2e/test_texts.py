"""Continued pretraining over a tiny base: files of texts, cut, packed, trained, measured by the held-out loss."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

import tiny_llama
import tunesmith
from tunesmith.errors import InputError
from tunesmith.recipe import Recipe
from tunesmith.store.runs import Run, read_metrics

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "the", "dog", "run", "to", "the", "sea"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and texts in four kinds of file."""
    folder = tmp_path_factory.mktemp("texts")
    tiny_llama.save(folder / "base", max_position_embeddings=128)
    texts = [f"{i} " + " ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 6 + i)) for i in range(40)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:20]))
    (folder / "b.txt").write_text("\n\n".join(texts[20:30]))
    (folder / "c.md").write_text("# Notes\n\n" + "\n\n".join(texts[30:35]))
    with gzip.open(folder / "d.txt.gz", "wt") as file:
        file.write("\n\n".join(texts[35:]))
    return folder


def test_texts_are_trained_and_measured_before_and_after(folder: Path) -> None:
    (folder / "job.yaml").write_text(
        "base: base\ndata: {train: [a.jsonl, b.txt, c.md, d.txt.gz], held_out: 0.2, max_seq_len: 32}\n"
        "objective: {kind: cpt}\n"
        "train: {max_steps: 8, batch_examples: 8, lr: 1.0e-2, eval_every: 4}\n"
        "runtime: {memory_limit: 4GB}\n"
    )
    recipe = Recipe.load(folder / "job.yaml", [f"base={folder / 'base'}"])
    done = tunesmith.run(recipe, folder / "run")
    assert isinstance(done, Run)
    assert done.tuned() == done.adapter
    rows = read_metrics(done)
    steps, evals = ([row for row in rows if key in row] for key in ("loss", "held_out_loss"))
    assert all(row["examples"] == 8 and row["tokens"] <= 8 * 32 for row in steps)  # pieces, although texts are longer
    assert [row["step"] for row in evals] == [0, 4, 8]
    assert evals[-1]["held_out_loss"] < evals[0]["held_out_loss"] - 0.1
    with pytest.raises(InputError, match=r"held-out loss .* before training, .* after .*no answers to prove"):
        tunesmith.prove(done.folder)


def test_chat_rows_are_not_texts(folder: Path) -> None:
    (folder / "chat.jsonl").write_text('{"input": "a", "output": "b"}\n')
    recipe = Recipe.of_data(folder / "chat.jsonl", [f"base={folder / 'base'}", "objective.kind=cpt"])
    with pytest.raises(InputError, match="line 1: the row is a chat row, but objective cpt learns from a text"):
        tunesmith.train(recipe, folder / "refused")
