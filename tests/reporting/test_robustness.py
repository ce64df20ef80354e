import json

import pytest

import compare_logs
from reporting import robustness
from tests.test_readme import words_in


def report(accuracies: dict[str, float], corruptions: dict[str, tuple[list, float | None]], *, mce=None, relative_to="AlexNet's error", num_images=100) -> dict:
    facts = {name: {"acc1": acc1, "acc5": acc1, "num_images": num_images} for name, acc1 in accuracies.items()}
    found = {name: {"acc1": acc1s, "mean_acc1": None if None in acc1s else sum(acc1s) / 5, "ce": ce} for name, (acc1s, ce) in corruptions.items()}
    missing = {name: [i + 1 for i, acc1 in enumerate(acc1s) if acc1 is None] for name, (acc1s, _) in corruptions.items() if None in acc1s}
    return {"accuracies": facts, "ImageNet-C": {"path": "c", "relative_to": relative_to, "missing": missing, "corruptions": found, "mce": mce}}


@pytest.fixture
def two(tmp_path) -> list[str]:
    one = report({"clean": 80.0, "ImageNet-A": 6.66}, {"fog": ([70, 60, 50, 40, 30], 61.0), "snow": ([50, 40, 30, 20, 10], 80.8)}, mce=70.9)
    other = report({"clean": 82.5, "ImageNet-R": 40.0}, {"fog": ([72, 62, 52, 42, 32], 58.6), "snow": ([50, 40, None, 20, 10], None)}, num_images=90)
    for name, document in (("a", one), ("b", other)):
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    return [str(tmp_path / "a.json"), str(tmp_path / "b.json")]


def run(capsys, *flags: str) -> tuple[int, str, str]:
    status = compare_logs.main(list(flags))
    return status, *capsys.readouterr()


def test_two_reports_stand_side_by_side(two, capsys):
    status, out, _ = run(capsys, "--robustness", *two)
    cells = [line.split() for line in out.split("\n\n")[0].splitlines()]
    assert status == 0 and cells == [
        ["set", "a", "acc1", "b", "acc1", "ahead", "a", "CE", "b", "CE"],
        ["clean", "80.0", "82.5", "+2.5", "-", "-"],
        ["ImageNet-A", "6.7", "-", "-", "-", "-"],
        ["ImageNet-R", "-", "40.0", "-", "-", "-"],
        ["fog", "50.0", "52.0", "+2.0", "61.0", "58.6"],
        ["snow", "30.0", "-", "-", "80.8", "-"],
        ["mCE", "-", "-", "-", "70.9", "-"],
    ]
    assert "CE: mean error over the five severities, relative to AlexNet's error" in out
    assert "b lacks severities of corruptions, and so has no mCE: snow 3" in out and "clean: measured on different numbers of images (100, 90)" in out


def test_errors_off_imagenet_are_said_to_be_relative_to_the_clean_error(tmp_path, capsys):
    (tmp_path / "a.json").write_text(json.dumps(report({"clean": 80.0}, {"fog": ([70, 60, 50, 40, 30], 250.0)}, relative_to="the clean error")))
    _, out, _ = run(capsys, "--robustness", str(tmp_path / "a.json"), "--format", "markdown")
    assert "| fog | 50.0 | 250.0 |" in out and "relative to the clean error" in out and "ahead" not in out


def test_csv_and_json_are_unrounded(two, capsys):
    _, out, _ = run(capsys, "--robustness", *two, "--format", "json")
    rows = {row["set"]: row for row in json.loads(out)}
    assert rows["ImageNet-A"]["a acc1"] == 6.66 and rows["snow"]["b CE"] is None and rows["mCE"]["a CE"] == 70.9
    _, out, _ = run(capsys, "--robustness", *two, "--format", "csv")
    assert out.splitlines()[0] == "set,a acc1,b acc1,a CE,b CE,ahead" and "ImageNet-A,6.66,,,," in out.splitlines()


def test_lines_start_at_the_clean_images_and_leave_out_what_is_missing(two):
    one, other = robustness.read_results(two)
    assert robustness.points(one, "fog") == [(0, 80.0), (1, 70), (2, 60), (3, 50), (4, 40), (5, 30)]
    assert robustness.points(other, "snow") == [(0, 82.5), (1, 50), (2, 40), (4, 20), (5, 10)] and robustness.points(one, "frost") == []


@pytest.mark.parametrize("suffix", ["svg", "html"])
def test_the_picture_has_a_panel_per_corruption_and_a_line_per_report(two, capsys, tmp_path, suffix):
    status, _, err = run(capsys, "--robustness", *two, "--plot", str(tmp_path / f"r.{suffix}"))
    assert status == 0 and "wrote" in err
    if suffix == "svg":
        assert words_in(tmp_path / "r.svg") == {"fog", "snow", "a (mCE 70.9)", "b", "severity (0: clean)", "Top-1 accuracy, %"}
    else:
        text = (tmp_path / "r.html").read_text()
        assert all(word in text for word in ("fog", "snow", "a (mCE 70.9)")) and text.count('"type":"scatter"') >= 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no JSON", "is no report of main.py"),
        ('{"accuracies": {"clean": {}}}', "is no report of main.py"),
        ('{"run": []}', "is no report of main.py"),
        ('{"accuracies": {}}', "nothing to compare"),
        ('{"accuracies": {}, "C": {"corruptions": {"fog": {"acc1": [1]}}}}', "has not five severities"),
    ],
)
def test_other_files_are_refused(tmp_path, capsys, text, message):
    (tmp_path / "a.json").write_text(text)
    status, _, err = run(capsys, "--robustness", str(tmp_path / "a.json"))
    assert status == 1 and message in err and len(err.splitlines()) == 1


def test_flags_that_contradict_and_files_that_are_not_there(two, capsys, tmp_path):
    assert "give it no logs" in run(capsys, "logs", "--robustness", *two)[2]
    assert "twice" in run(capsys, "--robustness", two[0], two[0])[2]
    assert "cannot be read" in run(capsys, "--robustness", str(tmp_path / "c.json"))[2]
    (tmp_path / "d.json").write_text('{"accuracies": {"clean": {"acc1": 1, "num_images": 1}}}')
    assert "none of the reports has accuracies on corrupted images" in run(capsys, "--robustness", str(tmp_path / "d.json"), "--plot", f"{tmp_path}/r.svg")[2]


def test_reports_of_one_name_are_told_apart_by_their_folders(two, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.json").write_text((tmp_path / "a.json").read_text())
    labels = [result.label for result in robustness.read_results([two[0], str(tmp_path / "other" / "a.json")])]
    assert labels == [str(tmp_path / "a"), str(tmp_path / "other" / "a")]
