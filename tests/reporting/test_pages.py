"""Pages: what is escaped, what an evaluation's outcomes amount to by hand, what runs leave behind, small pages however much there is to tell."""

import json

import numpy as np
import pytest
from PIL import Image

import fuse_eval
import main
import report
from reporting import browser, charts, evaluation_page, outcomes, pages, run_page
from reporting.browser import find_chromium
from reporting.outcomes import Outcomes
from tests.browsing import Page, browsed, read_page
from tests.programs import colours
from tools import picture_page

NASTY = '<script>x()</script> & "日本" \udcff \x01'


def test_text_and_attributes_are_escaped_whatever_they_hold():
    page = Page(pages.element("p", NASTY, title=NASTY, class_=None, data_value=3))
    shown = NASTY.replace("\udcff", "\\udcff").replace("\x01", "\N{REPLACEMENT CHARACTER}")
    assert page.elements == [("p", {"title": shown, "data-value": "3"})] and page.text == shown
    pages.element("p", NASTY).encode()  # a page can be written
    assert pages.element("p", pages.element("b", "&")) == "<p><b>&amp;</b></p>"


def test_pictures_lie_inside_the_page_small_ones_exactly():
    noise = np.random.RandomState(0).randint(0, 256, (40, 30, 3), dtype=np.uint8)
    assert pages.data_uri(Image.fromarray(noise)).startswith("data:image/png;base64,")
    large = Image.fromarray(np.full((300, 500, 3), 90, np.uint8))
    assert pages.shrunk(large, 100).size == (100, 60) and pages.data_uri(large).startswith("data:image/jpeg")
    assert 'alt="a &quot;b&quot;"' in pages.image(large, 'a "b"')


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 100, [0, 20, 40, 60, 80, 100]), (0, 0.0021, [0, 0.0005, 0.001, 0.0015, 0.002]), (93, 99.5, [94, 96, 98]), (-1, 1, [-1, -0.5, 0, 0.5, 1])],
)
def test_axes_have_round_numbers(low, high, expected):
    assert charts.ticks(low, high) == pytest.approx(expected)


def test_a_curve_lies_where_its_numbers_are():
    drawn = Page(charts.curves("Loss", [charts.Line("a", [(0, 1.0), (10, 3.0)]), charts.Line("b", [(5, 2.0)])], x_name="epoch", y_name="", limits=(1.0, 3.0)))
    points = [tuple(map(float, pair.split(","))) for pair in drawn.all("polyline")[0]["points"].split()]
    dot = drawn.all("circle")[0]
    assert points[0] == (charts.LEFT, charts.HEIGHT - charts.BOTTOM) and points[1] == (charts.WIDTH - charts.RIGHT, charts.TOP)
    assert (float(dot["cx"]), float(dot["cy"])) == pytest.approx([sum(pair) / 2 for pair in zip(*points, strict=True)], abs=0.1)
    assert "a from 1 to 3" in drawn.all("svg")[0]["aria-label"]
    many = Page(charts.curves("x", [charts.Line("a", [(i, float(i)) for i in range(5000)])], x_name="", y_name="", limits=(0, 5000)))
    assert len(many.all("polyline")[0]["points"].split()) <= charts.MAX_POINTS + 1


# --- outcomes --------------------------------------------------------------------------------------------------------------------------

HAND = Outcomes(
    places=np.arange(6),
    targets=np.array([0, 0, 0, 1, 1, 2]),
    predictions=np.array([0, 1, 1, 1, 0, 2]),
    confidences=np.array([0.9, 0.6, 0.65, 0.95, 0.3, 1.0]),
    target_confidences=np.array([0.9, 0.4, 0.3, 0.95, 0.1, 1.0]),
)


