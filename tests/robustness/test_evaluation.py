"""main.py --eval on made sets: a network that reads class numbers from colours, images of known colours, and so numbers worked out by hand."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

import main
from robustness import evaluation, sets
from robustness.scores import ALEXNET_ERRORS, CORRUPTIONS, SEVERITIES
from run.errors import InputError
from sources.progress import Progress
from tests.conftest import run_processes
from tests.programs import colours
from utils import Rank

WNIDS = sets.imagenet_classes()
FLAGS = ["--model=colour_reader", "--input-size=32", "--batch-size=7", "--num_workers=0", "--device=cpu", "--distillation-type=none"]
NUM_IMAGES = 10  # of each corruption and severity


def num_right(i: int, severity: int) -> int:
    """Of the 10 images of the i-th corruption: 9 to 5, 8 to 4 or 7 to 3 with severities 1 to 5."""
    return NUM_IMAGES - severity - i % 3


def write_corrupted(root, names: dict[int, str], *, kinds=None) -> None:
    """Images with a white frame that a centre crop leaves out and resizing does not; of the classes `names`, half of them each."""
    numbers = list(names)
    for i, corruption in enumerate(CORRUPTIONS):
        for severity in SEVERITIES:
            for k in range(NUM_IMAGES):
                number = numbers[k % len(numbers)]
                seen = number if k < num_right(i, severity) else 999 - number
                if kinds is None or (corruption, severity) in kinds:
                    colours.write_image(root / corruption / str(severity) / names[number] / f"{k}.png", seen, frame=4)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Folder of made sets and of weights."""
    root = tmp_path_factory.mktemp("made")
    colours.save_weights(root / "weights.pth")
    # of ImageNet-A's 200 classes 6 and 11 are the first two: of all classes 1 has the colour 001, and of those 11 is nearest to it
    for k, (number, seen) in enumerate([(6, 6), (6, 11), (6, 1), (6, 6), (11, 1), (11, 11), (11, 6)]):
        colours.write_image(root / "a" / WNIDS[number] / f"{k}.png", seen)
    for k, (number, seen) in enumerate([(1, 1), (11, 10), (2, 1), (4, 4)]):  # 10 is none of ImageNet-R's, and nearest to it is 11
        colours.write_image(root / "r" / WNIDS[number] / f"{k}.png", seen)
    for k, (number, seen) in enumerate([(0, 0), (0, 1), (999, 999), (999, 990), (500, 500)]):
        colours.write_image(root / "sketch" / WNIDS[number] / f"{k}.png", seen)
    for folder, seen in (("imagenetv2-matched-frequency-format-val", 10), ("imagenetv2-threshold0.7-format-val", 2), ("imagenetv2-top-images-format-val", 3)):
        colours.write_image(root / "v2" / folder / "2" / "a.png", 2)  # folders by number: as text, 10 stands before 2
        colours.write_image(root / "v2" / folder / "10" / "a.png", seen)
    for k, (number, seen) in enumerate([(7, 7), (7, 8), (8, 9), (8, 8)], 1):
        colours.write_image(root / "data" / "val" / WNIDS[number] / f"ILSVRC2012_val_{k:08d}.png", seen)
    for number in set(range(1000)) - {7, 8}:
        colours.write_image(root / "data" / "val" / WNIDS[number] / f"ILSVRC2012_val_{number + 100:08d}.png", number, size=8)
    real = [[8], [7, 8], [], [5]] + [[]] * 1200
    (root / "real.json").write_text(json.dumps(real))
    write_corrupted(root / "c", {123: WNIDS[123], 321: WNIDS[321]})
    return root


def flags_of(root, report=None) -> list[str]:
    paths = [f"--{flag}_path={root / folder}" for flag, folder in (("ina", "a"), ("inr", "r"), ("insk", "sketch"), ("inv2", "v2"), ("inc", "c"))]
    return [*FLAGS, "--eval", f"--resume={root / 'weights.pth'}", *paths, *([f"--report={report}"] if report else [])]


def run(capsys, *flags: str) -> str:
    assert main.main(list(flags)) == 0
    return capsys.readouterr().out


