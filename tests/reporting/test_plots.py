"""Pictures: what is drawn, that every curve differs, that a page needs no network, what a table's cells mean."""

import itertools
import re
import sys

import pytest

from reporting import plots, scatter
from reporting.logs import Run
from reporting.scatter import Model
from run.errors import InputError
from tests.reporting.test_logs import record


def make_run(label: str, count: int, **more) -> Run:
    return Run(None, [record(epoch, 50 + 10 * epoch / count, train_loss=7 - epoch / count, **more) for epoch in range(count)], label=label)


RUNS = [make_run("first_run", 12), make_run("_odd $ name <b>", 9)]


def test_smoothing_is_a_centred_mean_whose_window_shrinks_evenly():
    points = [(0, 0.0), (1, 3.0), (2, 6.0), (3, 0.0), (4, 10.0)]
    assert plots.smooth(points, 3) == [(0, 0.0), (1, 3.0), (2, 3.0), (3, pytest.approx(16 / 3)), (4, 10.0)]
    assert plots.smooth(points, 1) == points
    assert plots.smooth([(epoch, float(epoch)) for epoch in range(20)], 9) == [(epoch, float(epoch)) for epoch in range(20)]


@pytest.mark.parametrize(("num_epochs", "window"), [(1, 3), (80, 3), (300, 9), (600, 19)])
def test_longer_runs_are_smoothed_more(num_epochs, window):
    assert plots._window(num_epochs) == window


def test_the_first_35_curves_differ_in_dashes_or_colour_and_neighbours_in_both():
    styles = [plots._style(position) for position in range(35)]
    assert len({style[:2] for style in styles}) == 35
    assert all(one[0] != two[0] and one[1] != two[1] and one[2] != two[2] for one, two in itertools.pairwise(styles))


def test_panels_show_what_the_logs_hold():
    titles = [[panel.title for panel in row] for row in plots._panels(RUNS)]
    assert titles == [["Top-1 accuracy, %", "Top-1 accuracy, %, last third"], ["Training loss", "Test loss", "Learning rate"]]
    with_ema = [*RUNS, make_run("ema", 5, test_ema_acc1=40.0)]
    assert plots._panels(with_ema)[0][2].title == "Top-1 accuracy of the EMA, %"
    assert plots._panels([Run(None, [{"epoch": 0, "train_loss": 1.0}])]) == [[plots.Panel("Training loss", "train_loss")]]


def test_the_fall_of_the_first_losses_does_not_squeeze_the_axis():
    run = Run(None, [{"epoch": epoch, "train_loss": 7.0 if epoch < 5 else 3.0 - epoch / 100} for epoch in range(100)])
    low, high = plots._limits([run], plots.Panel("Training loss", "train_loss"))
    assert 1.9 < low < 2.01 and 2.95 < high < 3.1


SIGNATURES = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}


@pytest.mark.parametrize("suffix", SIGNATURES)
def test_curves_for_print(tmp_path, suffix):
    out, again = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    for path in (out, again):
        plots.plot_curves([*RUNS, make_run("one epoch", 1, test_ema_acc1=3.0)], out=path, smooth_epochs=5)
    assert out.read_bytes().startswith(SIGNATURES[suffix])
    assert out.read_bytes() == again.read_bytes()


def test_curves_page_is_one_file_with_a_switch_per_run(tmp_path):
    out = tmp_path / "curves.html"
    plots.plot_curves(RUNS, out=out, smooth_epochs=5)
    text = out.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>") and "Plotly.newPlot" in text and len(text) > 1_000_000
    assert re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=|<link[^>]*\shref=", text) == []
    assert text.count('"showlegend":true') == 2
    assert "first_run (59.17)" in text and '"legendgroup":"1"' in text
    assert "<b>" not in text.partition("Plotly.newPlot")[2].partition("</script>")[0]


def test_nothing_to_plot_is_said(tmp_path):
    with pytest.raises(InputError, match="nothing to plot"):
        plots.plot_curves([Run(None, [{"epoch": 0}])], out=tmp_path / "a.png", smooth_epochs=1)


@pytest.mark.parametrize(("package", "suffix"), [("matplotlib", ".png"), ("plotly", ".html")])
def test_a_missing_package_is_named_with_its_cure(tmp_path, monkeypatch, package, suffix):
    for name in [name for name in sys.modules if name.partition(".")[0] == package] + [package]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=f"{package}: pip install -r requirements-plots.txt"):
        plots.plot_curves(RUNS, out=tmp_path / f"a{suffix}", smooth_epochs=1)


# --- accuracy against cost

