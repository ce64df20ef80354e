"""The run's folder: one writer at a time, and the newest sound checkpoint whatever happened to the others."""

import errno
import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import main
import utils
from run import checkpoint, config, folder
from run.errors import InputError
from tests.conftest import ROOT, TINY_RUN, read_log
from tests.test_main import states_equal, steady

LAST = "checkpoint_last.pth"
CPU = utils.Rank(0, 1, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def flags(digits_folder) -> list[str]:
    return [*TINY_RUN, f"--data-path={digits_folder}", "--epochs=3"]


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory) -> Path:
    """A run of three epochs that was never stopped."""
    path = tmp_path_factory.mktemp("folder") / "finished"
    torch.set_num_threads(1)
    main.main([*flags, f"--output_dir={path}"])
    return path


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """The run's files, each of its own: of the links in the original one would damage all."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def cut(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(1, path.stat().st_size))


def become_a_folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()
    (path / "something").touch()


DAMAGES = {
    "truncated": cut,
    "flipped": flip,
    "empty": lambda path, rng: os.truncate(path, 0),
    "zeros": lambda path, rng: path.write_bytes(bytes(path.stat().st_size)),
    "last block zeros": lambda path, rng: path.write_bytes(path.read_bytes()[:-4096] + bytes(4096)),
    "folder": become_a_folder,
    "removed": lambda path, rng: path.unlink(),
}


def find(path: Path, *flags: str) -> str | None:
    cfg, _ = config.parse(["--data-set=DIGITS", f"--output_dir={path}", "--resume=auto", *flags])
    return folder.find_checkpoint(cfg, path, CPU)


@pytest.mark.parametrize("damage", ["truncated", "zeros", "folder", "removed"])
def test_a_run_whose_last_checkpoint_is_damaged_goes_on_to_the_same_end(finished, copy, flags, damage, capsys):
    """Epoch 2 is trained again from checkpoint_1; its damaged checkpoint and its line in the log are set aside."""
    (copy / "checkpoint_2.pth").unlink()
    DAMAGES[damage](copy / LAST, random.Random(0))
    assert main.main([*flags, f"--output_dir={copy}", "--resume=auto"]) == 0
    out = capsys.readouterr().out
    assert (f"passed over: {copy / LAST}" in out) == (damage != "removed") and f"continuing {copy / 'checkpoint_1.pth'} with epoch 2, step 0" in out
    assert [steady(record) for record in read_log(copy)] == [steady(record) for record in read_log(finished)]
    assert len((copy / "log_dropped.txt").read_text().splitlines()) == 1
    for name in (LAST, "checkpoint_2.pth", "checkpoint_best.pth", "checkpoint_best_ema.pth"):
        ours, theirs = (checkpoint.read(str(path / name)) for path in (copy, finished))
        for key in ("model", "model_ema", "optimizer", "best_acc1", "best_ema_acc1", "epoch"):
            assert states_equal(ours[key], theirs[key]), (name, key)
    assert (copy / "checkpoint_last.dropped1.pth" / "something").exists() == (damage == "folder")


@pytest.mark.parametrize(("damage", "times"), [("truncated", 20), ("flipped", 20), ("empty", 1), ("zeros", 1), ("last block zeros", 1), ("folder", 1)])
def test_any_damage_is_passed_over_by_resume_and_refused_by_evaluation(copy, flags, damage, times, capsys):
    rng = random.Random(damage)
    sound = (copy / LAST).read_bytes()
    for _ in range(times):
        (copy / LAST).write_bytes(sound)
        DAMAGES[damage](copy / LAST, rng)
        assert find(copy) == str(copy / "checkpoint_2.pth")
        with pytest.raises(InputError, match=f"{LAST}( is (damaged|no complete checkpoint|refused)|: there is no such file, it is a folder)") as error:
            main.main([*flags, "--eval", f"--resume={copy / LAST}"])
        assert "\n" not in str(error.value) and "weights_only" not in str(error.value)
    assert "Accuracy" not in capsys.readouterr().out


@pytest.mark.parametrize("use", ["--finetune", "--teacher-path"])
def test_flipped_bits_are_noticed_by_every_reader(copy, flags, use, tmp_path):
    flip(copy / LAST, random.Random(7))
    teacher = ["--distillation-type=hard", "--teacher-model=resnet18"] if use == "--teacher-path" else []
    with pytest.raises(InputError, match=f"{LAST} is damaged"):
        main.main([*flags, *teacher, f"{use}={copy / LAST}", f"--output_dir={tmp_path / 'new'}"])


def test_exports_and_predictions_notice_flipped_bits(copy, digits_folder):
    import export_onnx
    import predict
    import publish

    flip(copy / LAST, random.Random(8))
    picture = next((digits_folder / "val" / "0").iterdir())
    for command, argv in (
        (predict, [str(picture), f"--resume={copy / LAST}"]),
        (export_onnx, ["--model=resnet18", f"--ckpt={copy / LAST}"]),
        (publish, ["--model_name=resnet18", f"--checkpoint_path={copy / LAST}", "--epochs=3"]),
    ):
        with pytest.raises(InputError, match=f"{LAST} is damaged"):
            command.run(argv)


def test_the_furthest_sound_checkpoint_is_taken(copy, capsys):
    """Also where the last one is an older one; a newer one that is damaged is named."""
    assert find(copy) == str(copy / LAST)
    shutil.copy(copy / "checkpoint_0.pth", copy / LAST)
    assert find(copy) == str(copy / "checkpoint_2.pth")
    flip(copy / "checkpoint_2.pth", random.Random(2))
    assert find(copy) == str(copy / "checkpoint_1.pth")
    (copy / LAST).unlink()
    flip(copy / "checkpoint_1.pth", random.Random(1))
    assert find(copy) == str(copy / "checkpoint_0.pth")
    assert find(copy, "--eval") == str(copy / "checkpoint_0.pth")


def test_weights_alone_are_passed_over(copy):
    torch.save({"model": {}}, copy / "checkpoint_7.pth")
    assert find(copy) == str(copy / LAST)


@pytest.mark.parametrize("kept", [[], ["log.txt"], ["checkpoint_best.pth"], [LAST], ["checkpoint_1.pth", "log.txt"]])
def test_a_run_without_a_sound_checkpoint_is_never_started_afresh(copy, flags, kept):
    for path in list(copy.iterdir()):
        if path.name not in kept:
            path.unlink()
        elif path.suffix == ".pth" and path.name != "checkpoint_best.pth":
            cut(path, random.Random(3))
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    if not kept:
        assert find(copy) is None
        return
    with pytest.raises(InputError, match=r"holds no sound checkpoint .*--overwrite"):
        main.main([*flags, f"--output_dir={copy}", "--resume=auto"])
    with pytest.raises(InputError, match="already holds a run"):
        main.main([*flags, f"--output_dir={copy}"])
    assert {path.name: path.read_bytes() for path in copy.iterdir() if path.name != ".lock"} == before


def test_every_checkpoint_of_a_run_carries_a_checksum(finished):
    names = {path.name for path in finished.glob("*.pth")}
    assert names == {LAST, "checkpoint_best.pth", "checkpoint_best_ema.pth", *(f"checkpoint_{i}.pth" for i in range(3))}
    for name in names:
        with (finished / name).open("rb") as file:
            assert checkpoint.integrity.is_sealed(file) and checkpoint.integrity.is_intact(file)


def test_a_log_is_never_without_a_checkpoint(finished, flags, tmp_path, monkeypatch):
    """Killed after the log's first line, before the checkpoint of that epoch: the run goes on from its start."""
    real = checkpoint.save

    def die(saved: dict, *args) -> None:
        if saved["epoch"] == 0:
            raise KeyboardInterrupt
        real(saved, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "save", die)
        main.main([*flags, f"--output_dir={tmp_path}"])
    assert len(read_log(tmp_path)) == 1 and checkpoint.position(find(tmp_path)) == (0, 0)
    assert main.main([*flags, f"--output_dir={tmp_path}", "--resume=auto"]) == 0
    assert [steady(record) for record in read_log(tmp_path)] == [steady(record) for record in read_log(finished)]