def test_every_set_has_the_accuracy_worked_out_by_hand(made, capsys, tmp_path):
    out = run(capsys, *flags_of(made, tmp_path / "robust.json"))
    document = json.loads((tmp_path / "robust.json").read_text())
    # class 6: right, wrong, 1 which is read as 11, right; class 11: 1 which is read as 11, right, wrong
    assert "Accuracy on the ImageNet-A: 57.1%  (4 of 7 images)" in out
    assert "Accuracy on the ImageNet-R: 75.0%  (3 of 4 images)" in out
    assert "Accuracy on the ImageNet-Sketch: 60.0%  (3 of 5 images)" in out
    v2 = {name: facts["correct"] for name, facts in document["accuracies"].items() if "V2" in name}
    assert v2 == {"ImageNet-V2 matched-frequency": 2, "ImageNet-V2 threshold0.7": 1, "ImageNet-V2 top-images": 1}
    # 0, 1, 10 and 100 are one apart; five are nearest to 1: it, 0, 2, 11 and 101. All but 990 for 999 are among the first five
    sketch = document["accuracies"]["ImageNet-Sketch"]
    assert (sketch["correct"], sketch["num_images"], sketch["acc1"], sketch["acc5"]) == (3, 5, 60.0, 80.0)
    assert f"ImageNet-A: {made / 'a'} holds images of 2 of its 200 classes" in out


def test_corruption_errors_are_those_worked_out_by_hand(made, capsys, tmp_path):
    out = run(capsys, *flags_of(made, tmp_path / "robust.json"))
    found = json.loads((tmp_path / "robust.json").read_text())["ImageNet-C"]
    assert "Accuracy on the ImageNet-C, gaussian_noise: 70.0%  (severities 1 to 5: 90.0 80.0 70.0 60.0 50.0)  CE 33.8%" in out  # 30 / 0.886428
    assert "Accuracy on the ImageNet-C, jpeg_compression: 50.0%  (severities 1 to 5: 70.0 60.0 50.0 40.0 30.0)  CE 82.4%" in out  # 50 / 0.6065
    expected = [(30 + 10 * (i % 3)) / error * 100 for i, error in enumerate(ALEXNET_ERRORS.values())]
    assert [facts["ce"] for facts in found["corruptions"].values()] == pytest.approx(expected)
    assert found["mce"] == pytest.approx(sum(expected) / 15) and re.search(rf"^.*mCE on the ImageNet-C: {sum(expected) / 15:.1f}%$", out, re.M)
    assert f"--inc-path {made / 'c'} holds images of 2 of the 1000 classes" in out
    assert found["corruptions"]["fog"]["num_images"] == [NUM_IMAGES] * 5 and found["relative_to"] == "AlexNet's error" and found["missing"] == {}


def test_validation_images_real_labels_and_attacks(made, capsys, tmp_path):
    flags = [f"--data-path={made / 'data'}", f"--real-labels={made / 'real.json'}", "--fgsm_test", "--pgd_test", f"--report={tmp_path / 'r.json'}"]
    out = run(capsys, *FLAGS, "--eval", f"--resume={made / 'weights.pth'}", *flags)
    accuracies = json.loads((tmp_path / "r.json").read_text())["accuracies"]
    assert accuracies["clean"]["num_images"] == 1002 and accuracies["clean"]["acc1"] == pytest.approx(100 * 1000 / 1002)
    # 7 where 8 is right, 8 where 7 or 8 are, 9 without a label, 8 where 5 is
    assert "Accuracy on the ImageNet-ReaL: 33.3%  (1 of 3 images)" in out
    # colours lie 25 apart, so that a step of 1 changes no class
    assert (accuracies["FGSM images"]["correct"], accuracies["PGD images"]["correct"]) == (1000, 1000)
    assert "Accuracy on the PGD images: 99.8%  (1000 of 1002 images)" in out


def test_an_attack_finds_the_images_that_lie_at_a_border(made, capsys, tmp_path):
    """The mean of 15 and 40 is 27.5: an image of 27 is class 0 by half a step, and one more makes it 1; one of 26 takes two."""
    shutil.copytree(made / "data" / "val", tmp_path / "val")
    for name, blue in (("x", 27), ("y", 26)):
        image = colours.Image.new("RGB", (32, 32), (15, 15, blue))
        image.save(tmp_path / "val" / WNIDS[0] / f"{name}.png")
    out = run(capsys, *FLAGS, "--eval", f"--resume={made / 'weights.pth'}", f"--data-path={tmp_path}", "--fgsm-test", "--pgd-test")
    assert "on the 1004 test images: acc1 99.801" in out
    assert "Accuracy on the FGSM images: 99.7%  (1001 of 1004 images)" in out and "PGD images: 99.7%  (1001 of 1004 images)" in out


