import ast
import dataclasses
import inspect

import pytest
import yaml

from run import config, settings
from run.config import Config
from run.errors import InputError
from tests.conftest import ROOT, run_command

DIGITS = ["--data-set", "DIGITS"]
PUBLISHED = (
    "--batch-size 256 --epochs 300 --model recnext_m1 --input-size 224 --seed 0 --device cpu --output_dir x --start_epoch 0 --dist-eval "
    "--num_workers 10 --pin-mem --save_freq 1 --dist_url env:// --model-ema --model-ema-decay 0.99996 --model-ema-force-cpu --opt adamw --opt-eps "
    "1e-8 --opt-betas 0.9 0.99 --clip-grad 0.02 --clip-mode agc --momentum 0.9 --weight-decay 0.025 --sched cosine --lr 1e-3 --lr-noise 0.4 0.9 "
    "--lr-noise-pct 0.67 --lr-noise-std 1.0 --warmup-lr 1e-6 --min-lr 1e-5 --decay-epochs 30 --warmup-epochs 5 --cooldown-epochs 10 "
    "--patience-epochs 10 --decay-rate 0.1 --ThreeAugment --color-jitter 0.4 --smoothing 0.1 --train-interpolation bicubic --repeated-aug "
    "--reprob 0.25 --remode pixel --recount 1 --resplit --mixup 0.8 --cutmix 1.0 --cutmix-minmax 0.2 0.8 --mixup-prob 1.0 --mixup-switch-prob 0.5 "
    "--mixup-mode batch --teacher-model regnety_160 --teacher-path https://dl.fbaipublicfiles.com/deit/regnety_160-a5fe301d.pth "
    "--distillation-type hard --distillation-alpha 0.5 --distillation-tau 1.0 --set_bn_eval --data-path x --data-set IMNET --inat-category name "
    "--world_size 8 --deploy --local-rank 0 --project p "
)


def test_defaults_are_the_published_ones():
    cfg, _ = config.parse(["--data-path", "x"])
    expected = {
        "batch_size": 256, "epochs": 300, "model": "recnext_m1", "input_size": 224, "seed": 0, "model_ema": True, "model_ema_decay": 0.99996, "opt": "adamw",
        "opt_eps": 1e-8, "clip_grad": 0.02, "clip_mode": "agc", "momentum": 0.9, "weight_decay": 0.025, "sched": "cosine", "lr": 1e-3, "warmup_lr": 1e-6,
        "min_lr": 1e-5, "warmup_epochs": 5, "color_jitter": 0.4, "aa": "rand-m9-mstd0.5-inc1", "smoothing": 0.1, "repeated_aug": True, "reprob": 0.25,
        "remode": "pixel", "recount": 1, "mixup": 0.8, "cutmix": 1.0, "mixup_prob": 1.0, "mixup_switch_prob": 0.5, "mixup_mode": "batch",
        "teacher_model": "regnety_160", "distillation": "hard", "distillation_alpha": 0.5, "distillation_tau": 1.0, "data_set": "IMNET",
    }  # fmt: skip
    assert {name: getattr(cfg, name) for name in expected} == expected


@pytest.mark.parametrize(
    "spelling", [lambda flag: flag, lambda flag: flag[:2] + flag[2:].replace("-", "_"), lambda flag: flag[:2] + flag[2:].replace("_", "-")]
)
def test_every_published_flag_is_accepted_with_dashes_and_underscores(spelling):
    argv = [spelling(arg) if arg.startswith("--") else arg for arg in PUBLISHED.split()]
    cfg, notes = config.parse(argv)
    assert (cfg.lr_noise, cfg.three_augment, cfg.cutmix_minmax, cfg.set_bn_eval) == ((0.4, 0.9), True, (0.2, 0.8), True)
    assert [note.split()[0] for note in notes] == ["--dist-eval", "--deploy", "--dist-url", "--world-size", "--local-rank", "--resplit"]


def test_mixing_that_would_end_after_the_run_is_noted():
    flags = ["--data-path=x", "--epochs=5", "--mixup-off-epoch"]
    assert config.parse([*flags, "4"])[1] == [] and config.parse([*flags, "0"])[1] == []
    assert config.parse([*flags, "5"])[1] == ["--mixup-off-epoch 5 has no effect: the run ends with epoch 4"]


