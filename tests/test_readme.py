"""README and docs: every command is read by its own parser, those of a whole project are run, and what is named, linked and drawn is there."""

import argparse
import ast
import importlib
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

import compare_logs
import datasets
import detection.config
import export_onnx
import main
import segmentation.config
from run import config, process
from sources.sets import load_digits
from tests.conftest import ROOT, run_command
from tools import inspect_teacher_labels

README = (ROOT / "README.md").read_text()
TEXTS = {"README.md": README} | {f"docs/{path.name}": path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
FENCED = [line for text in TEXTS.values() for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.strip().splitlines()]
INLINE = [command for text in TEXTS.values() for command in re.findall(r"`((?:[A-Z_]+=\S+ )*(?:python|bash|make) [^`]+)`", text)]
PICTURES = [(name, *found) for name, text in TEXTS.items() for found in re.findall(r"!\[.+\]\((.+)\)\n\n(.+)", text)]
FILES = [path for pattern in ("*.py", "[!.]*/*.py") for path in ROOT.glob(pattern) if path.parent.name != "tests"]


class FlagsRead(BaseException):
    """A command's flags have been read; nothing else of it is to happen."""


@pytest.fixture
def read_flags(monkeypatch):
    """Start a file of the project as a command, with these arguments, and stop it once it has read them."""
    parse_args = argparse.ArgumentParser.parse_args

    def stop(*_, **__):
        raise FlagsRead

    def parse_and_stop(self, *args):
        parse_args(self, *args)
        stop()

    def read(script: str, argv: list[str]) -> None:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [script, *argv])
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        monkeypatch.setattr(process, "start_process", stop)  # after main.py's settings
        with pytest.raises(FlagsRead):
            runpy.run_path(script, run_name="__main__")

    return read


TASK = re.compile(r"-m (detection|segmentation)\b|bash (detection|segmentation)/[\w/]+\.sh")  # what runs one, itself or through its scripts


def task_flags(words: list[str]) -> list[str]:
    """The flags that a command of detection or segmentation reads, which its scripts hand on."""
    if "-m" in words:
        return words[words.index("-m") + 2 :]
    assert (ROOT / words[1]).is_file()
    config, *rest = words[2:]
    return ["--config", config, *(["--resume", rest[0], *rest[2:]] if words[1].endswith("dist_test.sh") else rest[1:])]


@pytest.mark.parametrize("command", dict.fromkeys(FENCED + INLINE))
def test_commands_name_what_exists_and_flags_that_parse(command, read_flags):
    words = [word for word in shlex.split(command.removesuffix(" ...")) if not re.fullmatch(r"[A-Z_]+=\S+", word)]
    for word in words:
        if word.startswith(("recipes/", "logs/", "docs/", "tests/")):
            assert (ROOT / word).exists(), word
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
    elif words[:2] == ["python", "-c"]:
        compile(words[2], command, "exec")
    elif TASK.search(command):
        task, argv = TASK.search(command)[1] or TASK.search(command)[2], task_flags(words)
        importlib.import_module(f"{task}.config").parse(argv)
    elif words[0] not in ("source", "fd") and words[:3] != ["python", "-m", "pytest"]:
        place, script = next((place, word) for place, word in enumerate(words) if re.fullmatch(r"[\w/]+\.(py|sh|sbatch)", word))
        argv = words[place + 1 : words.index(">") if ">" in words else None]
        assert (ROOT / script).is_file()
        if argv != ["--help"] and not command.endswith(" ..."):
            read_flags(script if script.endswith(".py") else "main.py", argv)


def test_the_five_commands_of_a_project_run(tmp_path, capsys, monkeypatch):
    """As they are written, but for the folders, the length of the runs and a fifth of the training images."""
    train_images, val_images = load_digits()
    monkeypatch.setattr(datasets, "load_digits", lambda: (train_images.part(range(288)), val_images))
    section = README[README.index("## A whole project in five commands") :]
    commands = re.search(r"```bash\n(.*?)```", section, re.S)[1].strip().splitlines()
    outs = []
    for command in commands:
        _, script, *argv = shlex.split(command.replace("checkpoints/digits", str(tmp_path)).replace("pretrain/", f"{tmp_path}/"))
        short = ["--epochs=1", "--teacher-min-acc1=0"] if "--output_dir" in argv else []
        short += ["--num_workers=0", "--device=cpu"] if script == "main.py" else []
        run = {"main.py": main.main, "export_onnx.py": export_onnx.run, "compare_logs.py": compare_logs.main}[script]
        assert not run([*argv, *short])
        outs.append(capsys.readouterr().out)
    assert len(commands) == 5 and "Accuracy of the network on the 360 test images" in outs[2] and (tmp_path / "student.onnx").is_file()
    assert {"teacher", "student"} <= {line.split()[0] for line in outs[4].splitlines()}
    assert inspect_teacher_labels.main([str(tmp_path / "labels")]) == 0


