"""log.txt, args.yaml and TensorBoard's events: whole after any crash."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from run import config, disk, records

RECORD = {"train_loss": 1.5, "test_acc1": 10.0, "epoch": 0}


@pytest.fixture
def cfg():
    return config.parse(["--data-set", "DIGITS"])[0]


def line(epoch: int) -> str:
    return json.dumps({**RECORD, "epoch": epoch}) + "\n"


@pytest.mark.parametrize(
    ("torn", "num_kept"),
    [
        ('{"train_loss": 1.5, "tes', 2),  # half a line
        (line(1).rstrip("\n"), 2),  # a whole one but for its end
        ("\0" * 4096, 2),  # a block that was never written
        (line(2), 2),  # an epoch that is trained again
        ("", 2),
    ],
)
def test_what_a_crash_left_of_a_line_is_set_aside(tmp_path, cfg, torn, num_kept):
    complete = line(0) + (line(1) if torn != line(1).rstrip("\n") else "")
    (tmp_path / "log.txt").write_text(complete + torn)
    run_records = records.Records(cfg, tmp_path, num_kept)
    run_records.write({**RECORD, "epoch": 2})
    assert (tmp_path / "log.txt").read_text() == line(0) + line(1) + line(2)
    is_dropped = bool(torn) and torn != line(1).rstrip("\n")
    assert (tmp_path / "log_dropped.txt").exists() == is_dropped


def test_events_are_tensorboards(tmp_path, cfg):
    """A resumed run's replace those of the epochs that it trains again."""
    for first, last in ((0, 3), (2, 5)):
        run_records = records.Records(cfg, tmp_path, first)
        for epoch in range(first, last):
            run_records.write({"train_loss": epoch + first / 10, "test_loss": float("nan"), "epoch": epoch})
        run_records.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["scalars"] == ["train_loss"]
    assert [(event.step, pytest.approx(event.value)) for event in events.Scalars("train_loss")] == [(0, 0.0), (1, 1.0), (2, 2.2), (3, 3.2), (4, 4.2)]


def test_events_without_room_are_left_out_and_the_log_goes_on(tmp_path, cfg, monkeypatch, caplog):
    run_records = records.Records(cfg, tmp_path, 0)
    real = disk.append_whole

    def refuse_events(path, data):
        if path.name != "log.txt":
            raise OSError(28, "No space left on device")
        real(path, data)

    monkeypatch.setattr(disk, "append_whole", refuse_events)
    run_records.write(RECORD)
    assert (tmp_path / "log.txt").read_text() == line(0)
    assert "TensorBoard goes without epoch 0 (No space left on device); log.txt has its numbers" in caplog.text


def test_step_lines_that_training_repeats_are_set_aside(tmp_path, cfg):
    """Stopped after step 6 of the second epoch: what came later is done again, an evaluation of the first epoch is not."""
    lines = [{"mode": "train", "epoch": epoch, "iter": step} for epoch in (1, 2) for step in (2, 4, 6, 8)]
    lines.insert(4, {"mode": "val", "epoch": 1})
    lines.append({"mode": "val", "epoch": 2})
    (tmp_path / "train_log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"mode": "tr')
    records.Records(cfg, tmp_path, 1, 6).write_line({"mode": "train", "epoch": 2, "iter": 8, "loss": float("inf")})
    kept = [json.loads(line) for line in (tmp_path / "train_log.txt").read_text().splitlines()]
    assert kept == [*lines[:8], {**lines[8], "loss": None}]
    assert len((tmp_path / "train_log_dropped.txt").read_text().splitlines()) == 3
