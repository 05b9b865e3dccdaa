"""SHA256SUMS of an export: one checksum per file, as `sha256sum -c SHA256SUMS` reads it. No JAX."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from jvitmoe.errors import UserError
from jvitmoe.runs import safe_io

NAME = "SHA256SUMS"
CARD = "README.md"  # not in it: its owner adds a licence, and nothing is computed from it


def write(folder: Path) -> None:
    """Writes the manifest of all files in the folder but the card. Raises UserError where that fails."""
    paths = sorted(path for path in folder.iterdir() if path.name not in (NAME, CARD))
    with safe_io.writing(folder / NAME):
        lines = [f"{_sha256(path)}  {path.name}\n" for path in paths]
    safe_io.write_text(folder / NAME, "".join(lines))


def check(weights: Path, beside: Iterable[str]) -> bool:
    """Returns True if the folder has a manifest that lists the weights, and then these files and those `beside` them
    are as it says: equal, or absent. Raises UserError for the first that is not."""
    lines = (safe_io.read_bytes(weights.with_name(NAME), follow=True) or b"").decode(errors="replace").splitlines()
    listed = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    if weights.name not in listed:
        return False
    found: dict[str, str | None] = {weights.name: _sha256(weights)}
    for name in beside:
        content = safe_io.read_bytes(weights.with_name(name), follow=True)
        found[name] = None if content is None else hashlib.sha256(content).hexdigest()
    if odd := [name for name, digest in found.items() if digest != listed.get(name)]:
        remedy = f"restore it from a copy, or delete {NAME} if you changed it yourself"
        raise UserError(f"{odd[0]} is not the file that {NAME} lists; {remedy}")
    return True


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
