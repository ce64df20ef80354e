"""The commands on a short run's checkpoints: what they write is a mean, is evaluated as it is written, and is a checkpoint like any other."""

import copy
import json
import re
import shutil

import pytest
import torch

import datasets
import export_onnx
import fuse_eval
import main
import publish
from deployment.weights import describe_weights, load_trained
from run import checkpoint, config
from run.errors import InputError
from tests.conftest import TINY, TINY_RUN, read_log
from tests.nets import randomise
from tests.refining.test_statistics import ALONE
from tools import average_checkpoints, recalibrate_bn

EVAL = ["--eval", *TINY, "--input-size=32", "--num_workers=0", "--device=cpu"]
ACCURACY = re.compile(r"Accuracy of the network on the (\d+) test images: acc1 (\S+) acc5 (\S+) loss (\S+)")


@pytest.fixture(scope="module")
def run(digits_folder, tmp_path_factory):
    """A run of five epochs, of which four numbered checkpoints are kept."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    main.main([*TINY_RUN, "--epochs=5", "--checkpoint-hist=4", f"--data-path={digits_folder}", f"--output_dir={folder}"])
    return folder


@pytest.fixture(scope="module")
def greedy(run, tmp_path_factory):
    """A greedy soup of that run's raw weights, and what the command printed is in its `made_from`."""
    path = tmp_path_factory.mktemp("soups") / "greedy.pth"
    average_checkpoints.main(["--input", str(run), "--soup=greedy", f"--output={path}", "--num-workers=0"])
    return path


def entries(path, name: str = "model") -> dict:
    return {key: value for key, value in checkpoint.read(str(path))[name].items() if value.is_floating_point()}


def mean_of(paths, name: str = "model") -> dict:
    states = [entries(path, name) for path in paths]
    return {key: torch.stack([state[key].double() for state in states]).mean(0).float() for key in states[0]}


def evaluated(capsys, path, *flags: str) -> tuple[float, ...]:
    capsys.readouterr()
    main.main([*EVAL, f"--resume={path}", *flags])
    return tuple(float(text) for text in ACCURACY.search(capsys.readouterr().out).groups())


def test_a_run_keeps_as_many_numbered_checkpoints_as_asked_for(run):
    assert [epoch for epoch, _ in checkpoint.numbered(run)] == [1, 2, 3, 4]


@pytest.mark.parametrize(("flags", "key", "name"), [((), "test_acc1", "model"), (("--use-ema",), "test_ema_acc1", "model_ema")])
def test_the_last_and_the_best_are_averaged(run, tmp_path, capsys, digits_folder, flags, key, name):
    common = [f"--input={run}", *flags, "--held_out=0.25", "--num-workers=0"]
    average_checkpoints.main([*common, "--last=3", f"--output={tmp_path / 'last.pth'}"])
    average_checkpoints.main([*common, "--best=2", f"--output={tmp_path / 'new' / 'best.pth'}"])
    found, wanted = entries(tmp_path / "last.pth"), mean_of([run / f"checkpoint_{epoch}.pth" for epoch in (2, 3, 4)], name)
    assert found.keys() == wanted.keys() and all(torch.equal(found[one], wanted[one]) for one in found)
    acc1s = {record["epoch"]: record[key] for record in read_log(run)}
    made_from = checkpoint.read(str(tmp_path / "new" / "best.pth"))["made_from"]
    there = {epoch for epoch, _ in checkpoint.numbered(run)} | {checkpoint.read(str(run / checkpoint.BEST))["epoch"]}
    there |= {checkpoint.read(str(run / checkpoint.BEST_EMA))["epoch"]}
    best = sorted((acc1s[epoch] for epoch in there), reverse=True)[:2]
    assert [member["acc1"] for member in made_from["members"]] == best[::-1] == [acc1s[member["epoch"]] for member in made_from["members"]]

    made_from = checkpoint.read(str(tmp_path / "last.pth"))["made_from"]
    assert (made_from["what"], made_from["use_ema"], made_from["bn"]) == ("uniform soup of 3 checkpoints", bool(flags), "average")
    num_choosing, num_judging = made_from["num_held_out"], made_from["num_test"]
    assert num_choosing + num_judging == 40 and abs(num_choosing - 10) <= 2  # a quarter of each of four classes
    num_images, acc1, *_ = evaluated(capsys, tmp_path / "last.pth", f"--data-path={digits_folder}")
    assert num_images == 40 and acc1 == pytest.approx((num_choosing * made_from["held_out_acc1"] + num_judging * made_from["test_acc1"]) / 40, abs=1e-3)