MARKDOWN = """Some text | with a bar.

| model | top-1 | MACs | ms |  | model | top-1 | MACs | ms |
|---|---:|---|---|---|---|---|---|---|
| [net_m0](http://x) | **74.7** / 73.2 | 0.4G | 189 | | net_a0 | 75.0 / 73.6 | 400M | 1,177 |
| net_m1 | 79.2 | 0.9G | - | | net_a1 | 79.6 | 0.9G | 334 |

| model | other |
|---|---|
| x | 1 |
"""


def test_markdown_tables_are_read_also_where_they_stand_side_by_side(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(MARKDOWN)
    assert scatter.read_models(path, "macs", "Top-1") == [
        Model("net_m0", "net_m", 4e8, 74.7),
        Model("net_m1", "net_m", 9e8, 79.2),
        Model("net_a0", "net_a", 4e8, 75.0),
        Model("net_a1", "net_a", 9e8, 79.6),
    ]
    assert [model.x for model in scatter.read_models(path, "ms", "top-1")] == [189, 1177, 334]
    assert scatter.read_models(path, "other", "other") == [Model("x", "x", 1, 1)]


def test_csv_tables_name_families_themselves(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("ms,top1,model,family\n1.5,70,m0,one\n2,75,m1,one\n,80,m2,one\n3,81,t,two\n")
    models = scatter.read_models(path, "ms", "top1")
    assert models == [Model("m0", "one", 1.5, 70), Model("m1", "one", 2, 75), Model("t", "two", 3, 81)]
    assert list(scatter._families(models[::-1])) == ["two", "one"]


@pytest.mark.parametrize(
    ("cell", "number"),
    [
        ("74.7 / 73.2", 74.7),
        ("2.5M", 2.5e6),
        ("0.4 G", 4e8),
        ("1,487", 1487),
        ("~12 ms", 12),
        ("5 MiB", 5),
        ("-3e-2", -0.03),
        ("", None),
        ("-", None),
        (".5k", 500),
    ],
)
def test_numbers_in_cells(cell, number):
    assert scatter.read_number(cell) == number


@pytest.mark.parametrize(
    ("label", "family"),
    [("recnext_m3", "recnext_m"), ("repvit_m0_9", "repvit_m"), ("lsnet_t", "lsnet"), ("resnet50", "resnet"), ("mobileone", "mobileone"), ("42", "42")],
)
def test_family_is_the_name_without_its_size(label, family):
    assert scatter.family_of(label) == family


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "no table with columns 'x' and 'y'; there are: a, b"),
        ("x,y\n-,2\n", "no row has a number in both"),
        ("", "there are: none"),
        (None, "name a CSV file"),
    ],
)
def test_tables_that_do_not_fit_are_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "t.csv").write_text(text)
    with pytest.raises(InputError, match=re.escape(message)):
        scatter.read_models(tmp_path / "t.csv", "x", "y")


@pytest.mark.parametrize("suffix", [".png", ".svg", ".html"])
def test_scatter_is_drawn(tmp_path, suffix):
    path, out = tmp_path / "t.md", tmp_path / f"s{suffix}"
    path.write_text(MARKDOWN)
    scatter.plot_scatter(path, "MACs", "top-1", out=out)
    assert out.stat().st_size > 5000
    if suffix == ".html":
        text = out.read_text(encoding="utf-8")
        assert "net_m" in text and "top-1 against MACs" in text


def test_labels_keep_off_points_and_each_other():
    """Two points at one place: the names still lie apart, inside the frame."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    axes = figure.add_subplot()
    families = {"a": [Model("name_one", "a", 1.0, 1.0), Model("end", "a", 2.0, 2.0)], "b": [Model("name_two", "b", 1.0, 1.0)]}
    for members in families.values():
        axes.plot([model.x for model in members], [model.y for model in members])
    axes.margins(0.2)
    scatter._label_points(figure, axes, families)
    boxes = {text.get_text(): text.get_window_extent() for text in axes.texts if text.get_text()}
    assert sorted(boxes) == ["end", "name_one", "name_two"]
    assert not boxes["name_one"].overlaps(boxes["name_two"])
    assert all(axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 for box in boxes.values())


@pytest.mark.parametrize(("low", "high", "ticks"), [(3, 40, [2, 5, 10, 20, 50, 100])])
def test_round_numbers_for_a_logarithmic_axis(low, high, ticks):
    assert scatter._round_numbers(low, high) == pytest.approx(ticks)


@pytest.mark.parametrize(("value", "text"), [(500, "500"), (5e8, "500M"), (1e9, "1G"), (2e5, "200k")])
def test_short_numbers(value, text):
    assert scatter._short(value) == text
