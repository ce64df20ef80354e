"""Files in a store that fsspec knows (s3://, gs://, hf://, ...), read through blocks that are kept in a local folder of bounded size.

A block is fetched by one process of the node while others that want it wait, and appears whole or not at all. What the store refuses is
asked for again, each time with a word; what it refuses for good stops the run, for a gap would change what is trained."""

import contextlib
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

from run.errors import InputError, first_line
from sources.cache import Cache, write_whole
from utils import log

BLOCK = 1 << 20  # bytes
ATTEMPTS = 6
FIRST_WAIT_S = 0.5  # doubled after each attempt
SWEEP_EVERY = 64  # blocks that a process adds between looks at the folder's size
SWEPT_TO = 0.9  # of the limit: what a sweep leaves


def is_url(path: str) -> bool:
    return "://" in path


def _file_system(url: str):
    """fsspec's file system for a URL, and the path in it. InputError naming what to install."""
    try:
        import fsspec
    except ImportError as error:
        raise InputError(f"{url} needs fsspec: pip install -r requirements-sources.txt") from error
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise InputError(f"{url}: {first_line(error)}; install the store's driver (s3fs for s3://, gcsfs for gs://, huggingface_hub for hf://)") from error


def _insist(what: str, ask: Callable):
    """What `ask()` returns, asked again where it fails; InputError where it fails to the end. A file that is not there is not asked for again."""
    wait_s = FIRST_WAIT_S
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return ask()
        except (FileNotFoundError, PermissionError) as error:
            raise InputError(f"{what}: {first_line(error)}: check the URL and your access to it") from error
        except Exception as error:  # each driver has errors of its own
            if attempt == ATTEMPTS:
                raise InputError(f"{what} failed {ATTEMPTS} times, at last with: {first_line(error)}. Check the connection, then --resume auto") from error
            log.warning("%s failed (%s); attempt %d of %d follows in %.1f s", what, first_line(error), attempt + 1, ATTEMPTS, wait_s)
            time.sleep(wait_s)
            wait_s *= 2
    raise AssertionError


def list_folder(url: str) -> list[str]:
    """URLs of the files in a folder of a store, by name; InputError where it cannot be listed."""
    system, path = _file_system(url)
    return sorted(system.unstrip_protocol(name) for name in _insist(f"listing {url}", lambda: system.ls(path, detail=False)))


_STAMPS = ("ETag", "etag", "checksum", "md5Hash", "blob_id", "last_modified", "LastModified", "mtime", "updated", "created")


def describe(url: str) -> tuple[str, int, str]:
    """URL, size and what tells versions of its content apart, of a file in a store."""
    system, path = _file_system(url)
    info = _insist(f"looking at {url}", lambda: system.info(path))
    return url, info["size"], " ".join(str(info[name]) for name in _STAMPS if info.get(name) is not None)


def read(url: str, file_size: int, stamp: str, *, size: int, offset: int, cache: Cache) -> bytes:
    """`size` bytes at `offset` of a file, or what there is of them. InputError where the store does not answer."""
    stop = min(offset + size, file_size)
    parts = []
    while offset < stop:
        number, within = divmod(offset, BLOCK)
        length = min(BLOCK, file_size - number * BLOCK)
        wanted = min(length - within, stop - offset)
        name = hashlib.blake2b(f"{url}\0{file_size}\0{stamp}\0{number}".encode(), digest_size=16).hexdigest()
        parts.append(_from_block(url, cache, name, start=number * BLOCK, length=length, within=within, wanted=wanted))
        offset += wanted
    return b"".join(parts)


def _from_block(url: str, cache: Cache, name: str, *, start: int, length: int, within: int, wanted: int) -> bytes:
    """A part of a block, which is fetched unless it is there."""
    try:
        path = cache.made("blocks") / name[:2] / name
        kept = _read_kept(path, length, within, wanted)
        if kept is not None:
            return kept
        with cache.lock(f"block-{name[:2]}"):
            kept = _read_kept(path, length, within, wanted)  # fetched by another process meanwhile
            if kept is not None:
                return kept
            data = _fetch(url, start, length)
            path.parent.mkdir(exist_ok=True)
            write_whole(path, [data])
        _Sweeper.count(cache)
    except OSError as error:
        raise InputError(f"--data-cache {cache.folder} cannot be used ({error.strerror}): make room there, or name another folder") from error
    return data[within : within + wanted]


def _read_kept(path: Path, length: int, within: int, wanted: int) -> bytes | None:
    """A part of a kept block; None where there is none, or not of the right length."""
    with contextlib.suppress(FileNotFoundError), path.open("rb", buffering=0) as file:
        if os.fstat(file.fileno()).st_size == length:
            data = os.pread(file.fileno(), wanted, within)
            return data if len(data) == wanted else None
    return None


def _fetch(url: str, start: int, length: int) -> bytes:
    system, path = _file_system(url)

    def ask() -> bytes:
        data = system.cat_file(path, start=start, end=start + length)
        if len(data) != length:
            raise OSError(f"{len(data)} bytes came, {length} were asked for")
        return data

    return _insist(f"fetching bytes {start}-{start + length} of {url}", ask)


class _Sweeper:
    """Keeps the folder of blocks within its limit: now and then each process that adds to it removes the oldest."""

    _num_added = 0  # of this process

    @classmethod
    def count(cls, cache: Cache) -> None:
        cls._num_added += 1
        if cls._num_added % min(SWEEP_EVERY, max(1, cache.limit_bytes // (8 * BLOCK))) == 0:
            sweep(cache)


def sweep(cache: Cache) -> None:
    """Remove the oldest blocks where all together take more than the limit. One that is being read stays readable."""
    with cache.lock("sweep"):
        blocks = []
        for path in cache.made("blocks").glob("*/*"):
            with contextlib.suppress(FileNotFoundError):
                found = path.stat()
                blocks.append((found.st_mtime_ns, found.st_size, path))
        excess = sum(size for _, size, _ in blocks) - cache.limit_bytes
        if excess <= 0:
            return
        excess += (1 - SWEPT_TO) * cache.limit_bytes
        for _, size, path in sorted(blocks):
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= size