def test_calibration_is_that_worked_out_by_hand():
    found = outcomes.calibrate(HAND, num_bins=5)
    # (0.2, 0.4]: 0.3, wrong; (0.4, 0.6]: 0.6, wrong; (0.6, 0.8]: 0.65, wrong; above: 0.9, 0.95 and 1.0, right
    assert [one.num_images for one in found.bins] == [1, 1, 1, 3]
    assert found.ece == pytest.approx((0.3 + 0.6 + 0.65 + 3 * (1 - 2.85 / 3)) / 6)
    assert (found.confidence, found.accuracy) == pytest.approx((4.4 / 6, 0.5))
    assert [one.num_images for one in outcomes.calibrate(HAND).bins] == [1, 1, 1, 1, 2]  # fifteen: 0.9 is not in the last one, from 0.933 on
    exact = Outcomes(np.arange(4), np.zeros(4, int), np.array([0, 1, 0, 1]), np.full(4, 0.5), np.full(4, 0.5))
    assert outcomes.calibrate(exact).ece == 0


def test_classes_pairs_and_mistakes_are_those_worked_out_by_hand():
    found = outcomes.by_class(HAND, 4)
    assert found[0] == (0, 3, 1, pytest.approx(2.15 / 3), 1, 2, 1) and found[3] == (3, 0, 0, 0.0, None, 0, 0)
    assert outcomes.confused_pairs(HAND) == [(0, 1, 2), (1, 0, 1)]
    assert outcomes.pairs_of_matrix(outcomes.confusion(HAND, 3)) == outcomes.confused_pairs(HAND)
    assert outcomes.confident_mistakes(HAND, 2).tolist() == [2, 1]
    assert outcomes.confusion(HAND, 3).tolist() == [[1, 2, 0], [1, 1, 0], [0, 0, 1]]
    halves = [Outcomes(*(getattr(HAND, name)[part] for name in Outcomes.__dataclass_fields__)) for part in (slice(1, None, 2), slice(0, None, 2))]
    assert (outcomes.joined_outcomes(halves).predictions == HAND.predictions).all()


def test_the_page_of_fifty_thousand_images_of_a_thousand_classes_stays_small(tmp_path):
    rng = np.random.RandomState(0)
    targets = np.repeat(np.arange(1000), 50)
    predictions = np.where(rng.rand(50_000) < 0.75, targets, rng.randint(0, 1000, 50_000))
    many = Outcomes(np.arange(50_000), targets, predictions, rng.rand(50_000), rng.rand(50_000))
    noise = Image.fromarray(rng.randint(0, 256, (224, 224, 3), dtype=np.uint8))  # which compresses worse than any photograph
    labels = [f"n{i:08d} {NASTY}" for i in range(1000)]
    sections = evaluation_page.evaluation_sections(many, labels, lambda place: (noise, f"val/{NASTY}/{place}.JPEG"))
    document = {"model": "m", "weights": "w", "use_ema": False, "num_classes": 1000, "input_size": 224, "crop_pct": 0.875}
    document |= {"tta": "hflip", "crop_mode": "squash", "interpolation": "bicubic"}
    document["accuracies"] = {"clean": {"acc1": 75.0, "acc5": 90.0, "loss": 1.0, "num_images": 50_000}}
    (tmp_path / "many.html").write_text(evaluation_page.evaluation_page(document, sections, num_skipped=3), encoding="utf-8")
    page = read_page(tmp_path / "many.html")
    assert (tmp_path / "many.html").stat().st_size < 2_500_000
    assert len(page.all("img")) == evaluation_page.NUM_MISTAKES and len(page.rows) < 1000 + evaluation_page.NUM_PAIRS + 30
    assert "3 damaged images were left out" in page.text and "crop 0.875, mode squash, each with its mirror image (--tta hflip); 1000" in page.text
    assert len(page.all("script")) == 1


# --- an evaluation ---------------------------------------------------------------------------------------------------------------------

NAMES = ['<b>"a"&', "owl", "zebra 日本"]
FLAGS = ["--eval", "--model=colour_reader", "--input-size=32", "--batch-size=3", "--num_workers=0", "--device=cpu", "--distillation-type=none"]


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    """Flags of an evaluation of eleven images of three classes, the first of which is recognised in 3 of 4, the second in 2 of 4."""
    root = tmp_path_factory.mktemp("evaluation")
    for name, seen in zip(NAMES, ([0, 0, 0, 1], [1, 1, 0, 2], [2, 2, 2]), strict=True):
        for k, number in enumerate(seen):
            colours.write_image(root / "val" / name / f"{k}.png", number)
    return [*FLAGS, f"--resume={colours.save_weights(root / 'weights.pth', 3)}", f"--data-path={root}"]