def test_any_number_of_processes_counts_the_same(made, tmp_path):
    for k, (number, seen) in enumerate([(0, 0), (0, 1), (1, 1), (1, 0), (1, 0)]):
        colours.write_image(tmp_path / "val" / f"class {number}" / f"{k}.png", seen)
    clean = [*FLAGS, "--eval", f"--resume={colours.save_weights(tmp_path / 'two.pth', 2)}", f"--data-path={tmp_path}"]
    on_sets = [(num, "main", flags_of(made, tmp_path / f"{num}.json")) for num in (1, 3)]
    alone, three, *_ = run_processes(*on_sets, *((num, "main", [*clean, f"--report={tmp_path / f'{num}.html'}"]) for num in (1, 3)))
    assert alone[0] == [0] and three[0] == [0, 0, 0], three[1]
    assert (tmp_path / "1.json").read_text() == (tmp_path / "3.json").read_text()
    page = (tmp_path / "3.html").read_text()
    assert page == (tmp_path / "1.html").read_text() and "3 of 3 mistakes" in page and page.index("class 1/3.png") < page.index("class 1/4.png")

    def lines(out: str) -> list[str]:
        return re.findall(r"(?:Accuracy|mCE) on .*", out)

    assert lines(alone[2]) == lines(three[2]) and len(lines(alone[2])) == 6 + 15 + 1


def test_what_is_missing_is_said_and_there_is_no_mce(made, capsys, tmp_path):
    kinds = {(name, severity) for name in CORRUPTIONS for severity in SEVERITIES if name != "snow"} - {("fog", 4), ("fog", 5)}
    write_corrupted(tmp_path / "c", {1: WNIDS[1]}, kinds=kinds)
    (tmp_path / "c" / "speckle_noise").mkdir()
    next((tmp_path / "c" / "frost" / "2" / WNIDS[1]).iterdir()).unlink()
    out = run(capsys, *FLAGS, "--eval", f"--resume={made / 'weights.pth'}", f"--inc_path={tmp_path / 'c'}", f"--report={tmp_path / 'r.json'}")
    found = json.loads((tmp_path / "r.json").read_text())["ImageNet-C"]
    assert f"--inc-path {tmp_path / 'c'} lacks snow; fog 4 5: there will be no mCE" in out and "no mCE on the ImageNet-C, which lack snow; fog 4 5" in out
    assert "Accuracy on the ImageNet-C, fog: incomplete  (severities 1 to 5: 90.0 80.0 70.0 - -)" in out and "mCE on the ImageNet-C:" not in out
    assert found["mce"] is None and found["missing"] == {"snow": [1, 2, 3, 4, 5], "fog": [4, 5]}
    assert found["corruptions"]["fog"] | {"correct": None, "num_images": None} == {
        "acc1": [90.0, 80.0, 70.0, None, None], "mean_acc1": None, "ce": None, "correct": None, "num_images": None
    }  # fmt: skip
    assert found["corruptions"]["contrast"]["ce"] == pytest.approx(50 / 0.853204) and "snow" not in found["corruptions"]
    assert "speckle_noise are none of the fifteen corruptions" in out and "of 10 images at most, 1 folders have fewer: frost 2 (9)" in out


