"""Python packages made on the spot, found by the real pip through a local folder: no network, no mocks."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

from tunesmith.models.fetch import Member, PackageFile


def wheel(folder: Path, files: dict[str, bytes], name: str = "toy_data", version: str = "1.0") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    about = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in files.items():
            archive.writestr(member, content)
        # It asks for a package that does not exist and a Python that is long gone: neither is any business of ours.
        archive.writestr(
            f"{about}/METADATA",
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: nowhere\nRequires-Python: <3\n",
        )
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    return path


def sdist(folder: Path, files: dict[str, bytes], name: str = "toy_data", version: str = "1.0") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-{version}.tar.gz"
    setup = f'[project]\nname = "{name}"\nversion = "{version}"\n[build-system]\nrequires = ["setuptools"]\n'
    with tarfile.open(path, "w:gz") as archive:
        for member, content in {**files, "pyproject.toml": setup.encode()}.items():
            info = tarfile.TarInfo(f"{name}-{version}/{member}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def described(path: Path, project: str = "toy-data", version: str = "1.0") -> PackageFile:
    kind = "wheel" if path.suffix == ".whl" else "sdist"
    return PackageFile(project, version, kind, path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())


def member(path: str, content: bytes) -> Member:
    return Member(path, hashlib.sha256(content).hexdigest())
