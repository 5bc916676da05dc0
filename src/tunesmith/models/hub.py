"""Fetch a model from the Hugging Face hub: safetensors, configuration and tokenizer only, pinned to a commit."""

from __future__ import annotations

import sys
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # of whichever HTTP library the client uses
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tunesmith.errors import InputError
from tunesmith.models.fetch import refuse_if_offline
from tunesmith.models.folders import check_folder

# No code and no pickles: what is not asked for is never on this machine.
WANTED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model", "spiece.model", "*.txt"]
NOT_WANTED = ["*/*", "*.onnx*", "consolidated*", "original*"]


def snapshot(model: str, revision: str | None, cache: Path) -> tuple[Path, str]:
    """The folder and commit of a hub model: what is on this machine already, else fetched. Raises InputError.

    Looks in $TUNESMITH_HOME first and then in the person's own Hugging Face cache, and fetches into the former.
    """
    stored = stored_snapshot(model, revision, cache)
    if stored is not None:
        return stored, stored.name
    refuse_if_offline(model)
    print(f"fetching {model} from the Hugging Face hub", file=sys.stderr, flush=True)
    try:
        folder = Path(
            snapshot_download(
                model, revision=revision, cache_dir=cache, allow_patterns=WANTED, ignore_patterns=NOT_WANTED
            )
        )
    except GatedRepoError:
        raise InputError(
            f"{model} asks for its terms to be accepted; do so on its page, then log in with `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise InputError(f"there is no model {model} on the hub, or it is private; check its spelling") from None
    except RevisionNotFoundError:
        raise InputError(f"{model} has no revision {revision}; name a branch, a tag or a commit") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, HTTPError, OSError) as error:
        raise InputError(
            f"{model} could not be fetched ({_first_line(error)}); check the network, or name a folder that exists"
        ) from None
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"{model} has no safetensors weights on the hub, and pickled ones are never loaded")
    _mark(folder).touch()
    return folder, folder.name


def stored_snapshot(model: str, revision: str | None, cache: Path) -> Path | None:
    """The whole snapshot on this machine, ours or the person's own, or None."""
    ours = _on_disk(model, revision, cache)
    if ours is not None and _mark(ours).is_file():
        return ours
    return _on_disk(model, revision, None)


def _on_disk(model: str, revision: str | None, cache: Path | None) -> Path | None:
    """A snapshot in a cache (None: the person's own), if it holds a model."""
    try:
        folder = Path(snapshot_download(model, revision=revision, cache_dir=cache, local_files_only=True))
        check_folder(folder)
    except (LocalEntryNotFoundError, IncompleteSnapshotError, HFValidationError, InputError):
        return None
    return folder


def _mark(folder: Path) -> Path:
    """Set once every file of a snapshot has been fetched: an interrupted download looks much like a whole one."""
    return folder.parents[1] / f"whole-{folder.name}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
