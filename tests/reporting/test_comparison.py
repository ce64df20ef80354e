"""The table against published figures, the comparison against hand-worked numbers, the live summary on a growing log."""

import csv
import io
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time

import pytest

import compare_logs
from reporting import comparison, following
from reporting.logs import Run
from tests.conftest import ROOT, run_command
from tests.reporting.test_logs import lines, record

with (ROOT / "tests/golden/published_runs.csv").open(encoding="utf-8") as file:
    PUBLISHED = list(csv.DictReader(file))


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run the command in a folder of its own; (exit status, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def command(*args: str) -> tuple[int, str, str]:
        status = compare_logs.main(list(args))
        return status, *capsys.readouterr()

    return command


def write_log(path, accuracies: list[float], **more) -> None:
    path.write_text(lines(*(record(epoch, acc1, **more) for epoch, acc1 in enumerate(accuracies))))


@pytest.fixture
def published(tmp_path):
    """For each published run a short log with its true maximum, last value and size."""
    for row in PUBLISHED:
        accuracies = {epoch: 1.0 for epoch in range(280, 300)} | {299: float(row["last_acc1"])} | {int(row["best_epoch"]): float(row["best_acc1"])}
        values = [record(epoch, acc1, n_parameters=int(row["n_parameters"])) for epoch, acc1 in accuracies.items()]
        (tmp_path / f"{row['run']}.txt").write_text(lines(*values))


def test_json_gives_the_maxima_unrounded(published, command):
    status, out, err = command(".", "--format", "json", "--sort", "run")
    rows = json.loads(out)
    assert (status, err) == (0, "")
    assert len(rows) == 39
    for row, fact in zip(rows, sorted(PUBLISHED, key=lambda fact: fact["run"]), strict=True):
        assert row["run"] == fact["run"]
        assert row["path"] == f"{fact['run']}.txt"
        assert (row["best_acc1"], row["best_epoch"]) == (float(fact["best_acc1"]), int(fact["best_epoch"]))
        assert row["last_acc1"] == float(fact["last_acc1"])
        assert (row["epochs"], row["n_parameters"], row["best_ema_acc1"]) == (20, int(fact["n_parameters"]), None)


def test_markdown_is_the_published_table(published, command, tmp_path):
    """Also what `printf "%.1f" $(jq -s "map(.test_acc1) | max")` prints; some runs come out wrong if rounded twice."""
    _, out, _ = command(".", "--format", "markdown", "--sort", "run")
    table = {cells[1].strip(): cells[2].strip() for line in out.splitlines()[2:] if (cells := line.split("|"))}
    assert table == {fact["run"]: fact["published_top1"] for fact in PUBLISHED}
    for name, text in table.items():
        maximum = max(json.loads(line)["test_acc1"] for line in (tmp_path / f"{name}.txt").read_text().splitlines())
        assert text == f"{maximum:.1f}"
    rounded_twice = [f"{round(float(fact['best_acc1']), 2):.1f}" for fact in PUBLISHED]
    assert rounded_twice != [fact["published_top1"] for fact in PUBLISHED]


def test_table_is_aligned_sorted_and_without_empty_columns(command, tmp_path):
    write_log(tmp_path / "low.txt", [10.0, 20.004, 15.0], n_parameters=5_600_000)
    write_log(tmp_path / "higher_one.txt", [10.0, 30.0], n_parameters=900)
    _, out, _ = command("low.txt", "higher_one.txt")
    assert out == (
        "run         best acc1  at epoch  last acc1  epochs  params\n"
        "higher_one      30.00         1      30.00       2     900\n"
        "low             20.00         1      15.00       3   5.60M\n"
    )
    _, out, _ = command("low.txt", "higher_one.txt", "--sort", "epochs", "--digits", "3")
    assert out.splitlines()[1].split() == ["low", "20.004", "1", "15.000", "3", "5.60M"]


def test_ema_speed_and_hours(command, tmp_path):
    values = [
        record(epoch, 50.0 + epoch, test_ema_acc1=60.0 - epoch, images_per_s=speed, epoch_s=3000.0, eval_s=600.0) for epoch, speed in enumerate((1, 800, 900))
    ]
    (tmp_path / "log.txt").write_text(lines(*values))
    _, out, _ = command("log.txt", "--format", "json")
    row = json.loads(out)[0]
    assert (row["run"], row["best_ema_acc1"], row["best_ema_epoch"], row["images_per_s"], row["hours"]) == ("log", 60.0, 0, 800, 3.0)
    _, out, _ = command("log.txt")
    assert out.splitlines()[1].split() == [tmp_path.name, "52.00", "2", "52.00", "60.00", "0", "3", "1000", "800", "3.0"]


def test_csv_is_json_in_columns(command, tmp_path):
    write_log(tmp_path / "a.txt", [1.0, 1 / 3])
    write_log(tmp_path / "b.txt", [2.0])
    _, as_csv, _ = command("a.txt", "b.txt", "--format", "csv", "--against", "a.txt")
    _, as_json, _ = command("a.txt", "b.txt", "--format", "json", "--against", "a.txt")
    expected = [{key: "" if value is None else str(value) for key, value in row.items()} for row in json.loads(as_json)]
    assert list(csv.DictReader(io.StringIO(as_csv))) == expected


def test_json_is_strict_where_a_log_is_not(command, tmp_path):
    write_log(tmp_path / "nan.txt", [1.0, math.nan])
    _, out, err = command("nan.txt", "--format", "json")
    row = json.loads(out, parse_constant=pytest.fail)[0]
    assert (row["best_acc1"], row["last_acc1"]) == (1.0, None)
    assert "nan.txt: test_acc1 is not finite at 1 of 2 epochs" in err


def test_runs_of_a_concatenated_log_are_rows_with_one_stem(command, tmp_path):
    (tmp_path / "two.txt").write_text(lines(record(0, 1.0), record(1, 2.0), record(0, 5.0, n_parameters=7)))
    status, out, err = command("two.txt", "--format", "json")
    assert [(row["run"], row["part"], row["best_acc1"]) for row in json.loads(out)] == [("two", 2, 5.0), ("two", 1, 2.0)]
    assert (status, err) == (0, "two.txt: holds runs of 2 networks (1,000, 7 parameters): one row each\n")


def test_an_empty_log_is_said_and_is_no_row(command, tmp_path):
    (tmp_path / "empty.txt").touch()
    write_log(tmp_path / "a.txt", [1.0])
    status, out, err = command("a.txt", "empty.txt", "--format", "json")
    assert (status, len(json.loads(out)), err) == (0, 1, "empty.txt: is empty: no epoch was written\n")
    status, out, err = command("empty.txt")
    assert (status, out) == (1, "")
    assert err.splitlines()[-1] == "compare_logs.py: nothing to compare: no epoch in empty.txt"


def test_vertical_bars_do_not_break_markdown(command, tmp_path):
    write_log(tmp_path / "a|b.txt", [1.0])
    _, out, _ = command("a|b.txt", "--format", "markdown")
    assert out.splitlines()[2].startswith("| a\\|b | 1.0 |")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "name at least one log"),
        (["nowhere.txt"], "no such file or folder"),
        (["a.txt", "--against", "nowhere.txt"], "no such file or folder"),
        (["a.txt", "--against", "."], "holds 2 runs"),
        (["a.txt", "--smooth", "0"], "--smooth 0"),
        (["a.txt", "--plot", "a.gif"], "--plot a.gif: end the name in .png"),
        (["a.txt", "--plot", "nowhere/a.png"], "there is no folder nowhere"),
        (["a.txt", "--follow", "--plot", "a.png"], "exclude each other"),
        (["--scatter", "t.csv", "x", "y"], "--scatter needs --plot"),
        (["a.txt", "--scatter", "t.csv", "x", "y", "--plot", "a.png"], "give it no logs"),
    ],
)
def test_wrong_use_is_one_message(command, tmp_path, args, message):
    write_log(tmp_path / "a.txt", [1.0])
    write_log(tmp_path / "b.txt", [1.0])
    status, out, err = command(*args)
    assert (status, out) == (1, "")
    assert err.startswith("compare_logs.py: ") and message in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("args", [["a.txt", "--form", "json"], ["a.txt", "--sort", "size"], ["a.txt", "--interval", "0"], ["a.txt", "--interval", "x"]])