def test_a_greedy_soup_is_not_worse_than_its_best_member_on_the_images_that_choose(run, greedy):
    made_from = checkpoint.read(str(greedy))["made_from"]
    members = made_from["members"]
    assert made_from["held_out_acc1"] >= max(member["held_out_acc1"] for member in members) == members[0]["held_out_acc1"]
    assert len(members) + len(made_from["left_out"]) in (4, 5, 6)  # with the best, where it is none of the numbered ones
    wanted = mean_of([member["file"] for member in members])
    assert all(torch.equal(value, wanted[name]) for name, value in entries(greedy).items())


def test_a_soup_is_a_checkpoint_like_any_other(greedy, digits_folder, tmp_path, capsys):
    data = f"--data-path={digits_folder}"
    of_checkpoint = evaluated(capsys, greedy, data)
    fuse_eval.main([*EVAL[1:], f"--resume={greedy}", data])
    assert [float(text) for text in ACCURACY.search(capsys.readouterr().out).groups()] == pytest.approx(of_checkpoint, abs=1e-3)
    export_onnx.run(["--ckpt", str(greedy), "--out", str(tmp_path / "soup.onnx")])
    assert (tmp_path / "soup.onnx").is_file()
    trained = load_trained(None, str(greedy))
    assert re.fullmatch(r"greedy soup of (1 checkpoint|[2-6] checkpoints)", trained.made_from["what"])
    assert (trained.name, trained.class_names, trained.input_size) == ("resnet18", ["0", "1", "2", "3"], 32)
    assert describe_weights(trained) == f"raw weights, {trained.made_from['what']}"
    publish.run(["--ckpt", str(greedy), f"--output-dir={tmp_path}", data])
    described = json.loads((tmp_path / "resnet18_without_distill_5e.pth.json").read_text())
    assert described["accuracy"]["acc1"] == pytest.approx(of_checkpoint[1], abs=1e-3)
    teacher = ["--distillation-type=hard", "--teacher-model=resnet18", f"--teacher-path={greedy}", "--teacher-min-acc1=1"]  # as small as it was trained
    main.main([*TINY_RUN, *teacher, data, "--epochs=1", f"--output_dir={tmp_path / 'student'}"])
    assert f"teacher: top-1 {of_checkpoint[1]:.2f} % on 40 validation images" in capsys.readouterr().out
    main.main([*TINY_RUN, data, "--epochs=0", f"--finetune={greedy}", f"--output_dir={tmp_path / 'fine'}"])
    assert all(torch.equal(value, entries(greedy)[name]) for name, value in entries(tmp_path / "fine" / checkpoint.LAST).items())
    with pytest.raises(InputError, match="holds weights alone, no run to continue"):
        main.main([*TINY_RUN, data, f"--resume={greedy}", f"--output_dir={tmp_path / 'on'}"])
    with pytest.raises(InputError, match="holds no EMA weights"):
        main.main([*EVAL, data, f"--resume={greedy}", "--use-ema"])


def test_statistics_are_taken_anew_by_either_command_alike(run, tmp_path, capsys, digits_folder):
    """Of the uniform soup, at once or afterwards."""
    files = [str(run / f"checkpoint_{epoch}.pth") for epoch in (3, 4)]
    average_checkpoints.main(["--input", *files, "--bn=recalibrate", "--bn-images=64", f"--output={tmp_path / 'at_once.pth'}", "--num-workers=0"])
    average_checkpoints.main(["--input", *files, "--unevaluated", f"--output={tmp_path / 'plain.pth'}"])
    recalibrate_bn.main([f"--input={tmp_path / 'plain.pth'}", "--images=60", f"--output={tmp_path / 'after.pth'}", "--num-workers=0"])
    at_once, after, plain = (entries(tmp_path / f"{name}.pth") for name in ("at_once", "after", "plain"))
    assert all(torch.equal(at_once[name], after[name]) for name in at_once)
    changed = {name for name in plain if not torch.equal(plain[name], after[name])}
    assert changed == {name for name in plain if name.endswith(("running_mean", "running_var"))} != set()
    saved = checkpoint.read(str(tmp_path / "after.pth"))
    assert saved["made_from"] == {
        "what": "with BatchNorm's statistics of 64 images", "file": str(tmp_path / "plain.pth"), "use_ema": False, "images": 64,
        "made_from": checkpoint.read(str(tmp_path / "plain.pth"))["made_from"],
    }  # fmt: skip
    num_images, *_ = evaluated(capsys, tmp_path / "after.pth", f"--data-path={digits_folder}")
    assert num_images == 40
    recalibrate_bn.main([f"--input={files[0]}", "--images=16", "--input-size=40", f"--output={tmp_path / 'at_40.pth'}", "--num-workers=0"])
    saved = checkpoint.read(str(tmp_path / "at_40.pth"))
    assert saved["input_size"] == 40 and load_trained(None, str(tmp_path / "at_40.pth")).input_size == 40