# ---- what a resumed run leaves alone


def test_resuming_an_earlier_checkpoint_sets_later_ones_aside(copy, flags):
    """So that a next `--resume auto` does not take them for this run's: here another recipe's, stopped before its first epoch ended."""
    argv = [*flags, "--lr=1e-2", "--allow-config-change", f"--output_dir={copy}"]
    stop = type("Stop", (), {"is_made": True})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "StopRequest", stop)
        assert main.main([*argv, f"--resume={copy / 'checkpoint_0.pth'}"]) == 85
    assert find(copy) == str(copy / LAST) and checkpoint.position(find(copy)) == (1, 1)
    assert sorted(path.name for path in copy.glob("checkpoint_[0-9]*")) == ["checkpoint_0.pth", "checkpoint_1.dropped1.pth", "checkpoint_2.dropped1.pth"]


def test_the_best_checkpoint_is_replaced_by_better_ones_alone(copy, flags, capsys):
    """The run goes on from before its best epoch, to worse ones: a best that is sound stays, one that is damaged is replaced."""
    worse = [*flags, "--lr=0", "--allow-config-change", f"--output_dir={copy}", "--resume=auto"]
    best, best_ema = copy / "checkpoint_best.pth", copy / "checkpoint_best_ema.pth"
    saved = checkpoint.read(str(best))
    torch.save({**saved, "metrics": {**saved["metrics"], "test_acc1": 99.0}}, best)
    kept = best.read_bytes()
    flip(best_ema, random.Random(4))
    for name in (LAST, "checkpoint_2.pth", "checkpoint_1.pth"):
        (copy / name).unlink()
    assert main.main(worse) == 0
    assert best.read_bytes() == kept
    assert f"{best_ema} is replaced after the next epoch: {best_ema} is damaged" in capsys.readouterr().out
    assert checkpoint.read(str(best_ema))["epoch"] in (1, 2)
    assert [record["best_acc1"] for record in read_log(copy)] == [max(r["test_acc1"] for r in read_log(copy)[: i + 1]) for i in range(3)]


