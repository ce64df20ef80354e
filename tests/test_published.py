"""docs/published.md: the authors' figures beside our parameters, which are counted here as flops.py counts them."""

import re

import pytest
import torch

import model
import utils
from measuring import operations
from tests.conftest import ROOT

TEXT = (ROOT / "docs" / "published.md").read_text(encoding="utf-8")
OTHER_FORM = "rec_convtrans_5x5_basic"  # the published count is not that form's
CLASSES = {"CIFAR-100": 100}


def rows() -> list[dict[str, str]]:
    """Every row of every table, by the names of its columns."""
    found = []
    for table in re.findall(r"(?:^\|.*\n)+", TEXT, re.M):
        head, _, *body = ([cell.strip() for cell in line.strip().strip("|").split("|")] for line in table.splitlines())
        found += [dict(zip(head, cells, strict=True)) for cells in body]
    return found


ROWS = rows()


def count(row: dict[str, str]) -> tuple[int, int]:
    """Parameters of the row's network as trained, and fused."""
    options = {key: row[key] for key in ("mixer", "attn_kernel") if key in row}
    with torch.device("meta"):
        net = model.create_model(row["model"], num_classes=CLASSES.get(row.get("data"), 1000), **options).eval()
        return operations.count_parameters(net), operations.count_parameters(utils.replace_batchnorm(net))


@pytest.mark.parametrize("name", sorted({row["model"] for row in ROWS}))
def test_parameters_are_counted_and_agree_with_the_published_ones(name):
    for row in (row for row in ROWS if row["model"] == name):
        num_trained, num_fused = count(row)
        assert row["parameters"] == f"{num_trained:,}", row
        published = row.get("published", "-")
        if published.endswith("M"):
            assert operations.agrees(num_fused / 1e6, published[:-1]), row
        elif published != "-":
            assert (published == row["parameters"]) == (row["mixer"] != OTHER_FORM), row


def test_figures_that_flops_py_compares_are_the_same_here():
    first = {}
    for row in ROWS:
        if "MACs" in row:
            first.setdefault(row["model"], (row["published"].rstrip("M"), row["MACs"].rstrip("G")))
    assert {name: first[name] for name in operations.PUBLISHED} == operations.PUBLISHED


def test_every_model_of_ours_that_was_published_has_a_row():
    """All but those that the seeds of the tables do not name: twins under another name, and networks built by an option."""
    unnamed = {"lsnet_t_distill", "lsnet_s_distill", "lsnet_b_distill", "rexnetv1", "rexnetv1_lite"}
    assert set(model.list_models()) - unnamed <= {row["model"] for row in ROWS}
    assert len(TEXT.splitlines()) < 150