def test_unknown_flags_and_values_are_refused(command, args):
    with pytest.raises(SystemExit) as stop:
        command(*args)
    assert stop.value.code == 2


# --- against a reference


def run_of(accuracies: list[float], lrs: list[float] | None = None, **more) -> Run:
    values = [record(epoch, acc1, **more) for epoch, acc1 in enumerate(accuracies)]
    for value, lr in zip(values, lrs or [], strict=False):
        value["train_lr"] = lr
    return Run(ROOT / "x.txt", values, label="x")


def test_ahead_is_measured_at_the_last_common_epoch():
    row = comparison.compare(run_of([10.0, 30.0, 50.0]), run_of([12.0, 25.0, 44.0, 60.0, 70.0]))
    assert (row["common_epoch"], row["common_acc1"], row["reference_acc1"], row["ahead_acc1"]) == (2, 50.0, 44.0, 6.0)
    assert row["ahead_mean_acc1"] == pytest.approx((10 + 30 + 50 - 12 - 25 - 44) / 3)
    assert row["expected_epoch"] == 4


def test_expected_best_shrinks_the_error_as_the_reference_did():
    """The reference's error fell from 50 to 30 percent, so 40 become 24; a best already reached is the least to expect."""
    assert comparison.expected_best(60.0, 50.0, 70.0) == pytest.approx(76.0)
    assert comparison.expected_best(60.0, 100.0, 100.0) == 60.0
    row = comparison.compare(run_of([0.0] * 9 + [60.0] * 5), run_of([0.0] * 9 + [50.0] * 5 + [70.0, 65.0]))
    assert row["expected_best_acc1"] == pytest.approx(76.0)
    row = comparison.compare(run_of([90.0] + [60.0] * 6), run_of([50.0] * 7 + [70.0]))
    assert row["expected_best_acc1"] == 90.0