def test_the_page_of_an_evaluation_tells_what_was_confused_and_shows_it(evaluation, tmp_path, capsys):
    assert main.main([*evaluation, f"--report={tmp_path / 'page.html'}"]) == 0
    assert "calibration: ECE" in capsys.readouterr().out
    page = read_page(tmp_path / "page.html")
    classes = {row[0]: row[1:4] for row in page.rows if len(row) == 8}
    assert classes == {"class": ["images", "right", "top-1, %"], NAMES[0]: ["4", "3", "75.00"], "owl": ["4", "2", "50.00"], NAMES[2]: ["3", "3", "100.00"]}
    assert [row for row in page.rows if len(row) == 5 and row[2] == "1" and row[0] == NAMES[0]] == [[NAMES[0], "owl", "1", "25.0", "1"]]
    assert [row for row in page.rows if row[0] == "owl" and len(row) == 4] == [["owl", "1", "2", "1"]]  # of the confusion matrix
    assert sorted(attributes["alt"] for attributes in page.all("img")) == sorted(
        [f"An image of class {NAMES[0]}, taken for owl", f"An image of class owl, taken for {NAMES[0]}", f"An image of class owl, taken for {NAMES[2]}"]
    )
    assert f"{NAMES[0]}/3.png" in page.texts and "8 of 11" not in page.text
    assert page.all("b") and not [attributes for name, attributes in page.elements if name == "a" and "href" not in attributes]
    # headings become buttons, and sort: the most accurate class first, then the least
    click = "document.querySelectorAll('table.sortable')[0].querySelectorAll('th button')[3].click();"
    for times, first in ((1, NAMES[2]), (2, "owl")):
        sorted_rows = [row for row in browsed(tmp_path / "page.html", tmp_path, click * times).rows if len(row) == 8]
        assert sorted_rows[1][0] == first


def test_json_has_the_calibration_and_csv_the_table_of_classes(evaluation, tmp_path, capsys):
    for name in ("a.json", "a.csv"):
        main.main([*evaluation, f"--report={tmp_path / name}"])
    fuse_eval.main([*evaluation[1:], f"--report={tmp_path / 'b.csv'}"])
    assert (tmp_path / "b.csv").read_text() == (tmp_path / "a.csv").read_text()
    found = json.loads((tmp_path / "a.json").read_text())
    ece, confidence, bins = (found["calibration"][key] for key in ("ece", "mean_confidence", "bins"))
    assert sum(one["num_images"] for one in bins) == 11 and ece == pytest.approx(100 * 8 / 11 - confidence)  # all in one bin, of 33 %
    assert f"calibration: ECE {ece:.2f} %  mean confidence {confidence:.2f} %" in capsys.readouterr().out
    assert (tmp_path / "a.csv").read_text().splitlines()[2] == "owl,4,2,50.000,1,2,1"


# --- runs ------------------------------------------------------------------------------------------------------------------------------

SETTINGS = (
    "# python main.py --config <this file> runs this again.\n# commit {commit}\n# torch 2.12\nmodel: recnext_m1\nlr: {lr}\nepochs: 6\noutput_dir: {name}\n"
)


def published(count: int, lift: float = 0.0) -> str:
    """A log of the form that the DeiT family publishes."""
    keys = ("train_lr", "train_loss", "test_loss", "test_acc1", "test_acc5", "epoch", "n_parameters")
    rows = [(1e-3 - 1e-4 * i, 6 - i, 5 - i, 20 + lift + 10 * i, 50 + i, i, 5_561_384) for i in range(count)]
    return "".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows)


