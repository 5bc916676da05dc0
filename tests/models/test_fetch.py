"""Files out of packages: checked, retried, whole or not at all."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import packages
import pytest

from tunesmith.errors import InputError
from tunesmith.models import fetch
from tunesmith.models.fetch import Member, fetch_members, readable_size, writing

DATA = b"some data\n" * 1000


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """pip, pointed at a folder by its own settings and at nothing else."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setattr(fetch.time, "sleep", lambda seconds: None)
    (tmp_path / "index").mkdir()
    return tmp_path / "index"


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_member_of_a_wheel(index, tmp_path, capsys) -> None:
    package = packages.described(packages.wheel(index, {"toy/a.txt": DATA, "toy/b.txt": b"b"}))
    wanted = {packages.member("toy/a.txt", DATA): tmp_path / "out" / "a", Member("toy/b.txt"): tmp_path / "out" / "b"}
    fetch_members(package, wanted, what="the toy data")
    assert (tmp_path / "out" / "a").read_bytes() == DATA
    assert left(tmp_path / "out") == ["a", "b"]
    assert capsys.readouterr().err == "fetching the toy data: package toy-data 1.0, 0 MB\n"


def test_a_member_of_an_sdist(index, tmp_path) -> None:
    """pip builds the metadata without a network: the second attempt uses this environment's own setuptools."""
    package = packages.described(packages.sdist(index, {"training/a.xml": DATA}))
    fetch_members(package, {packages.member("training/a.xml", DATA): tmp_path / "out" / "a"}, what="the toy data")
    assert left(tmp_path / "out") == ["a"]


@pytest.mark.parametrize("fault", ["package", "member", "absent", "damaged"])
def test_what_is_not_as_expected_is_never_placed(fault, index, tmp_path) -> None:
    path = packages.wheel(index, {"toy/a.txt": DATA})
    package = packages.described(path)
    wanted = packages.member("toy/a.txt", DATA)
    if fault == "package":
        package = replace(package, sha256="0" * 64)
    elif fault == "member":
        wanted = packages.member("toy/a.txt", b"other")
    elif fault == "absent":
        wanted = Member("toy/z.txt")
    else:
        content = path.read_bytes()
        path.write_bytes(content.replace(DATA[:50], b"x" * 50))
        package, wanted = replace(package, sha256=None), Member("toy/a.txt")
    with pytest.raises(InputError, match=r"is expected, so it was not used|damaged or lacks") as caught:
        fetch_members(package, {wanted: tmp_path / "out" / "a"}, what="the toy data")
    assert "\n" not in str(caught.value)
    assert left(tmp_path / "out") == []


def test_a_package_that_cannot_be_reached_is_tried_again_and_then_a_sentence(index, tmp_path, capsys) -> None:
    package = packages.described(packages.wheel(index, {"toy/a.txt": DATA}))
    with pytest.raises(InputError, match=r"the toy data could not be fetched .*check the network"):
        fetch_members(replace(package, version="9"), {Member("a"): tmp_path / "out" / "a"}, what="the toy data")
    assert "trying again (3 of 3)" in capsys.readouterr().err
    assert left(tmp_path / "out") == []


def test_a_broken_download_is_tried_again(index, tmp_path, monkeypatch) -> None:
    package = packages.described(packages.wheel(index, {"toy/a.txt": DATA}))
    real, calls = fetch.subprocess.run, []

    def flaky(command, **options):
        calls.append(command)
        return real(command if len(calls) > 1 else [*command[:3], "no-such-command"], **options)

    monkeypatch.setattr(fetch.subprocess, "run", flaky)
    fetch_members(package, {Member("toy/a.txt"): tmp_path / "a"}, what="the toy data")
    assert len(calls) == 2
    assert (tmp_path / "a").read_bytes() == DATA


def test_offline_forbids_and_says_so(index, tmp_path, monkeypatch) -> None:
    package = packages.described(packages.wheel(index, {"toy/a.txt": DATA}))
    monkeypatch.setenv("TUNESMITH_OFFLINE", "1")
    monkeypatch.setattr(fetch.subprocess, "run", lambda *a, **k: pytest.fail("pip was started"))
    with pytest.raises(InputError, match="TUNESMITH_OFFLINE forbids"):
        fetch_members(package, {Member("toy/a.txt"): tmp_path / "a"}, what="the toy data")


def test_a_python_without_pip_is_told(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(fetch.sys, "executable", "/usr/bin/python-without-pip")

    def without_pip(command, **options):
        return fetch.subprocess.CompletedProcess(command, 1, "", f"{command[0]}: No module named pip")

    monkeypatch.setattr(fetch.subprocess, "run", without_pip)
    with pytest.raises(InputError, match="has no pip"):
        fetch_members(fetch.PackageFile("x", "1", "wheel", 1), {Member("a"): tmp_path / "a"}, what="x")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_a_disk_that_refuses_is_a_sentence(number, tmp_path) -> None:
    with pytest.raises(InputError, match=r"cannot write here .*TUNESMITH_HOME") as caught, writing(tmp_path):
        raise OSError(number, os.strerror(number))
    assert str(tmp_path) in str(caught.value)


def test_sizes_are_readable() -> None:
    assert [readable_size(size) for size in (92_871_040, 538_000_000, 1_250_000_000)] == ["93 MB", "538 MB", "1.2 GB"]