def test_a_finished_run_has_nothing_left_to_expect():
    row = comparison.compare(run_of([1.0, 2.0]), run_of([1.0, 2.0]))
    assert (row["expected_best_acc1"], row["expected_epoch"], row["hours_left"]) == (None, None, None)


def test_hours_left_count_training_and_evaluation():
    run = run_of([1.0, 2.0], epoch_s=3000.0, eval_s=600.0)
    assert comparison.compare(run, run_of([1.0] * 12))["hours_left"] == pytest.approx(10.0)
    assert comparison.compare(run_of([1.0]), run_of([1.0] * 12))["hours_left"] is None


@pytest.mark.parametrize(
    ("lrs", "factor", "low", "high", "words"),
    [
        ([0.001, 0.004, 0.002], 1, 1, 1, "the same"),
        ([0.002, 0.008, 0.004], 2, 2, 2, "x 2 at every epoch"),
        ([0.0005, 0.002, 0.001], 0.5, 0.5, 0.5, "x 0.5 at every epoch"),
        ([0.001, 0.008, 0.003], 2, 1, 2, "x 2 at the peak (x 1 to 2, differing from epoch 1)"),
    ],
)
def test_learning_rates_are_compared(lrs, factor, low, high, words):
    row = comparison.compare_lr(run_of([1.0] * 3, lrs), run_of([1.0] * 4, [0.001, 0.004, 0.002, 0.0]))
    assert [row[key] for key in ("lr_factor", "lr_factor_min", "lr_factor_max")] == pytest.approx([factor, low, high])
    assert row["lr_relation"] == words


def test_without_common_epochs_or_learning_rates_nothing_is_claimed():
    late = Run(ROOT / "x.txt", [{"epoch": 7, "test_acc1": 1.0}])
    assert set(comparison.compare(late, run_of([1.0])).values()) == {None}


def test_against_prints_a_second_table_and_how_it_was_worked_out(command, tmp_path):
    write_log(tmp_path / "new.txt", [10.0, 60.0])
    write_log(tmp_path / "reference.txt", [10.0, 50.0, 70.0])
    _, out, _ = command("new.txt", "--against", "reference.txt")
    assert "Against reference.txt:" in out
    assert out.splitlines()[6].split() == ["new", "1", "60.00", "50.00", "+10.00", "+5.00", "the", "same", "72.14", "2"]
    assert "Expected best: the error shrinks" in out


@pytest.mark.parametrize(("column", "median", "ninth_tenth"), [("mean_acc1_100", 0.5, 1.4), ("mean_acc1_200", 0.5, 1.2)])
def test_expectation_misses_by_what_it_says(column, median, ninth_tenth):
    """Every published run against every other that was trained likewise, cut after 100 and 200 of 300 epochs."""
    misses, misses_by_gain = [], []
    for run in PUBLISHED:
        for other in PUBLISHED:
            if run is not other and ("without" in run["run"]) == ("without" in other["run"]):
                here, there, end, best = float(run[column]), float(other[column]), float(other["best_acc1"]), float(run["best_acc1"])
                misses.append(abs(comparison.expected_best(here, there, end) - best))
                misses_by_gain.append(abs(here + end - there - best))
    assert round(statistics.median(misses), 1) == median
    assert round(statistics.quantiles(misses, n=10)[-1], 1) == ninth_tenth
    assert statistics.median(misses_by_gain) > 1.3 * statistics.median(misses)
    assert f"{median} points (median; nine in ten below 1.4)" in comparison.EXPECTATION
    assert "by 0.5 (1.2) after 200" in comparison.EXPECTATION


# --- as a user runs it