@pytest.fixture
def runs(tmp_path):
    """Two runs of ours, one of them resumed and with damaged images, and a published log whose last line is half-written."""
    for name, lr, lift in (("first", 0.001, 0.0), ("second <i>&", 0.002, 5.0)):
        folder = tmp_path / name
        folder.mkdir()
        records = [json.loads(line) for line in published(6, lift).splitlines()]
        times = {"images_per_s": 100.0, "data_wait_s": 2.5, "epoch_s": 10.0, "eval_s": 1.0, "skipped_steps": 0, "bad_images": 0, "test_bad_images": 0}
        (folder / "log.txt").write_text("".join(json.dumps(record | times) + "\n" for record in records))
        (folder / "args.yaml").write_text(SETTINGS.format(commit=name, lr=lr, name=name))
    lines = (tmp_path / "first" / "log.txt").read_text().replace('"skipped_steps": 0', '"skipped_steps": 2', 1).replace('"bad_images": 0', '"bad_images": 3', 1)
    (tmp_path / "first" / "log.txt").write_text(lines)
    (tmp_path / "first" / "log_dropped.txt").write_text('{"epoch": 4}\n{"epoch": 5}\n{"epo')
    (tmp_path / "first" / "bad_images_train.txt").write_text("".join(f"train/a/{i} <&>.jpg: truncated\n" for i in range(30)))
    for start in (1_700_000_000, 1_700_100_000):
        (tmp_path / "first" / f"events.out.tfevents.{start}.host.1").touch()
    (tmp_path / "recnext_m1_without_distill_300e.txt").write_text(published(5, 1.0) + '{"train_lr": 0.0005, "tr')
    return tmp_path


def test_the_page_of_runs_tells_what_differs_and_what_was_left_out(runs, tmp_path, capsys):
    assert report.main([str(runs), "--out", str(tmp_path / "runs.html")]) == 0
    page = read_page(tmp_path / "runs.html")
    best = [row for row in page.rows if len(row) == 8 and row[0] != "run"]
    assert [row[:3] for row in best] == [["second <i>&", "75.00", "5"], ["first", "70.00", "5"], ["recnext_m1_without_distill_300e", "61.00", "4"]]
    assert [row for row in page.rows if row[0] == "lr"] == [["lr", "0.002", "0.001"]] and ["model", "recnext_m1"] in page.rows
    assert [row[0] for row in page.rows if row[0] == "output_dir"] == []
    rates = [row for row in page.rows if len(row) == 7 and row[0] == "first"]
    assert rates == [["first", "100", "100 - 100", "10.0", "1.0", "25.0", "25.0"]]
    for said in (
        "started 2 times: 2023-11-14 22:13, 2023-11-16 02:00 (UTC)",
        "2 lines of the log were set aside, as epochs 4-5 were trained again",
        "2 steps were left out, as their loss or gradients were not finite, in epoch 0",
        "3 times another image stood in for a damaged one in training, in epoch 0",
        "30 damaged training images",
        "and 10 more",
        "half-written last line left out",
        "commit second <i>&",
    ):
        assert said in page.text, said
    lines = [title for title in page.texts if title.startswith("recnext_m1_without_distill_300e, best 61 at epoch 4")]
    assert lines and len(page.all("polyline")) > 10
    assert ["second <i>&", "75.00", "5"] in [row[:3] for row in browsed(tmp_path / "runs.html", tmp_path).rows]


def test_one_run_is_held_against_the_defaults_and_a_published_log_has_nothing_beside_it(runs, tmp_path):
    for name in (runs / "first", runs / "recnext_m1_without_distill_300e.txt"):
        assert report.main([str(name), "--out", str(tmp_path / f"{name.stem}.html")]) == 0
    ours, theirs = (read_page(tmp_path / f"{name}.html") for name in ("first", "recnext_m1_without_distill_300e"))
    longer = (runs / "first" / "args.yaml").read_text().replace("epochs: 6", "epochs: 4")
    (runs / "first" / "args.yaml").write_text(longer)
    assert "6 epochs, 0 to 5." in run_page.run_page([str(runs / "first")])
    assert ["epochs", "300", "6"] in ours.rows and ["lr", "0.001"] in ours.rows and "6 of 6 epochs: finished" in ours.text
    assert "Environment" not in theirs.texts and "Rates and waits" not in theirs.texts and "5 epochs, 0 to 4." in theirs.text


