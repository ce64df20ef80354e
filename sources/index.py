"""Indexes of data files: built once, kept in the cache, and checked against the files each time they are opened."""

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sources import table
from sources.cache import write_whole
from sources.files import Files
from utils import log

VERSION = 1  # changes whenever an index of the same files would hold something else

Built = tuple[dict, dict[str, np.ndarray]]  # facts and columns


def cached(kind: str, files: Files, build: Callable[[], Built]) -> table.Table:
    """The index of that kind of `files`: from the cache where it is of these very files, else built, which one process of a node does
    while the others wait."""
    listing = {"version": VERSION, "files": [file.listed() for file in files]}
    key = hashlib.blake2b("\0".join([kind, *(file.path for file in files)]).encode(), digest_size=16).hexdigest()
    is_writable = files.cache.is_writable()
    with files.cache.lock(f"index-{key}") if is_writable else contextlib.nullcontext():
        path = files.cache.folder / "indexes" / f"{key}.table"
        found = _read(path, listing, files)
        if found is not None:
            return found
        facts, columns = build()
        parts = table.encode({**facts, "listing": listing}, columns)
        if not is_writable:
            return table.decode(b"".join(parts))
        try:
            files.cache.made("indexes")
            write_whole(path, parts)
            return table.read(path)
        except OSError as error:
            log.warning("%s cannot be written (%s): the index is built anew at the next start", path, error.strerror)
            return table.decode(b"".join(parts))


def _read(path: Path, listing: dict, files: Files) -> table.Table | None:
    """The index in the cache; None where there is none, it is damaged, or of files that have changed since, which is said."""
    where = f"{files[0].path}{f' and {len(files) - 1} others' if len(files) > 1 else ''}"
    try:
        found = table.read(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("the index of %s is damaged (%s): building it anew", where, error)
        return None
    if found.facts["listing"] == listing:
        return found
    old = {tuple(entry) for entry in found.facts["listing"]["files"]}
    changed = [file.path for file in files if tuple(file.listed()) not in old]
    log.warning("the index of %s is older than %s: building it anew", where, changed[0] if changed else "this version of the project")
    return None