@pytest.fixture
def altered(run, tmp_path):
    """A checkpoint of the run with some entries changed by a function."""

    def make(change) -> str:
        saved = copy.deepcopy(checkpoint.read(str(run / checkpoint.LAST)))
        change(saved)
        checkpoint.save(saved, tmp_path, ["altered.pth"])
        return str(tmp_path / "altered.pth")

    return make


def set_lr(saved: dict) -> None:
    saved["args"]["lr"] = 0.5


CHANGES = [
    (lambda saved: saved["args"].update(model="resnet34"), "the architecture is resnet34 there, resnet18 here"),
    (lambda saved: saved.update(class_names=["a", "b"]), "there are 2 classes there, 4 here"),
    (lambda saved: saved.update(class_names=["a", "b", "c", "d"]), r"class_names is \['a', 'b', 'c', 'd'\] there, \['0', '1', '2', '3'\] here"),
    (lambda saved: saved.update(input_size=64), "input_size is 64 there, 32 here"),
    (lambda saved: saved["model"].update({"fc.bias": torch.zeros(7)}), r"fc.bias is \[7\] there, \[4\] here"),
    (lambda saved: saved["model"].pop("fc.bias"), "1 tensors are in one alone, such as fc.bias"),
    (set_lr, "is of another recipe than .*: lr was 0.5, is 0.03.*--allow-config-change"),
]


@pytest.mark.parametrize(("change", "words"), CHANGES)
def test_checkpoints_that_do_not_go_together_are_refused_by_name(run, altered, tmp_path, change, words):
    first, other = str(run / "checkpoint_3.pth"), altered(change)
    with pytest.raises(InputError, match=words) as error:
        average_checkpoints.main(["--input", first, other, f"--output={tmp_path / 'soup.pth'}"])
    assert first in str(error.value) and other in str(error.value)
    assert not (tmp_path / "soup.pth").exists()


def test_other_recipes_are_averaged_where_that_is_accepted(run, altered, tmp_path):
    other = altered(set_lr)
    average_checkpoints.main(["--input", str(run / "checkpoint_3.pth"), other, "--allow-config-change", "--unevaluated", f"--output={tmp_path / 'soup.pth'}"])
    wanted = mean_of([run / "checkpoint_3.pth", run / "checkpoint_4.pth"])
    assert all(torch.equal(value, wanted[name]) for name, value in entries(tmp_path / "soup.pth").items())


def test_what_cannot_be_averaged_is_refused(run, tmp_path, caplog):
    shutil.copy(run / "checkpoint_3.pth", tmp_path / "checkpoint_3.pth")
    (tmp_path / "checkpoint_4.pth").write_bytes(b"half")
    torch.save({"model": {"fc.bias": torch.zeros(4)}}, tmp_path / "foreign.pth")
    shutil.copy(tmp_path / "foreign.pth", tmp_path / "like_it.pth")
    cases = [
        ([str(run), "--last=9"], "--last 9: there are . checkpoints .*--checkpoint-hist"),
        ([str(run / "checkpoint_3.pth")], "names 1 checkpoint, and an average is of two or more"),
        ([str(tmp_path)], "names 1 checkpoint"),
        ([str(tmp_path / "checkpoint_4.pth"), str(run / "checkpoint_3.pth")], "checkpoint_4.pth is no complete checkpoint"),
        ([str(tmp_path / "foreign.pth"), str(run / "checkpoint_3.pth"), "--last=2"], "--last: .*foreign.pth does not tell its epoch"),
        ([str(tmp_path / "foreign.pth"), str(tmp_path / "like_it.pth")], "foreign.pth does not say how its network was trained.*--model"),
        ([str(run / "checkpoint_3.pth"), str(run)], "--input names .*checkpoint_3.pth twice"),
        ([str(tmp_path / "nothing.pth"), str(run)], "nothing.pth: there is no such file"),
        ([str(run), "--unevaluated", "--soup=greedy"], "--unevaluated looks at no images"),
        ([str(run), "--lr-basis=3"], "unknown flag --lr-basis; did you mean --lr-base"),
    ]
    for flags, words in cases:
        with pytest.raises(InputError, match=words):
            average_checkpoints.main(["--input", *flags, f"--output={tmp_path / 'soup.pth'}"])
    with pytest.raises(InputError, match="--output .*checkpoint_3.pth is there already"):
        average_checkpoints.main(["--input", str(run), f"--output={run / 'checkpoint_3.pth'}"])