def test_runs_of_other_tasks_have_their_own_measures_defaults_and_length(runs, tmp_path):
    detector, segmenter = tmp_path / "tasks" / "detector", tmp_path / "tasks" / "segmenter"
    for folder, task, settings, measures in (
        (detector, "detection", "epochs: 2\nmax_size: [1333, 800]\nlr: 0.1\n", [{"bbox_mAP": 0.3, "bbox_mAP_50": 0.5, "segm_mAP": -1}, {"bbox_mAP": 0.25}]),
        (segmenter, "segmentation", "iterations: 60\neval_interval: 20\nlr: 0.2\nscales: [0.5, 2.0]\n", [{"mIoU": 0.41}, {"mIoU": 0.425}]),
    ):
        folder.mkdir(parents=True)
        records = [{"epoch": epoch, "train_loss": 1.0, **measured} for epoch, measured in enumerate(measures)]
        (folder / "log.txt").write_text("".join(json.dumps(record) + "\n" for record in records))
        (folder / "train_log.txt").write_text("".join(json.dumps({"mode": "val"} | record) + "\n" for record in records))
        (folder / "args.yaml").write_text(f"# python -m {task} --config <this file> runs this again.\n{settings}")
    for name in (detector, segmenter, tmp_path / "tasks", tmp_path):
        assert report.main([str(name), "--out", str(tmp_path / f"{name.name}.html")]) == 0
    boxes, pixels, both, everything = (read_page(tmp_path / f"{name}.html") for name in ("detector", "segmenter", "tasks", tmp_path.name))
    assert ["detector", "30.00", "0", "25.00", "2"] in boxes.rows and "Box AP at half overlap, %" in boxes.texts and "Mask AP, %" not in boxes.texts
    assert ["segmenter", "42.50", "1", "42.50", "2"] in pixels.rows and "2 of 3 epochs: unfinished." in pixels.text
    assert ["max_size", "1333 800"] in boxes.rows and ["lr", "0.0002", "0.1"] in boxes.rows and ["scales", "0.5 2.0"] in pixels.rows
    assert ["lr", "0.1", "0.2"] in both.rows and ["scales", "-", "0.5 2.0"] in both.rows and "5 settings that only some of the runs have" in both.texts
    assert [row[0] for row in everything.rows if row[0] in ("second <i>&", "first", "detector", "segmenter")][:4] == [
        "second <i>&",
        "first",
        "detector",
        "segmenter",
    ]


def test_damaged_neighbours_of_a_log_are_told_and_wrong_names_refused(runs, tmp_path, capsys):
    (runs / "first" / "args.yaml").write_text("epochs: [1\n")
    assert "args.yaml is no YAML" in run_page.run_page([str(runs / "first")])
    (runs / "empty").mkdir()
    for argv, said in (
        ([str(runs / "empty")], "no log in this folder"),
        ([str(runs), "--out", "x.pdf"], "end the name in .html"),
        ([str(runs), "--out", str(runs / "no" / "x.html")], "there is no folder"),
    ):
        assert report.main(argv) == 1 and said in capsys.readouterr().err


def test_pages_of_many_runs_stay_small_and_one_run_shows_every_epoch(tmp_path):
    for i in range(30):
        (tmp_path / f"run_{i}.txt").write_text(published(300))
    many, one = (Page(run_page.run_page([str(name)])) for name in (tmp_path, tmp_path / "run_0.txt"))
    assert len(run_page.run_page([str(tmp_path)])) < 2_000_000
    assert len(many.all("polyline")) == 30 * 5 and len(one.all("polyline")) == 5 + 4  # all but the learning rate with each epoch, thin


def test_a_page_is_pictured_in_both_schemes(tmp_path, monkeypatch, capsys):
    (tmp_path / "page.html").write_text(pages.page("Title", ["Text."], []), encoding="utf-8")
    if find_chromium() is not None:
        for flags, is_light in (([], True), (["--dark"], False)):
            assert picture_page.main([str(tmp_path / "page.html"), "--size=300x500", f"--out={tmp_path / 'page.png'}", *flags]) == 0
            picture = Image.open(tmp_path / "page.png")
            assert picture.size == (500, 300) and (np.asarray(picture.convert("L")).mean() > 128) == is_light
    monkeypatch.setattr(browser, "NAMES", ("no-such-browser",))
    for argv, said in (
        ([str(tmp_path / "page.html"), "--out=x.png"], "no Chromium"),
        (["no.html", "--out=x.png"], "no such page"),
        (["a", "--out=b.jpg"], "is a PNG"),
    ):
        assert picture_page.main(argv) == 1 and said in capsys.readouterr().err