def test_no_command_stands_twice():
    assert len(set(FENCED)) == len(FENCED)


def test_texts_are_short():
    assert len(README.splitlines()) <= 150
    assert [name for name, text in TEXTS.items() if len(text.splitlines()) >= 150] in ([], ["README.md"])


@pytest.mark.parametrize("name", TEXTS)
def test_links_and_names_of_files_lead_somewhere(name):
    folder = (ROOT / name).parent
    for link in re.findall(r"\]\(([^)#]+)\)", TEXTS[name]):
        assert link.startswith("https://") or (folder / link).exists(), link
    for file in re.findall(r"`([\w/]+\.(?:py|sh|sbatch|md))`", TEXTS[name]):
        assert (ROOT / file).is_file() or list(ROOT.glob(f"*/{file}")), file


def test_every_picture_stands_above_the_command_that_draws_it():
    for name, picture, caption in PICTURES:
        path = ((ROOT / name).parent / picture).relative_to(ROOT)
        assert (ROOT / path).stat().st_size < 300_000, path
        assert re.search(rf"`python [^`]*--(plot|out) {path}`", caption), path
    drawn = {Path(picture).name for _, picture, _ in PICTURES}
    assert drawn == {path.name for path in (ROOT / "docs").iterdir() if path.suffix in (".png", ".svg")} and len(drawn) == len(PICTURES)


def words_in(picture: Path) -> set[str]:
    """What is written in an SVG of matplotlib's, which notes beside the outlines of letters what they say; without numbers."""
    return {text for text in re.findall(r"<!-- (.*?) -->", picture.read_text()) if re.search(r"[a-z]", text)}


@pytest.mark.parametrize(("picture", "caption"), [(picture, caption) for _, picture, caption in PICTURES if picture.endswith(".svg")])
def test_pictures_are_what_their_commands_draw(picture, caption, tmp_path):
    command = shlex.split(re.search(r"`python ([^`]+)`", caption)[1])
    done = run_command(*command[:-1], str(tmp_path / "drawn.svg"))
    assert done.returncode == 0, done.stderr
    assert words_in(tmp_path / "drawn.svg") == words_in(ROOT / command[-1]) != set()


def test_readme_says_where_everything_is():
    commands = {path.name for pattern in ("*.py", "*.sh", "*.sbatch") for path in ROOT.glob(pattern)}
    packages = {f"{path.parent.name}/" for path in ROOT.glob("[!.]*/*.py")} | {"recipes/", "logs/"}
    tables = README[README.index("## Where to read on") :]
    assert [name for name in sorted(commands | packages) if f"`{name}`" not in tables] == []


def test_readme_leads_to_the_lines_that_decide():
    steps = re.findall(r"^- (.+)$", README[README.index("For example:") :], re.M)
    assert len(steps) == 3
    for step in steps:
        for part in re.findall(r".+?\]\(.+?\)", step):
            tree = ast.parse((ROOT / re.search(r"\]\((.+)\)", part)[1]).read_text())
            defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
            names = set(re.findall(r"`(\w+)`", part))
            assert names and names <= defined, part


def test_recipes_in_the_table_are_the_recipes():
    text = TEXTS["docs/running.md"]
    table = text[text.index("| recipe | for |") :].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", table)) == {path.stem for path in (ROOT / "recipes").glob("*.yaml")}


def declared_flags() -> set[str]:
    """Every flag of every command, as words joined by `-`: what are settings of a run, and what is handed to a parser or to `spellings`."""
    settings = (config.SETTINGS, detection.config.SETTINGS, segmentation.config.SETTINGS)
    flags = {flag for one in settings for action in one.build_parser()._actions for flag in action.option_strings}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("add_argument", "_add", "spellings", "build_parser"):
                texts = [inner.value for inner in ast.walk(node) if isinstance(inner, ast.Constant) and isinstance(inner.value, str)]
                flags |= {f"--{text.removeprefix('--').replace('_', '-')}" for text in texts if re.fullmatch(r"[\w-]+", text)}
    return flags


def test_flags_in_the_texts_exist():
    flags = {flag.replace("_", "-") for text in TEXTS.values() for flag in re.findall(r"(?<![\w-])--[a-z][\w-]+", text)}
    launchers = {"--no-deps", "--nproc-per-node", "--max-restarts", "--use-env", "--nodes", "--gpus-per-node"}  # others' commands
    assert flags - declared_flags() - launchers - {"--epochs"} == set()


def test_digits_are_exported_and_counted(tmp_path):
    done = run_command("tools/export_digits.py", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert [len(list((tmp_path / part).rglob("*.jpg"))) for part in ("train", "val")] == [1437, 360]
    assert len(list((tmp_path / "train").iterdir())) == 10