# ---- evaluation of mirrored images, and at several sizes


@pytest.fixture(scope="module")
def lively(greedy, tmp_path_factory):
    """That soup with weights that say something else of each image."""
    saved = checkpoint.read(str(greedy))
    saved["model"] = randomise(load_trained(None, str(greedy)).net).state_dict()
    saved["model"]["fc.weight"] *= 10
    checkpoint.save(saved, tmp_path_factory.mktemp("lively"), ["net.pth"])
    return tmp_path_factory.getbasetemp() / "lively0" / "net.pth"


def test_mirrored_evaluation_is_that_of_the_mean_probabilities(lively, digits_folder, capsys):
    data = f"--data-path={digits_folder}"
    cfg, _ = config.parse([*EVAL, f"--resume={lively}", data])
    net = load_trained(None, str(lively)).net
    with torch.no_grad():
        batches = datasets.build_val_loader(cfg, datasets.open_images(cfg)[1], ALONE)
        found = [(net(images).softmax(1), net(images.flip(3)).softmax(1), targets) for images, targets in batches]
    one, other, targets = (torch.cat(parts) for parts in zip(*found, strict=True))
    mean = (one + other) / 2
    acc1, loss = 100 * (mean.argmax(1) == targets).float().mean().item(), -mean.gather(1, targets[:, None]).log().mean().item()
    plain = evaluated(capsys, lively, data)
    flipped = evaluated(capsys, lively, data, "--tta=hflip")
    assert flipped[1] == pytest.approx(acc1, abs=1e-3) and flipped[3] == pytest.approx(loss, abs=5e-4)
    assert abs(flipped[3] - plain[3]) > 0.01
    fuse_eval.main([*EVAL[1:], f"--resume={lively}", data, "--tta=hflip"])
    assert [float(text) for text in ACCURACY.search(capsys.readouterr().out).groups()] == pytest.approx(flipped, abs=1e-3)


def test_a_table_by_size_has_what_each_size_alone_gives(lively, digits_folder, capsys, tmp_path):
    data = [f"--data-path={digits_folder}"]
    alone = {size: evaluated(capsys, lively, *data, f"--input-size={size}") for size in (32, 40, 64)}
    main.main([*EVAL, f"--resume={lively}", *data, "--input_size", "32,40,64", f"--report={tmp_path / 'out.json'}"])
    out = capsys.readouterr().out
    *_, headings, first, second, third = [line.split() for line in out.splitlines()]
    assert headings == ["size", "resized", "crop-pct", "acc1", "acc5", "loss"]
    assert [row[:3] for row in (first, second, third)] == [["32", "32", "1"], ["40", "45", "0.875"], ["64", "73", "0.875"]]
    assert [tuple(map(float, row[3:])) for row in (first, second, third)] == [found[1:] for found in alone.values()]
    assert "made with other input_size" not in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out_32.json", "out_40.json", "out_64.json"]


def test_several_sizes_are_for_an_evaluation_alone():
    with pytest.raises(InputError, match="--input-size 32,40: several sizes are for an evaluation: add --eval"):
        config.parse_sizes(["--data-set=DIGITS", "--input-size=32,40"])
    with pytest.raises(InputError, match="--input-size: 'x' is not a whole number"):
        config.parse_sizes(["--data-set=DIGITS", "--eval", "--resume=x", "--input-size", "32,x"])
    cfgs, _ = config.parse_sizes(["--data-set=DIGITS", "--eval", "--resume=x", "--input-size", "32,40,32"])
    assert [cfg.input_size for cfg in cfgs] == [32, 40]
    assert [cfg.input_size for cfg in config.parse_sizes(["--data-set=DIGITS", "--input-size", "48"])[0]] == [48]
