"""Classes by name and by number, several roots, subsets."""

import json
import shutil

import numpy as np
import pytest

import datasets
import main
from loading.images import read_sample
from run import checkpoint, config
from run.errors import InputError
from sources import parts
from sources.sets import load_digits
from tests.sources.test_runs import RUN, settings


def test_a_class_map_names_what_data_number_and_numbers_what_they_name(layouts, tmp_path):
    (tmp_path / "names.json").write_text(json.dumps({"0": 3, "1": 2, "2": 1, "3": 0}))
    flag = f"--class-map={tmp_path / 'names.json'}"
    (folder, _), (plain, _) = datasets.open_images(settings(layouts("folder"), flag)), datasets.open_images(settings(layouts("folder")))
    assert folder.classes == ["3", "2", "1", "0"] and (np.diff(folder.targets) >= 0).all()
    assert np.bincount(folder.targets).tolist() == np.bincount(plain.targets).tolist()[::-1]
    packed, _ = datasets.open_images(settings(layouts("packed"), flag))
    assert [read_sample(sample) for sample in packed.samples] == [read_sample(sample) for sample in folder.samples]
    (tmp_path / "names.txt").write_text("tench\ngoldfish\nshark\nray\n")
    shards, _ = datasets.open_images(settings(layouts("shards"), f"--class-map={tmp_path / 'names.txt'}"))
    assert shards.classes == ["tench", "goldfish", "shark", "ray"] and shards.targets.tolist() == plain.targets.tolist()
    with pytest.raises(InputError, match="has 4 classes, class folders in .* has 4, and they must be the same. Only in the map: goldfish, ray, shark"):
        datasets.open_images(settings(layouts("folder"), f"--class-map={tmp_path / 'names.txt'}"))
    (tmp_path / "few.txt").write_text("tench\ngoldfish\n")
    with pytest.raises(InputError, match="names 2 classes, but 3 shards in .* has images of class 3"):
        datasets.open_images(settings(layouts("shards"), f"--class-map={tmp_path / 'few.txt'}"))


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.txt", "b\na c\n\n", ["b", "a c"]),
        ("a.txt", "b 1\na 0\n", ["a", "b"]),
        ("a.csv", "b,1\na,0\n", ["a", "b"]),
        ("a.txt", "n01440764 tench, Tinca tinca\nn01443537 goldfish\n", ["n01440764", "n01443537"]),
        ("a.json", '["b", "a"]', ["b", "a"]),
        ("a.json", '{"b": 1, "a": 0}', ["a", "b"]),
        ("a.json", '{"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"]}', ["n01440764", "n01443537"]),
        ("a.json", '{"0": "b", "1": "a"}', ["b", "a"]),
    ],
)
def test_lists_of_classes_are_read_as_they_are_published(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text)
    assert parts.read_class_map(str(tmp_path / name), flag="--class-map") == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", "0 entries do not number 0 classes"),
        ("a.txt", "b\nb\n", "2 entries do not number 1 classes from 0 on"),
        ("a.json", '{"b": 0, "a": 2}', "do not number"),
        ("a.json", "{", "is no list of classes"),
        ("a.json", "3", "is no list of classes"),
        ("b.json", None, r"cannot be read \(No such file"),
    ],
)
def test_what_is_no_list_of_classes_is_refused(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=f"--classes .*{message}"):
        parts.read_class_map(str(tmp_path / name), flag="--classes")


def test_roots_are_one_folder(layouts, tmp_path, digits_folder):
    """Images of a class may lie in either, and a class in one alone."""
    whole, one, other = digits_folder / "train", tmp_path / "one", tmp_path / "other"
    shutil.copytree(digits_folder, one)
    (other / "train" / "3").parent.mkdir(parents=True)
    shutil.move(one / "train" / "3", other / "train" / "3")
    (other / "train" / "0").mkdir()
    for path in sorted((one / "train" / "0").iterdir())[1::2]:
        shutil.move(path, other / "train" / "0" / path.name)
    train, val = datasets.open_images(settings(f"{one},{other}"))
    expected, _ = datasets.open_images(settings(digits_folder))
    assert train.classes == expected.classes and train.targets.tolist() == expected.targets.tolist() and len(val) == 40
    assert [read_sample(sample) for sample in train.samples] == [read_sample(sample) for sample in expected.samples]
    assert train.samples.sizes().tolist() == expected.samples.sizes().tolist() and len(list(whole.iterdir())) == 4
    with pytest.raises(InputError, match="have names, those of .* numbers: name both with --class-map"):
        datasets.open_images(settings(f"{one},{layouts('shards')}"))