def test_command_runs_from_the_root_and_loads_no_heavy_package(tmp_path):
    write_log(tmp_path / "a.txt", [1.0, 2.5])
    done = run_command("compare_logs.py", str(tmp_path), "--format", "json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)[0]["best_acc1"] == 2.5
    done = run_command("-c", "import sys, compare_logs; print(sorted({'torch', 'numpy', 'matplotlib', 'plotly', 'yaml'} & set(sys.modules)))")
    assert done.stdout == "[]\n"


def test_plot_and_scatter_are_written(command, tmp_path):
    write_log(tmp_path / "a.txt", [1.0, 2.5])
    status, out, err = command("a.txt", "--plot", "curves.svg")
    assert (status, err) == (0, "wrote curves.svg\n") and "a " in out
    (tmp_path / "models.csv").write_text("model,ms,top1\nm0,1,70\nm1,2,75\n")
    assert command("--scatter", "models.csv", "ms", "top1", "--plot", "s.svg") == (0, "", "wrote s.svg\n")
    assert (tmp_path / "curves.svg").stat().st_size > 1000 < (tmp_path / "s.svg").stat().st_size


def test_a_closed_pipe_is_no_error(tmp_path):
    for index in range(40):
        write_log(tmp_path / f"{index}.txt", [1.0])
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "compare_logs.py", str(tmp_path)], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


# --- following


def test_sparkline():
    assert following.sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert following.sparkline([5.0]) == "▁"
    assert following.sparkline([]) == ""
    assert len(following.sparkline(list(range(1000)))) == 40


def read_line(process) -> str:
    """The process's next line; the test's own time limit ends a wait in vain."""
    return process.stdout.readline()


def test_follow_without_a_terminal_prints_each_epoch_once_and_ends_on_ctrl_c(tmp_path):
    log = tmp_path / "job" / "log.txt"
    log.parent.mkdir()
    args = [sys.executable, "compare_logs.py", "--follow", str(log.parent), "--interval", "0.05"]
    # background jobs of a script start with SIGINT ignored, and so would this one
    obey = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    process = subprocess.Popen(args, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=obey)
    try:
        assert read_line(process) == f"waiting for the first epoch in {log.parent}\n"
        log.write_text(lines(record(0, 1.0), record(1, 2.0)) + '{"train_lr": 0.1')
        assert read_line(process).startswith("job  epoch 0  acc1 1.00  train loss 2.0000")
        assert "best 2.00 at 1" in read_line(process)
        log.write_text(lines(record(0, 1.0), record(1, 2.0), record(2, 1.5)))
        assert "epoch 2  acc1 1.50" in read_line(process)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20) == ("", "stopped following; the job goes on\n")
        assert process.returncode == 0
    finally:
        process.kill()


def test_follow_ends_with_the_last_planned_epoch(command, tmp_path):
    write_log(tmp_path / "log.txt", [1.0, 2.0], epoch_s=3600.0)
    write_log(tmp_path / "reference.txt", [1.0, 1.0])
    (tmp_path / "args.yaml").write_text("epochs: 2\n")
    status, out, err = command("log.txt", "--follow", "--against", "reference.txt")
    assert (status, err) == (0, "")
    assert (
        out == f"{tmp_path.name}  epoch 1/1  finished  acc1 2.00  train loss 2.0000  test loss 1.0000  lr 1.00e-03  best 2.00 at 1  +1.00 against reference\n"
    )


def test_follow_on_a_terminal_redraws_over_what_it_drew(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    log = tmp_path / "log.txt"
    follower = following.Follower([str(log)], reference=None, is_terminal=True)
    assert follower.step() is False
    assert capsys.readouterr().out == f"waiting for the first epoch in {log}"[:80] + "\n"
    write_log(log, [1.0, 2.0], epoch_s=3600.0)
    (tmp_path / "args.yaml").write_text("epochs: 4\n")
    assert follower.step() is False
    first = capsys.readouterr().out
    assert first.startswith(f"\x1b[1F\x1b[J{tmp_path.name}  epoch 1/3  2.0 h left, until ")
    assert first.splitlines()[2] == "  acc1 ▁█  train loss ▁▁"
    follower.step()
    again = capsys.readouterr().out
    assert again.startswith("\x1b[3F\x1b[J") and max(len(line) for line in again.splitlines()[1:]) <= 80


def test_of_a_folder_the_log_written_last_is_followed(tmp_path):
    for index, name in enumerate(("old", "new", "other")):
        (tmp_path / name).mkdir()
        write_log(tmp_path / name / "log.txt", [1.0])
        os.utime(tmp_path / name / "log.txt", (1000, 1000 + (index if name != "other" else -1)))
    assert following.newest_log(str(tmp_path)) == tmp_path / "new" / "log.txt"
    assert following.newest_log(str(tmp_path / "nowhere")) is None