def test_every_setting_is_read_outside_of_config():
    """No dead flag: each field is an attribute that some other file reads from a `cfg`."""
    read = set()
    for path in [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] not in (".venv", "tests", "tools", "benchmarks")]:
        nodes = ast.walk(ast.parse(path.read_text()))
        read |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("cfg", "self.cfg")}
    read |= {node.attr for node in ast.walk(ast.parse(inspect.getsource(Config))) if isinstance(node, ast.Attribute)}  # through its properties
    assert [field.name for field in dataclasses.fields(Config) if field.name not in read] == []


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--epoch", "3"], ["--epoch", "did you mean --epochs"]),
        (["--batchsize", "3"], ["did you mean --batch-size"]),
        (["stray"], ["stray argument 'stray'"]),
        (["--batch-size", "x"], ["--batch-size", "'x' is not a whole number"]),
        (["--batch-size", "0"], ["--batch-size", "less than 1"]),
        (["--lr", "nan"], ["--lr", "not a finite number"]),
        (["--mixup-prob", "1.5"], ["--mixup-prob", "more than 1"]),
        (["--data-set", "FOO"], ["--data-set", "not one of IMNET"]),
        (["--data-set", "IMNET"], ["needs --data-path"]),
        ([*DIGITS, "--data-path", "x"], ["takes no --data-path"]),
        ([*DIGITS, "--batch-size", "5"], ["--batch-size 5 is odd", "--mixup 0"]),
        ([*DIGITS, "--mix-group-size", "5"], ["--mix-group-size 5 is odd"]),
        ([*DIGITS, "--eval"], ["--eval needs weights"]),
        ([*DIGITS, "--resume", "auto"], ["add --output_dir"]),
        ([*DIGITS, "--resume", "x", "--overwrite"], ["drop one of them"]),
        ([*DIGITS, "--use-ema"], ["--use-ema", "--eval --resume"]),
        ([*DIGITS, "--tta", "hflip"], ["--tta hflip", "add --eval"]),
        ([*DIGITS, "--report", "x"], ["--report", "needs --eval"]),
        ([*DIGITS, "--ThreeAugment", "--aa", "rand-m1"], ["--ThreeAugment replaces --aa"]),
        ([*DIGITS, "--finetune", "x", "--pretrained"], ["--finetune and --pretrained"]),
        ([*DIGITS, "--val-split", "0.1"], ["--val-split"]),
        ([*DIGITS, "--cutmix-minmax", "0.1"], ["--cutmix-minmax takes two"]),
        ([*DIGITS, "--cutmix-minmax", "0.8", "0.2"], ["smaller fraction first"]),
        ([*DIGITS, "--opt-betas", "0.9"], ["--opt-betas takes at least two"]),
        ([*DIGITS, "--lr-noise", "2", "5"], ["fractions from 0 to 1"]),
        ([*DIGITS, "--lr-noise", "0.9", "0.1"], ["earlier fraction first"]),
        ([*DIGITS, "--seed", "99999999999999999999"], ["--seed", "more than"]),
        ([*DIGITS, "--opt-kwargs", "eps=1", "lr=1"], ["--opt-kwargs cannot set eps, lr"]),
        ([*DIGITS, "--compile", "--sync-bn"], ["--compile --sync-bn", "drop one of them"]),
        ([*DIGITS, "--lr-base-scale", "sqrt"], ["--lr-base-scale", "--lr-base is scaled: add it"]),
        ([*DIGITS, "--lr-base", "0.1", "--lr=1e-3"], ["--lr beside --lr-base 0.1", "--lr-base none"]),
        ([*DIGITS, "--lr-cycle-limit", "2", "--sched", "step"], ["--sched step has no cycles"]),
        ([*DIGITS, "--lr-cycle-mul", "2"], ["add --lr-cycle-limit"]),
        ([*DIGITS, "--lr-cycle-limit", "99", "--lr-cycle-mul", "1e300"], ["--lr-cycle-limit 99 --lr-cycle-mul 1e+300", "never ends"]),
        ([*DIGITS, "--sched-on-updates", "--sched", "plateau"], ["drop --sched-on-updates"]),
        ([*DIGITS, "--warmup-steps", "5"], ["add --sched-on-updates"]),
        ([*DIGITS, "--bce-target-thresh", "0.2"], ["add --bce-loss"]),
        ([*DIGITS, "--distillation-type=none", "--mixup=0", "--cutmix=0", "--aug-splits=2", "--jsd-loss", "--bce-loss"], ["two losses for one run"]),
        ([*DIGITS, "--model-ema-warmup", "--no-model-ema"], ["--model-ema-warmup", "drop one of them"]),
        ([*DIGITS, "--layer-decay", "0"], ["--layer-decay", "not above 0"]),
        ([*DIGITS, "--output-dir="], ["--output-dir is empty"]),
        ([*DIGITS, "--model-kwargs", "num_classes=7"], ["--model-kwargs cannot set num_classes"]),
        ([*DIGITS, "--eval", "--finetune", "x"], ["--eval needs weights"]),
        (["--data-set", "CIFAR"], ["cifar-100-python/"]),
        ([*DIGITS, "--model-kwargs", "x"], ["key=value"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml", "No such file"]),
    ],
)
def test_bad_command_lines_are_refused_with_the_reason(argv, words):
    with pytest.raises(InputError) as error:
        config.parse(argv)
    assert [word for word in words if word not in str(error.value)] == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rate: 1", ["unknown setting 'learning_rate'"]),
        ("epoch: 1", ["unknown setting 'epoch'", "did you mean epochs"]),
        ("lr: fast", ["lr", "'fast' is not a number"]),
        ("repeated_aug: 3", ["repeated_aug", "not true or false"]),
        ("epochs: 1.5", ["epochs", "not a whole number"]),
        ("epochs: true", ["epochs", "not a whole number"]),
        ("- 1", ["holds no settings"]),
        ("a: [", ["is not YAML"]),
        ("batch-size: 4\nbatch_size: 4", ["given twice"]),
        ("epochs: 4\nepochs: 5", ["'epochs' is given twice"]),
        ("clip_grad: off", ["clip_grad", "write none"]),
        ("model_kwargs: [a]", ["model_kwargs", "not a mapping"]),
    ],
)
def test_bad_recipes_are_refused_with_the_reason(tmp_path, text, words):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        config.parse([*DIGITS, "--config", str(path)])
    assert [word for word in words if word not in str(error.value)] == []


