"""Trackers: what they are told, that they stay one run over resumes, and that nothing of theirs ends ours."""

import json
import os
import sqlite3
import sys
import types

import pytest

import main
from run import checkpoint, config, records, trackers
from run.errors import InputError
from tests.conftest import read_log

RECORD = {"train_loss": 1.5, "test_acc1": 10.0}


class StandIn(types.ModuleType):
    """Has the calls of both packages, and notes them. `fails`: the name of the call that raises."""

    def __init__(self, name: str, fails: str = ""):
        super().__init__(name)
        self.calls, self.fails = [], fails

    def _note(self, name: str, *what) -> None:
        self.calls.append((name, *what))
        if name == self.fails:
            raise ConnectionError("the network\nis gone")

    def init(self, **how):
        self._note("init", how)
        return self

    def log(self, metrics: dict, step: int | None = None) -> None:
        self._note("log", metrics, step)

    def finish(self) -> None:
        self._note("finish")


def settings(*flags: str) -> config.Config:
    return config.parse(["--data-set=DIGITS", *flags])[0]


@pytest.fixture
def stand_in(monkeypatch):
    """Put a stand-in in a package's place."""
    monkeypatch.delenv("WANDB_MODE", raising=False)

    def put(name: str, **how) -> StandIn:
        module = StandIn(name, **how)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return put


def run(cfg: config.Config, folder, first: int, last: int) -> None:
    run_records = records.Records(cfg, folder, first)
    for epoch in range(first, last):
        run_records.write({**RECORD, "test_loss": float("nan"), "epoch": epoch})
    run_records.close()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_resumed_run_is_one_run_at_the_tracker(stand_in, tmp_path, name):
    module = stand_in(name)
    flags = (f"--tracker={name}", "--lr=0.25")
    for first, last in ((0, 1), (1, 3)):
        run(settings(*flags), tmp_path, first, last)
    kinds = [call[0] for call in module.calls]
    assert kinds == ["init", "log", "finish", "init", "log", "log", "finish"]
    told = [call[1:] for call in module.calls if call[0] == "log"]
    assert told == [({**RECORD, "epoch": epoch}, epoch) for epoch in range(3)]  # without what is no number
    first, again = (call[1] for call in module.calls if call[0] == "init")
    assert first == again and first["project"] == "understudy" and first["resume"] == "allow" and first["config"]["lr"] == 0.25
    known = json.loads((tmp_path / "tracker.json").read_text())[name]
    assert first.get("id", first["name"]).endswith(known) and len(known) == 8
    run(settings(*flags, "--overwrite"), tmp_path, 0, 1)
    anew = module.calls[-3][1]
    assert anew.get("id", anew["name"]) != first.get("id", first["name"])


def test_weights_and_biases_stays_offline_unless_told(stand_in, tmp_path, monkeypatch):
    module = stand_in("wandb")
    run(settings("--project=mine"), tmp_path, 0, 0)
    monkeypatch.setenv("WANDB_MODE", "online")
    run(settings("--project=mine"), tmp_path, 0, 0)
    found = [call[1] for call in module.calls if call[0] == "init"]
    assert [(how["mode"], how["project"], how["dir"]) for how in found] == [("offline", "mine", str(tmp_path)), ("online", "mine", str(tmp_path))]


@pytest.mark.parametrize(("call", "num_calls"), [("init", 1), ("log", 2), ("finish", 5)])
def test_a_tracker_that_fails_is_warned_of_once_and_ends_nothing(stand_in, tmp_path, caplog, call, num_calls):
    module = stand_in("trackio", fails=call)
    run(settings("--tracker=trackio"), tmp_path, 0, 3)
    assert [line["epoch"] for line in read_log(tmp_path)] == [0, 1, 2]
    warned = [entry.message for entry in caplog.records if "tracker" in entry.message]
    assert warned == ["--tracker trackio has failed (the network is gone): the run goes on without it; log.txt has its numbers"]
    assert len(module.calls) == num_calls


def test_nothing_is_imported_unless_it_is_asked_for(tmp_path, monkeypatch):
    for name in trackers.OPENERS:
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    for flags in ((), ("--tracker=none", "--project=p")):
        run(settings(*flags), tmp_path, 0, 1)
        assert not (tmp_path / "tracker.json").exists()
    for flags, name in ((("--tracker=trackio",), "trackio"), (("--project=p",), "wandb")):
        with pytest.raises(InputError, match=f"--tracker {name} needs its package: pip install {name}"):
            records.Records(settings(*flags), tmp_path, 0)
    folder = tmp_path / "untouched"
    with pytest.raises(InputError, match="--tracker wandb needs its package"):
        main.main(["--tracker=wandb", "--data-set=DIGITS", "--device=cpu", "--distillation-type=none", f"--output_dir={folder}"])
    assert not folder.exists()


def test_a_run_may_go_on_with_another_tracker():
    saved = {"args": vars(settings("--tracker=wandb", "--project=a"))}
    assert checkpoint.recipe_changes(saved, settings("--tracker=trackio"), {}) == []


def test_half_a_file_of_ids_is_a_new_run(stand_in, tmp_path):
    stand_in("wandb")
    (tmp_path / "tracker.json").write_text('{"wandb": "12')
    run(settings("--tracker=wandb"), tmp_path, 0, 1)
    assert len(json.loads((tmp_path / "tracker.json").read_text())["wandb"]) == 8


@pytest.mark.filterwarnings("ignore")  # the package's own
def test_the_real_weights_and_biases_takes_it(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for first, last in ((0, 1), (1, 3)):
        run(settings("--tracker=wandb"), tmp_path, first, last)
    known = json.loads((tmp_path / "tracker.json").read_text())["wandb"]
    files = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert {file.name for file in files} == {f"run-{known}.wandb"} and all(b"test_acc1" in file.read_bytes() for file in files)


@pytest.mark.filterwarnings("ignore")
def test_the_real_trackio_takes_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    for first, last in ((0, 1), (1, 3)):
        run(settings("--tracker=trackio"), tmp_path, first, last)
    (path,) = (path for path in (tmp_path / "trackio").rglob("*.db") if os.path.getsize(path))
    with sqlite3.connect(path) as database:
        found = database.execute("select run_name, step, metrics from metrics order by step").fetchall()
    database.close()
    known = json.loads((tmp_path / "tracker.json").read_text())["trackio"]
    assert [(name, step) for name, step, _ in found] == [(f"{tmp_path.name}-{known}", epoch) for epoch in range(3)]
    assert all(json.loads(metrics)["test_acc1"] == 10.0 for *_, metrics in found)
