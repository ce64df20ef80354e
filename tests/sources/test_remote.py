"""Stores: the run from a URL, blocks shared and bounded, and what a store that fails makes of a run."""

import multiprocessing

import fsspec
import pytest
import torch

import datasets
import main
import utils
from loading.images import read_sample
from run.errors import DamagedImage, InputError
from sources import remote
from sources.cache import Cache
from tests.conftest import read_log
from tests.sources.test_runs import RUN, settings
from tests.test_main import steady

STORE = fsspec.filesystem("memory")


@pytest.fixture
def put(layouts):
    """A layout in a store; its URL."""

    def put(kind: str) -> str:
        STORE.put(str(layouts(kind)), f"/{kind}", recursive=True)
        return f"memory://{kind}"

    yield put
    STORE.store.clear()
    STORE.pseudo_dirs[:] = [""]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.0)


class Failing:
    """A store's `cat_file` that fails as often as told, or gives too little, and then answers; `asked` are the blocks asked for."""

    def __init__(self, monkeypatch, failures: list):
        self.failures, self.asked, self.real = failures, [], type(STORE).cat_file
        monkeypatch.setattr(type(STORE), "cat_file", lambda system, path, **where: self(system, path, **where))

    def __call__(self, system, path, *, start, end) -> bytes:
        self.asked.append((path, start))
        failure = self.failures.pop(0) if self.failures else None
        if isinstance(failure, Exception):
            raise failure
        return self.real(system, path, start=start, end=end)[:failure]


def same_bytes(url: str, folder, *flags: str) -> None:
    ours, theirs = datasets.open_images(settings(url, *flags)), datasets.open_images(settings(folder))
    for images, expected in zip(ours, theirs, strict=True):
        assert images.classes == expected.classes and images.targets.tolist() == expected.targets.tolist()
        assert list(map(read_sample, images.samples)) == list(map(read_sample, expected.samples))


@pytest.mark.parametrize("kind", ["packed", "shards", "parquet", "zip"])
def test_a_store_gives_the_images_of_the_folder(kind, put, layouts, tmp_path, monkeypatch):
    flags = [f"--data-cache={tmp_path}", *([f"--class-map={layouts('shards') / 'classes.txt'}"] if kind == "shards" else [])]
    monkeypatch.setattr(remote, "BLOCK", 5000)  # smaller than the files: images lie across blocks
    same_bytes(put(kind), layouts("folder"), *flags)
    store = Failing(monkeypatch, [])
    same_bytes(f"memory://{kind}", layouts("folder"), *flags)
    assert store.asked == []  # all is kept by now


def test_a_store_that_fails_twice_and_then_answers_costs_two_words(put, layouts, tmp_path, monkeypatch, quick, capsys):
    run = [*RUN, "--epochs=1", f"--data-cache={tmp_path / 'cache'}"]
    main.main([*run, f"--data-path={layouts('folder')}", f"--output_dir={tmp_path / 'folder'}"])
    store = Failing(monkeypatch, [OSError("reset by peer"), 7, TimeoutError("slow"), None])
    capsys.readouterr()
    main.main([*run, f"--data-path={put('packed')}", f"--output_dir={tmp_path / 'store'}"])
    assert not store.failures
    out = capsys.readouterr().out
    assert [out.count(text) for text in ("failed (reset by peer); attempt 2 of 6", "failed (7 bytes came", "failed (slow); attempt 4 of 6")] == [1, 1, 1]
    assert list(map(steady, read_log(tmp_path / "store"))) == list(map(steady, read_log(tmp_path / "folder")))


