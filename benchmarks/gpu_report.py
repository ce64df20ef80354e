"""The results of benchmarks/gpu.py as tables in benchmarks/RESULTS.md, in place of those that are there.

    python benchmarks/gpu_report.py gpu.jsonl

A table for which there is no result says "not measured". Cells are medians, with the lowest and highest round."""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from run.command import run_command
from run.errors import InputError

RESULTS = ROOT / "benchmarks" / "RESULTS.md"
HEADING = "## gpu.py"
START = "# Results of the benchmarks\n\nWhat each measures and how is in its header.\n"


def read(path: Path) -> list[dict]:
    """The results in the file, none where there is no file; a last line that was cut off is left out. InputError where it holds something else."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    results = []
    for i, line in enumerate(lines):
        try:
            results.append(json.loads(line))
        except ValueError as error:
            if i < len(lines) - 1:
                raise InputError(f"{path}, line {i + 1} is no result of benchmarks/gpu.py ({error}): run it again") from error
    return results


def spread(values: dict[str, float] | None, digits: int = 0) -> str:
    return f"{values['median']:.{digits}f} ({values['low']:.{digits}f} to {values['high']:.{digits}f})" if values else "-"


def verdict(one: dict) -> str:
    return {True: "yes", False: f"no: {one['error']}" if one.get("error") else "no", None: ""}[one.get("ok")]


def errors(one: dict) -> str:
    """How far a check's numbers are apart."""
    return ", ".join(f"{key} {one[key]:.1e}" for key in ("logits", "loss", "gradients", "difference") if key in one)


def check_row(one: dict) -> list[str]:
    seconds = ", ".join(f"{what} {float(value):.0f} s" for what, value in one.get("compile_s", {}).items())
    return [one["part"], one["name"], one.get("precision", ""), verdict(one), errors(one), seconds]


def step_row(one: dict) -> list[str]:
    sides = [one[side] for side in ("ours", "published")]
    return [
        one["name"], one["form"], str(one["batch_size"]), *(spread(side["ms"], 1) for side in sides), spread(one["ratio"], 2),
        *(f"{100 * side['rest']:.1f}" for side in sides), *(f"{side['peak_mib']:.0f}" for side in sides),
    ]  # fmt: skip


def rate_row(one: dict) -> list[str]:
    return [one.get("model", one["name"]), one.get("form", one["name"]), str(one["batch_size"]), spread(one["images_per_s"]), spread(one.get("ratio"), 2)]


def profile_row(one: dict) -> list[str]:
    top = ", ".join(f"{name} {ms:.2f}" for name, ms in list(one["top_ms"].items())[:5])
    return [one["name"], f"{one['step_ms']:.1f}", f"{100 * one['idle']:.0f}", str(one["num_kernels"]), top.replace("|", "/")]


def labels_row(one: dict) -> list[str]:
    return [one["name"], *(spread(one["ms"][side], 1) for side in ("online", "stored", "none")), spread(one["ratio"], 2)]


def mixer_row(one: dict) -> list[str]:
    return [one["name"], one["precision"], *(spread(one[key], 1) for key in ("forward_us", "forward", "both_us", "both"))]


Row = Callable[[dict], list[str]]
TABLES: list[tuple[str, tuple[str, ...], tuple[str, ...], Row, str]] = [  # title, parts, columns, row, the key that a figure of it has
    ("Checks", ("goldens", "ska", "batches", "runs"), ("part", "what", "precision", "holds", "apart by", "compiling"), check_row, "ok"),
    (
        "Training step",
        ("step", "compiled"),
        ("model", "form", "batch", "ours, ms", "published, ms", "ours / published", "rest, %", "published", "peak, MiB", "published"),
        step_row,
        "ours",
    ),
    ("Teacher", ("teacher",), ("model", "form", "batch", "images/s", ""), rate_row, "images_per_s"),
    ("Profile of one step", ("profile",), ("model", "ms", "idle, %", "kernels", "most of it, ms"), profile_row, "top_ms"),
    (
        "Token mixers, microseconds per image and times the least traffic's",
        ("mixers",),
        ("mixer", "precision", "forward", "/ least", "with backward", "/ least"),
        mixer_row,
        "both",
    ),
    ("Teacher's labels, ms per step", ("labels",), ("model", "online", "stored", "none", "online / stored"), labels_row, "ms"),
    ("Inference", ("inference",), ("model", "form", "batch", "images/s", "time / unfused eager"), rate_row, "images_per_s"),
]


def table(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [columns, ["---"] * len(columns), *rows])


def render(results: list[dict]) -> str:
    """The section of RESULTS.md."""
    here = next((one for one in results if one["part"] == "machine"), None)
    if here is None:
        head = f"{HEADING}\n\nNo GPU has been measured yet: `make gpu`, then `make gpu-report`."
    else:
        versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items())
        device = here["gpu"] or f"{here['cpu']} (a dry run: sizes are tiny, nothing is compiled)"
        head = f"{HEADING}, {here['date']}\n\n{device}; {versions}; commit {here['commit']}" + (
            f"\n\nLeft out: {here['left_out']}" if "left_out" in here else ""
        )
    sections = []
    for title, parts, columns, row, key in TABLES:
        own = [one for one in results if one["part"] in parts]
        rows = [row(one) for one in own if key in one]
        gaps = [f"{one['part']}, {one.get('form', one['name'])}: {one['error']}" for one in own if key not in one or (key != "ok" and one.get("ok") is False)]
        text = table(columns, rows) if rows else "not measured"
        sections.append(f"### {title}\n\n{text}" + "".join(f"\n\nLeft out: {gap}" for gap in gaps))
    return "\n\n".join([head, *sections]) + "\n"


def write(results: list[dict], path: Path) -> None:
    """Put the section into the file, in place of the one that is there, or at its end."""
    text = path.read_text(encoding="utf-8") if path.exists() else START
    section = render(results)
    replaced, count = re.subn(rf"^{re.escape(HEADING)}\b.*?(?=^## |\Z)", lambda _: section + "\n", text, flags=re.M | re.S)
    path.write_text((replaced if count else f"{text.rstrip()}\n\n{section}").rstrip() + "\n", encoding="utf-8")


def report(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("results", type=Path, nargs="?", default=ROOT / "gpu.jsonl", help="what gpu.py wrote [gpu.jsonl]")
    parser.add_argument("--into", type=Path, default=RESULTS, help="[benchmarks/RESULTS.md]")
    args = parser.parse_args(argv)
    write(read(args.results), args.into)


if __name__ == "__main__":
    sys.exit(run_command(report, sys.argv[1:]))