def test_flags_override_the_recipe_and_the_recipe_the_defaults(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("lr: 5e-4\nepochs: 7\nThreeAugment: true\nclip-grad: null\n")  # YAML 1.1 reads 5e-4 as text
    cfg, _ = config.parse([*DIGITS, "--config", str(path), "--epochs", "9"])
    assert (cfg.lr, cfg.epochs, cfg.three_augment, cfg.clip_grad, cfg.batch_size) == (5e-4, 9, True, None, 256)


def test_model_kwargs_of_two_flags_add_up():
    cfg, _ = config.parse([*DIGITS, "--model-kwargs", "a=1", "--model_kwargs", "b=x"])
    assert cfg.model_kwargs == {"a": 1, "b": "x"}


def test_dumped_settings_read_back_the_same(tmp_path):
    cfg, _ = config.parse([*DIGITS, "--opt-betas", "0.8", "0.9", "--model-kwargs", "a=1", "b=[2, 3]", "--clip-grad", "none", "--amp"])
    path = tmp_path / "args.yaml"
    path.write_text(settings.dump(cfg))
    assert config.parse(["--config", str(path)])[0] == cfg
    assert set(yaml.safe_load(settings.dump(cfg))) == set(config.SETTINGS.fields)


def test_distillation_is_hard_by_default_and_none_for_fine_tuning():
    assert config.parse(DIGITS)[0].distillation == "hard"
    assert config.parse([*DIGITS, "--finetune", "x"])[0].distillation == "none"
    assert config.parse([*DIGITS, "--finetune", "x", "--distillation-type", "soft"])[0].distillation == "soft"


def test_help_needs_no_torch_and_names_every_flag():
    code = "import sys, main\ntry:\n main.main(['--help'])\nexcept SystemExit:\n assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    done = run_command("-c", code)
    assert done.returncode == 0, done.stderr
    assert [name for name in config.SETTINGS.fields if f"--{name.replace('_', '-')}" not in done.stdout] == []


def test_help_tells_every_default():
    parser = config.SETTINGS.build_parser()
    told = {action.dest: parser._get_formatter()._get_help_string(action) for action in parser._actions if action.dest in config.SETTINGS.fields}
    assert [name for name, text in told.items() if not text.endswith("]") and "default" not in text] == []
    assert told["layer_decay"].endswith("timm's [none]") and told["lr"].endswith(" [0.001]")
