"""Whether the files of a checkpoint are the ones that were published: the safetensors format has no checksum of its own.

SHA-256 digests are looked for where they are kept: in `SHA256SUMS` beside the files (what `sha256sum` writes and `record`
too), and where the Hugging Face hub's client leaves them: the name of the blob that a file links to, or the file's metadata
under `.cache/huggingface/download`.
"""

from __future__ import annotations

import hashlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from moerunner.errors import CheckpointError

SUMS = "SHA256SUMS"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_KEPT = (".safetensors", ".json")


def compare_digests(path: str | Path) -> tuple[list[str], list[str]]:
    """Problems: files that are not what their digest says. Notes: the files of weights that have no digest, if any.

    Raises:
        CheckpointError: SHA256SUMS cannot be read, or names a file that is not there.
    """
    folder = Path(path)
    listed = _listed(folder / SUMS)
    weights = sorted(file.name for file in folder.glob("*.safetensors"))
    expected = {name: digest for name in weights if (digest := _of_the_hub(folder, name))} | listed
    absent = [name for name in expected if not (folder / name).is_file()]
    if absent:
        raise CheckpointError(f"names {', '.join(absent)}, which is not there", where=str(folder / SUMS))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(expected, pool.map(lambda name: digest_of(folder / name), expected), strict=True))
    wrong = [f"{name}: its bytes are not those of its checksum" for name in expected if found[name] != expected[name]]
    unsure = ", ".join(name for name in weights if name not in expected)
    return wrong, [f"no checksum of {unsure} is known: changed bytes that leave plausible numbers go unseen"] if unsure else []


def record(path: str | Path) -> Path:
    """Writes SHA256SUMS for the weights and the JSON files of a folder as they are now."""
    folder = Path(path)
    names = sorted(file.name for file in folder.iterdir() if file.suffix in _KEPT)
    if not names:
        raise CheckpointError("holds no file of a checkpoint", where=str(folder))
    (folder / SUMS).write_text("".join(f"{digest_of(folder / name)}  {name}\n" for name in names))
    return folder / SUMS


def digest_of(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _listed(sums: Path) -> dict[str, str]:
    if not sums.is_file():
        return {}
    try:
        lines = sums.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot be read: {error}", where=str(sums)) from error
    found = {}
    for number, line in enumerate(lines, start=1):
        digest, _, name = line.partition(" ")
        name = name.strip().removeprefix("*")
        if not line.strip():
            continue
        if not _DIGEST.fullmatch(digest) or not name or Path(name).name != name:
            raise CheckpointError(f"line {number} is no digest and the name of a file beside it", where=str(sums))
        found[name] = digest
    return found


def _of_the_hub(folder: Path, name: str) -> str | None:
    file = folder / name
    if file.is_symlink() and _DIGEST.fullmatch(file.readlink().name):
        return file.readlink().name
    kept = folder / ".cache" / "huggingface" / "download" / f"{name}.metadata"
    if not kept.is_file():
        return None
    lines = kept.read_text(errors="replace").split()
    return next((line for line in lines if _DIGEST.fullmatch(line)), None)
