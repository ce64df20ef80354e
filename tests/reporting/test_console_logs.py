"""Logs that programs print: lines as Swin's logger (MLLA) and DeiT's console (LSNet) write them, whole, resumed and cut."""

from reporting import logs
from tests.conftest import run_forked


def swin(message: str) -> str:
    return f"[2024-12-01 10:00:00 mlla_nano] (main.py 319): INFO {message}\n"


def swin_epoch(epoch: int, acc1: float, *, steps: int = 2) -> str:
    rate = f"lr 0.000{epoch}5\t wd 0.0500"
    rest = "grad_norm 1.2 (1.3)\tloss_scale 1024 (1024)\tmem 9000MB"
    lines = [f"Train: [{epoch}/300][{step}/1251]\teta 0:09:57 {rate}\ttime 0.47 (0.48)\tloss 9.{step} (6.{step})\t{rest}" for step in range(steps)]
    lines += [f"EPOCH {epoch} training takes 0:10:05", *SWIN_TEST, f" * Acc@1 {acc1:.3f} Acc@5 90.000"]
    lines += [f"Accuracy of the network on the 50000 test images: {acc1:.1f}%", f"Max accuracy: {acc1:.2f}%"]
    return "".join(map(swin, lines))


SWIN_TEST = ["Test: [0/49]\tTime 1.2 (1.2)\tLoss 0.9 (0.9)\tAcc@1 80.1 (80.1)\tAcc@5 95.0 (95.0)\tMem 9000MB"]
SWIN_START = swin("number of params: 4001352") + swin("number of GFLOPs: 0.7")
DEIT = """number of params: 11397320
Start training for 300 epochs
Epoch: [0]  [   0/1251]  eta: 1:02:03  lr: 0.000001  loss: 6.9512 (6.9512)  time: 2.97  data: 1.95  max mem: 9000
Epoch: [0]  [1250/1251]  eta: 0:00:00  lr: 0.000001  loss: 6.8101 (6.9000)  time: 0.27  data: 0.00  max mem: 9000
Epoch: [0] Total time: 1 day, 0:05:10 (0.2480 s / it)
Averaged stats: lr: 0.000001  loss: 6.8101 (6.9000)
Test:  [  0/131]  eta: 0:01:00  loss: 6.5 (6.5)  acc1: 1.0 (1.0)  acc5: 3.0 (3.0)  time: 0.4  data: 0.3  max mem: 9000
* Acc@1 1.250 Acc@5 4.500 loss 6.432
Accuracy of the network on the 50000 test images: 1.2%
"""


def read(tmp_path, text: str) -> tuple[list[list[dict]], list[str]]:
    (tmp_path / "log_rank0.txt").write_text(text)
    reading = logs.read_log(tmp_path / "log_rank0.txt")
    return [run.records for run in reading.runs], reading.notes


def test_swins_epochs_have_accuracy_rate_mean_loss_and_duration(tmp_path):
    runs, notes = read(tmp_path, SWIN_START + swin_epoch(0, 1.5) + swin_epoch(1, 3.25))
    shared = {"train_loss": 6.1, "test_acc5": 90.0, "epoch_s": 605.0, "n_parameters": 4001352}
    assert runs == [[{"epoch": 0, "train_lr": 5e-5, "test_acc1": 1.5, **shared}, {"epoch": 1, "train_lr": 1.5e-4, "test_acc1": 3.25, **shared}]]
    assert notes == []


def test_deits_console_has_the_loss_of_the_evaluation_too(tmp_path):
    runs, notes = read(tmp_path, DEIT)
    expected = {"epoch": 0, "train_lr": 1e-6, "train_loss": 6.9, "test_loss": 6.432, "test_acc1": 1.25, "test_acc5": 4.5, "epoch_s": 86710.0}
    assert (runs, notes) == ([[{**expected, "n_parameters": 11397320}]], [])


def test_evaluations_of_earlier_checkpoints_and_of_other_weights_are_left_out(tmp_path):
    evaluation = swin(" * Acc@1 77.000 Acc@5 90.000")
    cut = "".join(swin_epoch(2, 0.0).splitlines(keepends=True)[:1])  # killed in the middle of epoch 2, resumed from epoch 1's checkpoint
    runs, notes = read(tmp_path, evaluation + swin_epoch(0, 1.5) + swin_epoch(1, 3.25) + evaluation + cut + evaluation + swin_epoch(2, 4.0))
    assert [[(record["epoch"], record["test_acc1"]) for record in run] for run in runs] == [[(0, 1.5), (1, 3.25), (2, 4.0)]]
    assert notes == [
        "2 evaluations left out, at no end of an epoch's training: of an earlier checkpoint",
        "1 evaluation left out, of an epoch that had one: the first counts",
    ]


def test_an_epoch_that_comes_again_counts_once(tmp_path):
    runs, notes = read(tmp_path, swin_epoch(0, 1.5) + swin_epoch(1, 3.0) + swin_epoch(1, 2.5))
    assert [record["test_acc1"] for record in runs[0]] == [1.5, 2.5]
    assert notes == ["1 line left out: epoch 1 came again, and the last of each counts (theirs was the highest test_acc1, 3.000)"]


def test_folders_of_published_logs_are_compared_by_their_names(tmp_path):
    for size, acc1 in (("1_mlla_nano", 77.14), ("2_mlla_mini", 81.94)):
        (tmp_path / size).mkdir()
        (tmp_path / size / "03_recconv_5x5_nearest_interp.txt").write_text(SWIN_START + swin_epoch(0, 1.0) + swin_epoch(1, acc1))
    (tmp_path / "lsnet_t.log").write_text('{"test_acc1": 74.9, "epoch": 299, "n_parameters": 11397320}\n')
    (tmp_path / "notes.txt").write_text("nothing of this is a log")
    result = run_forked("compare_logs.py", str(tmp_path), "--format", "csv")
    assert (result.returncode, result.stderr) == (0, "")
    rows = [row.split(",") for row in result.stdout.splitlines()[1:]]
    name = "03_recconv_5x5_nearest_interp"
    assert [(row[0], row[3], row[10]) for row in rows] == [(name, "81.94", "4001352"), (name, "77.14", "4001352"), ("lsnet_t", "74.9", "11397320")]