def test_off_imagenet_errors_are_relative_to_the_clean_error(capsys, tmp_path):
    names = {0: "hat", 1: "pipe"}
    weights = colours.save_weights(tmp_path / "weights.pth", num_classes=2)
    for k, (number, seen) in enumerate([(0, 0), (0, 0), (0, 0), (1, 1), (1, 0)]):
        colours.write_image(tmp_path / "val" / names[number] / f"{k}.png", seen)
    for i, corruption in enumerate(CORRUPTIONS):
        for severity in SEVERITIES:
            for k in range(10):
                colours.write_image(tmp_path / "c" / corruption / str(severity) / names[k % 2] / f"{k}.png", k % 2 if k < num_right(i, severity) else 1 - k % 2)
    flags = [*FLAGS, "--eval", f"--resume={weights}", f"--inc_path={tmp_path / 'c'}", f"--report={tmp_path / 'r.json'}"]
    out = run(capsys, *flags, f"--data-path={tmp_path}")
    assert "corrupted images, gaussian_noise: 70.0%" in out and "CE 150.0% relative to the clean error" in out  # 30 / 20
    assert "mCE on the corrupted images: 200.0% relative to the clean error" in out  # the mean of 150, 200 and 250
    shutil.rmtree(tmp_path / "val" / "pipe")
    colours.write_image(tmp_path / "val" / "pipe" / "0.png", 1)
    out = run(capsys, *flags, f"--data-path={tmp_path}")
    assert "there are no corruption errors, for the clean error is 0" in out and "mCE" not in out


def test_small_images_are_enlarged_and_it_is_said(made, capsys, tmp_path):
    colours.write_image(tmp_path / "fog" / "1" / WNIDS[5] / "a.png", 5, size=20)
    out = run(capsys, *FLAGS, "--eval", f"--resume={made / 'weights.pth'}", f"--inc_path={tmp_path}")
    assert "images have a side of 20 pixels and are enlarged to --input-size 32" in out and "(severities 1 to 5: 100.0 - - - -)" in out


def test_progress_counts_folders_and_says_the_time_left(made, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "Progress", lambda *args, **kwargs: Progress(*args, **kwargs, every_s=0.0))
    out = run(capsys, *FLAGS, "--eval", f"--resume={made / 'weights.pth'}", f"--inc_path={made / 'c'}")
    found = re.findall(r"ImageNet-C: (\d+) of (\d+) images .* (\w+ \d), folder (\d+) of 75  ETA \d:\d\d:\d\d", out)
    assert found[0] == ("7", "750", "gaussian_noise 1", "1") and found[-1] == ("750", "750", "jpeg_compression 5", "75") and len(found) == 150


def test_robustness_is_measured_in_full_precision(made, capsys, monkeypatch):
    seen, real = [], evaluation.count
    monkeypatch.setattr(
        evaluation, "count", lambda net, loader, truth, parts, **kwargs: seen.append(parts.amp_dtype) or real(net, loader, truth, parts, **kwargs)
    )
    out = run(capsys, *FLAGS, "--eval", f"--resume={made / 'weights.pth'}", f"--ina_path={made / 'a'}", "--amp=bf16")
    assert seen == [None] and "--amp bf16 is left out" in out


def test_a_damaged_image_stops_or_is_left_out_and_earlier_results_stay(made, capsys, tmp_path):
    shutil.copytree(made / "sketch", tmp_path / "sketch")
    (tmp_path / "sketch" / WNIDS[0] / "0.png").write_bytes(b"no image")
    flags = [*FLAGS, "--eval", f"--resume={made / 'weights.pth'}", f"--ina_path={made / 'a'}", f"--insk_path={tmp_path / 'sketch'}"]
    with pytest.raises(InputError, match="1 of 5 validation images are damaged"):
        main.main([*flags, f"--report={tmp_path / 'r.json'}"])
    assert json.loads((tmp_path / "r.json").read_text())["accuracies"]["ImageNet-A"]["correct"] == 4
    assert "Accuracy on the ImageNet-Sketch: 50.0%  (2 of 4 images)" in run(capsys, *flags, "--skip-bad-images")


def test_counting_takes_any_of_several_right_classes():
    class Fixed(torch.nn.Linear):
        def forward(self, images):
            return images.flatten(1)

    logits = torch.eye(8)[[3, 4, 5]].view(3, 8, 1, 1) + torch.arange(8).view(8, 1, 1) / 100
    truth = np.array([[0, 3], [1, -1], [7, 1]])
    parts = evaluation.EvalParts(rank=Rank(0, 1, 0, 1, torch.device("cpu")))
    counts = evaluation.count(Fixed(1, 1), [(logits, torch.arange(3))], truth, parts)
    assert counts == (1, 2, 3)  # 3 is right; of 7 and 1 the first is second; 1 is seventh of eight
    assert evaluation.count(Fixed(1, 1), [(logits, torch.arange(3))], np.array([[3], [1], [6]]), parts, kept=[1, 3, 6]) == (2, 3, 3)