@pytest.mark.parametrize("flag", ["--data-format=zip", "--class-map=names.txt"])
def test_built_in_sets_take_no_format_and_no_class_map(flag):
    with pytest.raises(InputError, match="--data-set DIGITS has a layout and classes of its own"):
        config.parse(["--data-set=DIGITS", flag])


def test_fractions_and_classes_are_of_built_in_sets_too(tmp_path):
    (tmp_path / "odd.txt").write_text("1\n3\n")
    train, val = datasets.open_images(config.parse(["--data-set=DIGITS", "--train-fraction=0.1", f"--classes={tmp_path / 'odd.txt'}"])[0])
    assert train.classes == val.classes == ["1", "3"] and train[0][0].size == (32, 32)
    counts = np.bincount(load_digits()[0].targets)
    assert np.bincount(train.targets).tolist() == [round(0.1 * counts[1]), round(0.1 * counts[3])]


def test_a_folder_with_a_comma_in_its_name_is_one(digits_folder, tmp_path):
    (tmp_path / "a,b").symlink_to(digits_folder)
    assert len(datasets.open_images(settings(tmp_path / "a,b"))[0]) == 96


def test_some_classes_are_the_folder_that_has_only_them(layouts, digits_folder, tmp_path):
    (tmp_path / "classes.txt").write_text("3\n1\n")
    for split in ("train", "val"):
        for name in ("1", "3"):
            shutil.copytree(digits_folder / split / name, tmp_path / "few" / split / name)
    ours, theirs = datasets.open_images(settings(layouts("shards"), f"--classes={tmp_path / 'classes.txt'}")), datasets.open_images(settings(tmp_path / "few"))
    for images, expected in zip(ours, theirs, strict=True):
        assert images.classes == expected.classes == ["1", "3"] and images.targets.tolist() == expected.targets.tolist()
        assert [read_sample(sample) for sample in images.samples] == [read_sample(sample) for sample in expected.samples]
    (tmp_path / "classes.txt").write_text("3\n7\n")
    with pytest.raises(InputError, match="1 of 2 are no classes of the data, such as 7"):
        datasets.open_images(settings(layouts("folder"), f"--classes={tmp_path / 'classes.txt'}"))


def test_fractions_are_stratified_nested_keyed_and_the_same_from_every_source(layouts):
    def train(kind: str, *flags: str):
        return datasets.open_images(settings(layouts(kind), *flags))[0]

    whole = train("folder")
    found = {fraction: list(train("folder", f"--train-fraction={fraction}").samples) for fraction in (0.01, 0.1, 0.5)}
    counts = np.bincount(whole.targets)
    assert np.bincount(train("folder", "--train-fraction=0.5").targets).tolist() == [round(count / 2) for count in counts]
    assert len(found[0.01]) == 4 and set(found[0.01]) <= set(found[0.1]) <= set(found[0.5])
    assert found[0.5] == list(train("folder", "--train-fraction=0.5").samples) != list(train("folder", "--train-fraction=0.5", "--data-seed=1").samples)
    packed = train("packed", "--train-fraction=0.5")
    assert list(map(read_sample, packed.samples)) == list(map(read_sample, train("folder", "--train-fraction=0.5").samples))
    assert len(datasets.open_images(settings(layouts("folder"), "--train-fraction=0.5"))[1]) == 40


def test_a_run_does_not_go_on_with_another_part_of_the_data(layouts, tmp_path):
    flags = [*RUN, "--epochs=1", f"--output_dir={tmp_path}"]
    main.main([*flags, f"--data-path={layouts('folder')}", "--train-fraction=0.5"])
    with pytest.raises(InputError, match=r"train_fraction was 0\.5, is 1\.0"):
        main.main([*flags, f"--data-path={layouts('folder')}", "--resume=auto"])
    assert {"data_format", "data_cache", "data_cache_gb", "class_map", "classes"} <= checkpoint.FREE_SETTINGS