@pytest.mark.parametrize("kind", ["packed", "parquet"])
def test_a_store_that_fails_for_good_stops_the_run_and_shows_nothing_else(kind, put, tmp_path, monkeypatch, quick):
    cfg = settings(put(kind), f"--data-cache={tmp_path}", "--input-size=32", "--batch-size=16", "--mix-group-size=16", "--num_workers=0")
    loader = datasets.build_train_loader(cfg, datasets.open_images(cfg)[0], utils.Rank(0, 1, 0, 1, torch.device("cpu")))
    for path in (tmp_path / "blocks").glob("*/*"):
        path.unlink()
    Failing(monkeypatch, [OSError("gone")] * 1000)
    with pytest.raises(InputError, match=r"fetching bytes 0-\d+ of memory://.*train.* failed 6 times, at last with: gone") as caught:
        next(loader.batches(0))
    assert not isinstance(caught.value, DamagedImage)  # for which another would stand in


def test_a_file_that_is_not_there_is_not_asked_for_again(tmp_path, quick):
    with pytest.raises(InputError, match="listing memory://nowhere: .*check the URL"):
        datasets.open_images(settings("memory://nowhere", f"--data-cache={tmp_path}"))


def test_a_changed_file_is_another(put, layouts, tmp_path):
    url = put("packed")
    flags = [f"--data-cache={tmp_path}"]
    before, _ = datasets.open_images(settings(url, *flags))
    STORE.pipe("/packed/train.pack", STORE.cat("/packed/val.pack"))
    after, _ = datasets.open_images(settings(url, *flags))
    _, expected = datasets.open_images(settings(layouts("folder")))
    assert (len(before), len(after)) == (96, 40) and read_sample(after.samples[0]) == read_sample(expected.samples[0])


def fetch(cache: Cache, url: str, size: int, asked, out) -> None:
    """Read all blocks of a file; tell how many were fetched."""
    real = type(STORE).cat_file

    def cat_file(system, path, **where):
        asked.value += 1
        return real(system, path, **where)

    type(STORE).cat_file = cat_file
    out.put(remote.read(url, size, "1", size=size, offset=0, cache=cache))


def test_two_processes_fetch_a_block_once_and_both_get_it_whole(put, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "BLOCK", 1000)
    data = bytes(range(256)) * 200
    STORE.pipe("/shared", data)
    context, cache = multiprocessing.get_context("fork"), Cache(tmp_path, 1 << 30)
    asked, out = context.Value("i"), context.Queue()
    readers = [context.Process(target=fetch, args=(cache, "memory://shared", 51200, asked, out)) for _ in range(2)]
    for reader in readers:
        reader.start()
    assert [out.get(timeout=60) for _ in readers] == [data, data]
    for reader in readers:
        reader.join()
    assert asked.value == 52


def test_the_cache_keeps_within_its_size_and_what_it_dropped_is_fetched_again(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "BLOCK", 1000)
    STORE.pipe("/large", bytes(100_000))
    cache = Cache(tmp_path, 20_000)
    for offset in range(0, 100_000, 1000):
        assert len(remote.read("memory://large", 100_000, "1", size=1000, offset=offset, cache=cache)) == 1000
        kept = sum(path.stat().st_size for path in (tmp_path / "blocks").glob("*/*"))
        assert kept <= 20_000 + 2000
    assert kept > 10_000
    store = Failing(monkeypatch, [])
    assert remote.read("memory://large", 100_000, "1", size=10, offset=5, cache=cache) == bytes(10) and store.asked == [("/large", 0)]


def test_a_torn_block_is_fetched_again(tmp_path):
    STORE.pipe("/torn", b"0123456789")
    cache = Cache(tmp_path, 1 << 20)
    assert remote.read("memory://torn", 10, "1", size=4, offset=2, cache=cache) == b"2345"
    (block,) = (tmp_path / "blocks").glob("*/*")
    block.write_bytes(b"012")
    assert remote.read("memory://torn", 10, "1", size=40, offset=8, cache=cache) == b"89" and block.read_bytes() == b"0123456789"


def test_missing_drivers_are_named(tmp_path):
    with pytest.raises(InputError, match="nostore://bucket: .*install the store's driver"):
        datasets.open_images(settings("nostore://bucket", f"--data-cache={tmp_path}"))
