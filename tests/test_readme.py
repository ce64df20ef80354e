"""The README's commands: each is read by the real parser; those that need no ImageNet run elsewhere in the suite or here."""

import re
import shlex

import pytest

from run import config
from tests.conftest import ROOT, run_command

README = (ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.strip().splitlines()]
COMMANDS += re.findall(r"\| `([^`]*dist_train[^`]*)` \|", README)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_name_what_exists_and_flags_that_parse(command):
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=\S+", word)]
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
        return
    if words[0] == "fd":
        return
    scripts = [word for word in words if re.fullmatch(r"[\w/]+\.(py|sh|sbatch)", word)]
    assert scripts and all((ROOT / script).is_file() for script in scripts)
    if scripts[0] in ("main.py", "dist_train.sh", "train.sbatch"):
        cfg, _ = config.parse(words[words.index(scripts[0]) + 1 :])
        assert cfg


def test_recipes_in_the_table_are_the_recipes():
    table = set(re.findall(r"`(\w+)`", README[README.index("| recipe | for |") : README.index("The learning rate is")]))
    assert table == {path.stem for path in (ROOT / "recipes").glob("*.yaml")}


def test_flags_in_the_text_exist():
    parser_flags = {flag for action in config.SETTINGS.build_parser()._actions for flag in action.option_strings}
    own = README[README.index("## Quick start") : README.index("`python flops.py -m all`")]
    flags = {flag.replace("_", "-") for flag in re.findall(r"(?<![\w-])--[a-z][\w-]+", own)}
    others = {"--nproc-per-node", "--use-env", "--nodes", "--gpus-per-node", "--archives", "--out"}
    others |= {
        "--forms",
        "--threads",
        "--accuracy",
        "--prepare-limit",
        "--scatter",
        "--plot",
        "--csv",
        "--out",
        "--model-name",
        "--checkpoint-path",
        "--data-dir",
        "--checkpoint",
        "--img-size",
        "--ckpt",
        "--verify",
        "--format",
        "--float16",
        "--float32",
        "--legacy",
        "--fused",
        "--distillation",
        "--repo-id",
        "--dry-run",
    }
    assert flags - parser_flags - others == set()


def test_digits_are_exported_and_counted(tmp_path):
    done = run_command("tools/export_digits.py", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert [len(list((tmp_path / part).rglob("*.jpg"))) for part in ("train", "val")] == [1437, 360]
    assert len(list((tmp_path / "train").iterdir())) == 10
