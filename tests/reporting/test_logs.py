"""Reading logs: cut, resumed, concatenated, empty and foreign ones, and what is said about each."""

import json
import math
from pathlib import Path

import pytest

from reporting import logs
from run.errors import InputError


def record(epoch: int, acc1: float, **more) -> dict:
    return {"train_lr": 1e-3, "train_loss": 2.0, "test_loss": 1.0, "test_acc1": acc1, "test_acc5": 90.0, "epoch": epoch, "n_parameters": 1000, **more}


def lines(*records: dict) -> str:
    return "".join(json.dumps(values) + "\n" for values in records)


@pytest.fixture
def read(tmp_path):
    """Runs (as lists of (epoch, accuracy)) and notes of a text, as a log that was named."""

    def read(text: str | bytes, name: str = "log.txt"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        reading = logs.read_log(path)
        return [run.series("test_acc1") for run in reading.runs], reading.notes

    return read


TEN = [record(epoch, float(epoch)) for epoch in range(10)]
POINTS = [(epoch, float(epoch)) for epoch in range(10)]


def test_whole_log_has_no_notes(read):
    assert read(lines(*TEN)) == ([POINTS], [])


def test_columns_are_known_by_name_not_by_place(read):
    shuffled = [dict(reversed(values.items())) | {"an_extra": [1, {"x": 2}]} for values in TEN]
    assert read(lines(*shuffled)) == ([POINTS], [])


def test_half_written_last_line_is_left_out(read):
    assert read(lines(*TEN) + '{"train_lr": 0.001, "test_ac') == ([POINTS], ["half-written last line left out"])


def test_a_whole_record_after_a_half_one_on_the_same_line_is_kept(read):
    text = lines(*TEN[:5]) + '{"train_lr": 0.001, "tes' + lines(*TEN[5:])
    assert read(text) == ([POINTS], ["1 line left out: not whole JSON objects"])


def test_text_between_records_is_left_out(read):
    text = "Start\n" + lines(*TEN[:5]) + "Traceback\n  boom\n" + lines(*TEN[5:])
    assert read(text) == ([POINTS], ["3 lines left out: not whole JSON objects"])


@pytest.mark.parametrize("text", [json.dumps(TEN, indent=1), "".join(map(json.dumps, TEN)), lines(*TEN).replace("\n", "\r\n"), "\ufeff" + lines(*TEN)])
def test_records_need_not_stand_one_per_line(read, text):
    assert read(text) == ([POINTS], [])


def test_padding_of_a_crashed_file_system_is_nothing(read):
    assert read(lines(*TEN).encode() + bytes(4096)) == ([POINTS], [])


def test_repeated_lines_count_once(read):
    assert read(lines(*TEN, *TEN)) == ([POINTS], ["10 lines left out that repeat another word for word"])
    assert read("".join(lines(values) * 2 for values in TEN)) == ([POINTS], ["10 lines left out that repeat another word for word"])


def test_of_a_resumed_epoch_the_last_counts_and_a_higher_lost_maximum_is_named(read):
    runs, notes = read(lines(*TEN[:7], record(5, 50.0), record(6, 60.0), *TEN[7:]))
    assert runs == [[*POINTS[:5], (5, 50.0), (6, 60.0), *POINTS[7:]]]
    assert notes == ["2 lines left out: epochs 5-6 came again, and the last of each counts"]
    _, notes = read(lines(*TEN[:5], record(5, 99.0), *TEN[5:]))
    assert notes == ["1 line left out: epoch 5 came again, and the last of each counts (theirs was the highest test_acc1, 99.000)"]


def test_a_start_that_a_later_one_overtakes_is_left_out(read):
    runs, notes = read(lines(record(0, 0.5), record(1, 40.0), *TEN))
    assert runs == [POINTS]
    assert notes == ["2 lines left out: an earlier start (epochs 0-1, best test_acc1 40.000) that a later one overtook"]


def test_a_start_that_a_later_one_equals_is_left_out(read):
    runs, notes = read(lines(*(record(epoch, 90.0) for epoch in range(10)), *TEN))
    assert runs == [POINTS]
    assert notes == ["10 lines left out: an earlier start (epochs 0-9, best test_acc1 90.000) that a later one overtook"]


def test_a_finished_run_is_not_lost_to_a_later_short_start(read):
    runs, notes = read(lines(*TEN, record(0, 0.5), record(1, 1.5)))
    assert runs == [POINTS, [(0, 0.5), (1, 1.5)]]
    assert "holds 2 runs" in notes[0]


def test_networks_of_different_size_are_different_runs(read):
    runs, notes = read(lines(*TEN, *(record(epoch, 5.0 + epoch, n_parameters=2000) for epoch in range(3))))
    assert runs == [POINTS, [(0, 5.0), (1, 6.0), (2, 7.0)]]
    assert notes == ["holds runs of 2 networks (1,000, 2,000 parameters): one row each"]


def test_halves_in_the_wrong_order_are_one_run(read):
    runs, notes = read(lines(*TEN[5:], *TEN[:5]))
    assert runs == [POINTS]
    assert notes == ["lines are out of order: the last one is of epoch 4, the highest is 9"]


def test_missing_epochs_are_said(read):
    assert read(lines(*TEN[:3], *TEN[5:8], TEN[9]))[1] == ["epochs 3-4, 8 missing"]


def test_values_that_are_not_finite_count_for_no_maximum(read, tmp_path):
    values = [record(0, 1.0), record(1, 3.0), record(2, math.nan), record(3, math.inf), record(4, 2.0) | {"test_acc1": None}]
    runs, notes = read(lines(*values))
    assert runs == [[(0, 1.0), (1, 3.0)]]
    assert notes == ["test_acc1 is not finite at 3 of 5 epochs, which count for no maximum"]
    run = logs.read_log(tmp_path / "log.txt").runs[0]
    assert run.best("test_acc1") == (1, 3.0)
    assert run.last("test_acc1") is None


def test_missing_accuracy_and_missing_epoch_numbers_are_said(read):
    assert read('{"train_loss": 1.0, "epoch": 0}\n{"train_loss": 0.5, "epoch": 1}\n') == ([[]], ["no test_acc1 at 2 of 2 epochs"])
    assert read('{"test_acc1": 1}\n{"test_acc1": "2.5"}\n') == ([[(0, 1.0), (1, 2.5)]], ["2 lines without an epoch number: counted from the line before"])


@pytest.mark.parametrize(
    ("content", "note"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (bytes(100), "is empty"),
        (b'{"train_lr": 0.1, "te', "holds no epoch"),
        (b"{}\n", "holds no epoch"),
        (b'{"lr": 0.1}\n[1, 2]\n', "holds no epoch"),
        (b'{"a":' * 50_000, "holds no epoch"),
        (bytes(range(256)) * 10, "is no text"),
        (b"epoch,train_loss\n", "holds no epoch"),
    ],
)
def test_files_without_an_epoch_are_named_and_give_no_run(read, content, note):
    runs, notes = read(content)
    assert runs == []
    assert len(notes) == 1 and notes[0].startswith(note)


TIMM = "epoch,train_loss,eval_loss,eval_top1,eval_top5,lr\r\n0,6.9,6.8,0.5,2.0,0.001\r\n1,5.0,4.0,30.25,60.0,0.002\r\n"


def test_timm_summary(read, tmp_path):
    assert read(TIMM, "summary.csv") == ([[(0, 0.5), (1, 30.25)]], [])
    run = logs.read_log(tmp_path / "summary.csv").runs[0]
    assert run.series("train_lr") == [(0, 0.001), (1, 0.002)]
    assert run.series("test_loss") == [(0, 6.8), (1, 4.0)]


def test_timm_summary_resumed_with_ema_and_cut(read, tmp_path):
    more = "epoch,train_loss,eval_loss,eval_top1,eval_top5,eval_ema_top1,lr\n2,4.0,3.0,40.0,70.0,35.0,0.002\n3,3.0,2.0,4"
    runs, notes = read(TIMM + more, "summary.csv")
    assert runs == [[(0, 0.5), (1, 30.25), (2, 40.0)]]
    assert notes == [
        "1 line left out: the header again, from a resumed run",
        "1 line left out: another number of columns than the header's (half-written?)",
    ]
    assert logs.read_log(tmp_path / "summary.csv").runs[0].best("test_ema_acc1") == (2, 35.0)


def test_older_names_of_the_same_columns(read, tmp_path):
    assert read("epoch,eval_prec1\n0,12.5\n", "old.csv")[0] == [[(0, 12.5)]]
    read('{"test_acc1": 1, "test_acc1_ema": 2, "epoch": 0}')
    assert logs.read_log(tmp_path / "log.txt").runs[0].best("test_ema_acc1") == (0, 2.0)


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    for name in ("a/log.txt", "b/log.txt", "b/log_dropped.txt", "distill/m1.txt", "normal/m1.txt", ".venv/log.txt", "timm/summary.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(TIMM if name.endswith("csv") else lines(*TEN))
    (tmp_path / "requirements.txt").write_text("torch\n")
    (tmp_path / "b/args.yaml").write_text("# a comment\nwarmup_epochs: 5\nepochs: 80\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_folders_are_searched_for_logs_and_names_are_the_shortest_that_differ(tree):
    runs, notes = logs.read_logs(["."])
    assert [run.label for run in runs] == ["a", "b", "distill/m1", "normal/m1", "timm"]
    assert notes == []


def test_globs_and_files_and_each_file_once(tree):
    runs, _ = logs.read_logs(["*/m1.txt", "distill", "a/log.txt", str(tree / "a")])
    assert [run.label for run in runs] == ["distill/m1", "normal/m1", "a"]


def test_a_named_file_without_an_epoch_is_explained(tree):
    assert logs.read_logs(["requirements.txt"]) == (
        [],
        ["requirements.txt: holds no epoch: no whole JSON line or CSV row with train_loss, test_loss, test_acc1 or the like"],
    )


@pytest.mark.parametrize("name", ["nowhere.txt", "*.none", "nowhere/"])
def test_a_name_that_leads_nowhere_is_refused(tree, name):
    with pytest.raises(InputError, match="no such file or folder; name a log.txt"):
        logs.read_logs([name])


def test_a_folder_without_logs_is_refused(tree):
    (tree / "void").mkdir()
    with pytest.raises(InputError, match="no log in this folder"):
        logs.read_logs(["void"])


def test_planned_epochs_come_from_the_settings_beside_the_log(tree):
    assert logs.planned_epochs(tree / "b/log.txt") == 80
    assert logs.planned_epochs(tree / "a/log.txt") is None


def test_runs_of_one_file_are_numbered(tree):
    (tree / "two.txt").write_text(lines(*TEN, record(0, 1.0, n_parameters=7)))
    runs, _ = logs.read_logs(["two.txt"])
    assert [(run.label, run.part) for run in runs] == [("two#1", 1), ("two#2", 2)]
