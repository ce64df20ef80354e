import json
import os

import pytest

import fuse_eval
from robustness import sets
from run import config
from run.errors import InputError
from tests.programs import colours

WNIDS = sets.imagenet_classes()
EVAL = ["--eval", "--resume=x", "--input-size=32"]


def suite(*flags: str) -> sets.Suite:
    return sets.open_suite(config.parse([*EVAL, *flags])[0])


def test_imagenet_is_known_by_its_wordnet_ids_or_by_the_number_of_classes():
    assert sets.is_imagenet(WNIDS) and sets.is_imagenet([f"name {i}" for i in range(1000)])
    assert not sets.is_imagenet(WNIDS[::-1]) and not sets.is_imagenet(WNIDS[:999])
    assert WNIDS[0] == "n01440764" and WNIDS[999] == "n15075141"


def test_the_two_hundred_classes_are_timms_and_in_order(tmp_path):
    for name, path, first in (("a", "ina", [6, 11, 13]), ("r", "inr", [1, 2, 4])):
        colours.write_image(tmp_path / name / WNIDS[first[0]] / "0.png", 0, size=8)
        (found,) = suite(f"--{path}_path={tmp_path / name}").sets
        assert found.kept[:3] == first and len(found.kept) == 200 and found.kept == sorted(found.kept)


@pytest.mark.parametrize(
    ("flag", "folder", "words"),
    [
        ("--ina_path", "a/n01440764", ["--ina-path", "1 of its 1 folders, such as n01440764", "none of the 200 classes"]),
        ("--insk_path", "sketch/cat", ["--insk-path", "such as cat", "1000 classes"]),
        ("--inr_path", "nowhere", ["--inr-path", "is no folder"]),
        ("--inc_path", "c/fog", ["--inc-path", "none of the folders <corruption>/<1 to 5>"]),
        ("--inc_path", "c/fog/3/cat", ["fog/3", "such as cat"]),
        ("--inv2_path", "v2/1001", ["--inv2-path", "such as 1001"]),
    ],
)
def test_other_folders_are_refused_with_the_reason(tmp_path, flag, folder, words):
    if folder != "nowhere":
        colours.write_image(tmp_path / folder / "0.png", 0, size=8)
    with pytest.raises(InputError) as error:
        suite(f"{flag}={tmp_path / folder.split('/')[0]}")
    assert [word for word in words if word not in str(error.value)] == []


def test_a_variant_of_imagenet_v2_may_be_named_itself_or_lie_with_others(tmp_path):
    for name in ("imagenetv2-threshold-0.7", "imagenetv2-top-images"):
        colours.write_image(tmp_path / "v2" / name / "11" / "0.png", 0, size=8)
    assert [one.name for one in suite(f"--inv2_path={tmp_path / 'v2'}").sets] == ["ImageNet-V2 threshold0.7", "ImageNet-V2 top-images"]
    (found,) = suite(f"--inv2_path={tmp_path / 'v2' / 'imagenetv2-top-images'}").sets
    assert found.name == "ImageNet-V2 top-images" and found.truth.tolist() == [[11]]


def test_sets_of_imagenet_are_refused_for_networks_of_other_classes(tmp_path):
    for flag in ("--ina_path", "--insk_path", "--inv2_path"):
        with pytest.raises(InputError, match="for networks of ImageNet's 1000 classes, and this one has 10 others"):
            suite("--data-set=DIGITS", f"{flag}={tmp_path}")
    with pytest.raises(InputError, match="ReaL is for networks of ImageNet's 1000 classes"):
        suite("--data-set=DIGITS", "--real-labels")


def write_validation(root, names: list[str]) -> None:
    """An image per class, with these names as far as they go."""
    colours.write_image(root / "image.png", 0, size=8)
    for number, wnid in enumerate(WNIDS):
        (root / "val" / wnid).mkdir(parents=True)
        os.link(root / "image.png", root / "val" / wnid / (names[number] if number < len(names) else f"ILSVRC2012_val_{number + 1:08d}.png"))


def test_real_labels_are_found_by_the_images_names(tmp_path):
    write_validation(tmp_path, ["ILSVRC2012_val_00050000.png", "ILSVRC2012_val_00000001.png"])
    (found,) = suite(f"--data-path={tmp_path}", "--real_labels").sets
    labels = json.loads((sets.resources.files("timm") / "data/_info/imagenet_real_labels.json").read_text())
    expected = [labels[49999], labels[0], *labels[2:1000]]
    assert [[i for i in row if i >= 0] for row in found.truth.tolist()] == [one for one in expected if one]
    assert 0 < len(found.images) == sum(map(bool, expected)) < 1000


@pytest.mark.parametrize(
    ("names", "text", "message"),
    [
        (["cat.png"], None, "1 of 1000 validation images, such as .*cat.png, are not named like"),
        ([], "[[1]]", "has labels for 1 images, and there is one of number 1000"),
        ([], "[[1000]]", "must be a list of lists of class numbers"),
        ([], "no JSON", "is not JSON"),
        ([], json.dumps([[]] * 1000), "none of the 1000 validation images has a label"),
    ],
)
def test_real_labels_that_do_not_fit_are_refused(tmp_path, names, text, message):
    write_validation(tmp_path, names)
    if text is not None:
        (tmp_path / "real.json").write_text(text)
    with pytest.raises(InputError, match=message):
        suite(f"--data-path={tmp_path}", "--real_labels" if text is None else f"--real_labels={tmp_path / 'real.json'}")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--inc_path=x", "--data-path=x"], "add --eval"),
        (["--pgd-test", "--data-set=DIGITS"], "--pgd-test: networks are tried"),
        ([*EVAL, "--ina-path=x", "--real-labels"], "--real-labels: these are measured on the validation images: add --data-path"),
        ([*EVAL, "--ina-path=x", "--report=x.csv"], "name a .json file"),
        ([*EVAL, "--real-labels"], "needs --data-path"),
    ],
)
def test_flags_that_miss_something_are_refused(flags, words):
    with pytest.raises(InputError, match=words):
        config.parse(flags)


def test_fused_files_are_not_tried():
    with pytest.raises(InputError, match="main.py --eval takes --inc-path --fgsm-test"):
        fuse_eval.main(["--data-set=DIGITS", "--resume=x", "--inc_path=x", "--fgsm-test", "--device=cpu"])