# ---- one writer


HOLD = "import contextlib, os, sys, time\nfrom pathlib import Path\nfrom run import folder\nwith folder.locked(Path(sys.argv[1])):\n"
HOLD += "    if os.fork() == 0:\n        time.sleep(60)\n        os._exit(0)\n    print('held', flush=True)\n    time.sleep(60)\n"


def test_a_second_writer_stops_at_once_and_a_dead_one_holds_nobody_back(copy, flags):
    """The holder is killed while a process that it forked, as loader processes are, lives on."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(copy)], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert holder.stdout.readline() == "held\n"
        before = (copy / "log.txt").read_bytes()
        for more in (["--resume=auto"], ["--overwrite"], []):
            with pytest.raises(InputError, match=rf"in use by another run \(host {os.uname().nodename}, process {holder.pid}, since 20\d\d-.*choose another"):
                main.main([*flags, *more, f"--output_dir={copy}"])
        assert (copy / "log.txt").read_bytes() == before
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        assert main.main([*flags, "--resume=auto", f"--output_dir={copy}"]) == 0
    finally:
        os.killpg(holder.pid, signal.SIGKILL)  # the forked process
        holder.stdout.close()
        holder.wait()


def test_the_lock_is_given_back_when_the_run_ends(copy, flags):
    """However it ends: here in a changed recipe's refusal."""
    with pytest.raises(InputError, match="recipe changed"):
        main.main([*flags, "--lr=1", "--resume=auto", f"--output_dir={copy}"])
    with folder.locked(copy):
        with pytest.raises(InputError, match="in use"), folder.locked(copy):
            pass
        assert f"process {os.getpid()}" in (copy / ".lock").read_text()
    assert (copy / ".lock").read_text() == ""


def test_only_the_first_process_locks_and_evaluation_does_not(copy, flags):
    other = utils.Rank(1, 2, 1, 2, torch.device("cpu"))
    cfg, _ = config.parse([*flags, "--resume=auto", f"--output_dir={copy}"])
    with folder.locked(copy), folder.contextlib.ExitStack() as held:
        assert folder.claim_folder(cfg, other, held) == copy
        assert main.main([*flags, "--eval", "--resume=auto", f"--output_dir={copy}"]) == 0
        with pytest.raises(InputError, match="in use"):
            folder.claim_folder(cfg, CPU, held)


def test_a_file_system_without_locks_is_warned_of(copy, flags, monkeypatch, capsys):
    def refuse(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert main.main([*flags, "--resume=auto", f"--output_dir={copy}"]) == 0
    assert "the file system knows no locks (No locks available): nothing keeps a second run from writing there" in capsys.readouterr().out
