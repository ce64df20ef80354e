"""Everything that needs a GPU, checked and measured in ten minutes: what matters most first.

    make gpu                                    writes gpu.jsonl, a line per result as it comes
    make gpu-report                             its tables into benchmarks/RESULTS.md
    python benchmarks/gpu.py --parts runs       one part alone
    python benchmarks/gpu.py --dry              all of it on the CPU, with tiny sizes and nothing compiled: is the script sound?

Parts have processes of their own, so that none ends with another. Nothing is installed; where simplejpeg is missing, runs train through Pillow.
Exit status 1 where a check did not hold or a part failed."""

import argparse
import contextlib
import copy
import importlib.util
import itertools
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import numpy as np
import timm
import torch
import torchvision
from torch.nn.functional import cross_entropy

import datasets
import engine
import model
import utils
from benchmarks import distill, inference, mixers, step
from distillation import teacher
from loading import augment
from measuring import timing
from run import checkpoint, config, hardware
from run.command import run_command
from run.errors import InputError, first_line

FAMILIES = {
    "recnext_m0": "recnext_m0",
    "recnext_a0": "recnext_a0",
    "recnext_t": "recnext_t",
    "repnext_m0": "repnext_m0",
    "lsnet_t": "lsnet_t",
    "mlla_nano_recconv": "mlla_nano_recconv",
    "repvit_m0_6": "repvit_m0_6",
    "rexnetv1_1_0": "rexnetv1_1.0",
    "rexnetv1_lite_1_0": "rexnetv1_lite_1.0",
}
# Relative to the largest logit, to a gradient's largest norm. Twice and more what a CPU showed: at most 2e-6, 4e-2 (MLLA) and 3e-3 (MLLA) of the
# logits, 6e-5 of the loss and 5e-3 of the gradients (both LSNet, whose last maps are small).
LOGIT_BOUNDS = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.01}
GRADIENT_BOUND, LOSS_BOUND = 0.02, 5e-4  # float32
TRAJECTORY_BOUND = {"none": 0.02, "bf16": 0.1, "fp16": 0.05}  # of the loss of an epoch, relative to the CPU's in float32


class Out:
    """The file of results: one JSON object a line."""

    def __init__(self, path: Path, part: str):
        self.path, self.part = path, part

    def write(self, name: str, **values) -> None:
        """Append one result, so that it is there whatever comes next; `ok` among the values says whether a check held."""
        line = json.dumps({"part": self.part, "name": name, **values})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(line, flush=True)


def spread_of(values: list[float]) -> dict[str, float]:
    return vars(timing.spread(values))


# ---- (a) the networks' numbers


def golden_errors(name: str, golden, device: torch.device, precision: str) -> dict[str, float]:
    """How far a family's network is from its reference: logits, and in float32 the loss and the gradients' norms too."""
    from tests.golden.golden import golden_input, load_golden_weights

    net = model.create_model(name, distillation=any("dist" in key for key in golden["keys"]), drop_rate=0.0, drop_path_rate=0.0)
    net = load_golden_weights(net, skip=("rotations",)).to(device, memory_format=torch.channels_last).eval()
    logits, seed = torch.from_numpy(golden["logits"]), int(golden["x_seed"])
    images = golden_input(golden["x_shape"], seed, dtype=torch.float32).to(device, memory_format=torch.channels_last)
    dtype = getattr(torch, precision)
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=precision != "float32"):
        errors = {"logits": timing.relative_error(net(images), logits.to(device))}
    if precision == "float32":
        images = golden_input(golden["train_shape"], seed + 1, dtype=torch.float32).to(device, memory_format=torch.channels_last)
        outputs = net.train()(images)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        targets = torch.arange(len(outputs[0]), device=device) * 37 % 1000
        loss = sum(cross_entropy(one, targets) for one in outputs) / len(outputs)
        loss.backward()
        norms = {key: parameter.grad.norm().item() for key, parameter in net.named_parameters()}
        worst = max(abs(norms[key] - norm) for key, norm in zip(golden["grad_names"], golden["grad_norms"], strict=True))
        errors |= {"loss": abs(loss.item() - float(golden["train_loss"])), "gradients": worst / float(golden["grad_norms"].max())}
    return errors


def check_goldens(out: Out, args: argparse.Namespace) -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # float32 is to be float32 here
    families = dict(itertools.islice(FAMILIES.items(), 2 if args.dry else None))
    for precision, (name, stem) in itertools.product(LOGIT_BOUNDS, families.items()):
        errors = golden_errors(name, np.load(ROOT / "tests" / "golden" / "models" / f"{stem}.npz"), args.device, precision)
        bounds = {"logits": LOGIT_BOUNDS[precision], "loss": LOSS_BOUND, "gradients": GRADIENT_BOUND}
        out.write(name, precision=precision, ok=all(error <= bounds[key] for key, error in errors.items()), **errors)


def check_ska(out: Out, args: argparse.Namespace) -> None:
    """Triton's kernels against plain operators, forward and gradients."""
    if importlib.util.find_spec("triton") is None:
        out.write("Triton's SKA", ok=False, error="Triton is not installed")
        return
    env = {**os.environ, **({"TRITON_INTERPRET": "1"} if args.device.type == "cpu" else {})}
    done = subprocess.run([sys.executable, "-m", "tests.triton_check", args.device.type], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    out.write("Triton's SKA", ok=done.returncode == 0, error=(done.stderr.strip().splitlines() or [""])[-1])


# ---- (b) batches and runs


def loader_flags() -> list[str]:
    """How images are read here: through Pillow where the fast loader's packages are missing."""
    return [] if importlib.util.find_spec("simplejpeg") and importlib.util.find_spec("cv2") else ["--loader=reference"]


def check_batches(out: Out, args: argparse.Namespace) -> None:
    """uint8 finished on the device level by level, and whole batches on their way there, mixed, against the CPU's."""
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(4, 3, 16, 16)
    fill = torch.randn(2 * 3 * 25, generator=torch.Generator().manual_seed(0))
    erased = augment.Erased(torch.tensor([[0, 1, 2, 5, 5], [3, 9, 9, 5, 5]]), fill)
    here = augment.finish(levels, erased)
    there = augment.finish(levels.to(args.device), erased._replace(fill=fill.to(args.device))).cpu()
    out.write("uint8 finished on the device", ok=bool((here - there).abs().max() <= 1e-6), difference=(here - there).abs().max().item())
    flags = ["--data-set=DIGITS", "--input-size=32", "--batch-size=64", "--mix-group-size=64", "--num_workers=2", "--distillation-type=none", *loader_flags()]
    cfg, _ = config.parse(flags)
    images = datasets.open_images(cfg)[0]
    worst, num_batches = 0.0, 0
    loaders = [datasets.build_train_loader(cfg, images, utils.Rank(0, 1, 0, 1, device)) for device in (torch.device("cpu"), args.device)]
    mix = augment.build_mixing(cfg, loaders[0].plan, 10)
    for cpu_batch, batch in itertools.islice(zip(*(loader.batches(1) for loader in loaders), strict=True), 6):
        pairs = [mix(one.images, one.targets.to(one.images.device), 1, one.positions) for one in (cpu_batch, batch)]
        worst = max(worst, *((a - b.cpu()).abs().max().item() for a, b in zip(*pairs, strict=True)))
        num_batches += 1
    out.write("mixed batches", ok=worst <= 1e-5, difference=worst, num_batches=num_batches, loader=cfg.loader)


class Runs:
    """Short runs of main.py on handwritten digits, in one folder."""

    def __init__(self, folder: Path, args: argparse.Namespace):
        self.folder = folder
        num_epochs, name = (1, "resnet18") if args.dry else (3, "recnext_m0")
        tiny = ["--model-kwargs", "channels=[4,8,8,8]", "layers=[1,1,1,1]", "--memory-format=nchw"] if args.dry else []
        flags = ["main.py", "--data-set=DIGITS", f"--model={name}", *tiny, "--input-size=32", "--batch-size=64", "--mix-group-size=64", "--warmup-epochs=0"]
        self.flags = [*flags, f"--epochs={num_epochs}", "--lr=2e-3", "--model-ema-decay=0.9", "--num_workers=2", *loader_flags()]

    def command(self, name: str, *flags: str) -> list[str]:
        distillation = [] if any("distillation" in flag for flag in flags) else ["--distillation-type=none"]
        return [sys.executable, *self.flags, *distillation, *flags, f"--output_dir={self.folder / name}"]

    def run(self, name: str, *flags: str) -> str:
        """What the run said. InputError where it failed."""
        done = subprocess.run(self.command(name, *flags), cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise InputError(f"the run {name} ended with code {done.returncode} ({(done.stderr.strip().splitlines() or ['no word'])[-1]})")
        return done.stdout

    def losses(self, name: str) -> list[float]:
        records = [json.loads(line) for line in (self.folder / name / "log.txt").read_text().splitlines()]
        return [value for record in records for value in (record["train_loss"], record["test_loss"])]

    def killed(self, name: str, *flags: str) -> None:
        """Start the run, end it once it has saved inside an epoch, and have it go on."""
        process = subprocess.Popen(self.command(name, *flags), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        path, deadline = self.folder / name / "checkpoint_last.pth", time.monotonic() + 120
        saved = [0, 0]
        while process.poll() is None and saved == [0, 0] and time.monotonic() < deadline:
            time.sleep(0.05)
            with contextlib.suppress(OSError, InputError):
                saved = list(step_of(path))
        process.kill()
        process.wait()
        self.run(name, *flags, "--resume=auto")


def step_of(path: Path) -> tuple[int, int]:
    """Epoch to train next and steps done in it."""
    return checkpoint.position(str(path))


def distance(losses: list[float], reference: list[float]) -> float:
    """The largest relative difference of two trajectories."""
    return max(abs(a - b) / abs(b) for a, b in zip(losses, reference, strict=True))


def check_runs(out: Out, args: argparse.Namespace) -> None:
    device = f"--device={args.device.type}"
    with tempfile.TemporaryDirectory() as temporary:
        runs = Runs(Path(temporary), args)
        runs.run("cpu", "--device=cpu", "--amp=none")
        reference = runs.losses("cpu")
        for name, flags, amp in (
            ("float32", ["--amp=none"], "none"),
            ("bf16", ["--amp=bf16"], "bf16"),
            ("fp16", ["--amp=fp16"], "fp16"),
            ("compiled, float32", ["--amp=none", "--compile"], "none"),
            ("compiled, bf16", ["--amp=bf16", "--compile"], "bf16"),
        ):
            start = time.perf_counter()
            try:
                said = runs.run(name, device, *flags)
            except InputError as error:
                out.write(name, ok=False, error=str(error))
                continue
            found = distance(runs.losses(name), reference)
            compiled = re.findall(r"^compiled (.+) in ([\d.]+) s$", said, re.M)
            is_whole = args.dry or "--compile" not in flags or (len(compiled) == 3 and "in parts" not in said)
            out.write(
                name, ok=found <= TRAJECTORY_BOUND[amp] and is_whole, difference=found, bound=TRAJECTORY_BOUND[amp], losses=runs.losses(name),
                compile_s=dict(compiled), run_s=time.perf_counter() - start,
            )  # fmt: skip
        runs.killed("killed", device, "--amp=none", "--checkpoint-steps=2")
        found = distance(runs.losses("killed"), runs.losses("float32"))
        out.write("killed and resumed", ok=found <= 1e-3, difference=found)
        check_labels(out, runs, device)


def check_labels(out: Out, runs: Runs, device: str) -> None:
    """A run that stores its teacher's labels, and one that reads them."""
    weights = runs.folder / "teacher.pth"
    torch.manual_seed(0)
    torch.save({"model": timm.create_model("regnety_002", num_classes=10).state_dict()}, weights)
    flags = ["--distillation-type=hard", "--teacher-model=regnety_002", f"--teacher-path={weights}", "--teacher-min-acc1=0", "--amp=none"]
    labels = f"--teacher-labels={runs.folder / 'labels'}"
    runs.run("online", device, *flags, labels)
    runs.run("stored", device, *flags, labels, "--teacher-labels-mode=read")
    found = distance(runs.losses("stored"), runs.losses("online"))
    out.write("stored labels", ok=found <= 1e-3, difference=found)


# ---- (c) speed: the step, the teacher, where the time goes


def size_flags(args: argparse.Namespace) -> list[str]:
    batch, side = (4, 64) if args.dry else (256, 224)
    return [f"--batch-size={batch}", f"--input-size={side}", f"--device={args.device.type}"]


def pick(args: argparse.Namespace, *names: str) -> tuple[str, ...]:
    """The networks to measure: of many, one is enough to try the script."""
    return names[:1] if args.dry else names


def _step_row(out: Out, args: argparse.Namespace, name: str, *, label: str, flags: list[str]) -> None:
    rounds = ["--rounds=1", "--steps=1"] if args.dry else ["--rounds=5", "--steps=5"]
    settings = step.parse([*size_flags(args), *rounds, *flags])
    figures = step.compare(name, settings)
    sides = {side: {"ms": spread_of(one.step_ms), "rest": float(np.median(one.rest_shares)), "peak_mib": one.peak_mib} for side, one in figures.items()}
    out.write(name, form=label, batch_size=settings.batch_size, ratio=spread_of(step.ratios(figures)), **sides)


def measure_step(out: Out, args: argparse.Namespace) -> None:
    for name in pick(args, *step.NETWORKS):
        _step_row(out, args, name, label="eager", flags=[])


def measure_compiled_step(out: Out, args: argparse.Namespace) -> None:
    for name in pick(args, "recnext_m1", "recnext_t", "lsnet_t"):
        _step_row(out, args, name, label="compiled", flags=["--compile"])
    _step_row(out, args, "recnext_m1", label="teacher online", flags=["--teacher=online", *(["--teacher-model=regnety_002"] if args.dry else [])])


TEACHER_FORMS = {  # precision, channels-last, compiled
    "float32": ("float32", False, False),
    "float32 channels-last": ("float32", True, False),
    "bf16 channels-last": ("bfloat16", True, False),
    "fp16 NCHW": ("float16", False, False),
    "fp16 channels-last": ("float16", True, False),
    "fp16 channels-last compiled": ("float16", True, True),
}


@torch.inference_mode()
def measure_teacher(out: Out, args: argparse.Namespace) -> None:
    """Images per second of the teacher, folded, in its forms, which take turns."""
    name, batch_size, side = ("regnety_002", 2, 32) if args.dry else ("regnety_160", 256, 224)
    cfg, _ = config.parse(["--data-set=DIGITS", f"--teacher-model={name}", f"--input-size={side}"])
    net = teacher.folded(cfg, model.create_model(name, num_classes=1000).eval()).to(args.device)
    clock, calls = step.pick_clock(args.device), {}
    for form, (precision, is_last, is_compiled) in TEACHER_FORMS.items():
        layout = torch.channels_last if is_last else torch.contiguous_format
        one = copy.deepcopy(net).to(memory_format=layout)
        calls[form] = _teacher_call(torch.compile(one, dynamic=False) if is_compiled else one, getattr(torch, precision), layout, (batch_size, 3, side, side))
        try:
            calls[form](), calls[form]()
        except Exception as error:  # a compiler's, or a full memory: the others go on
            out.write(form, model=name, ok=False, error=first_line(error))
            del calls[form]
    rates = {form: [] for form in calls}
    for _ in range(1 if args.dry else 5):
        for form, call in calls.items():
            clock.sync()
            start = clock.now()
            for _ in range(3):
                call()
            clock.sync()
            rates[form].append(3 * batch_size / (clock.now() - start))
    for form, values in rates.items():
        out.write(form, model=name, batch_size=batch_size, images_per_s=spread_of(values))


def _teacher_call(net, dtype: torch.dtype, layout: torch.memory_format, shape: tuple[int, ...]):
    device = next(net.parameters()).device
    images = torch.randn(shape, device=device).contiguous(memory_format=layout)

    def call() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            net(images)

    return call


def profile_step(out: Out, args: argparse.Namespace) -> None:
    """Of one step: the kernels that take the most time, and for what share of it the device idles."""
    for name in pick(args, "recnext_m1", "recnext_t"):
        settings = step.parse(size_flags(args))
        with tempfile.TemporaryDirectory() as folder:
            side, sync = step.build_ours(step.build_task(name, settings), settings, folder), timing.synchroniser(args.device)
            for i in range(3):
                side.step(i)
            sync()
            activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if args.device.type == "cuda" else [])]
            with torch.profiler.profile(activities=activities) as profiler:
                start = time.perf_counter()
                side.step(3)
                sync()
                step_s = time.perf_counter() - start
        on_device = args.device.type == "cuda"
        kernels = [one for one in profiler.key_averages() if not on_device or one.device_type == torch.autograd.DeviceType.CUDA]
        times_ms = {one.key[:100]: (one.self_device_time_total if on_device else one.self_cpu_time_total) / 1e3 for one in kernels}
        top = sorted(times_ms.items(), key=lambda item: -item[1])[:12]
        busy = sum(times_ms.values()) / (1e3 * step_s)
        out.write(name, step_ms=1e3 * step_s, idle=max(0.0, 1 - busy), num_kernels=sum(one.count for one in kernels), top_ms=dict(top))


def measure_mixers(out: Out, args: argparse.Namespace) -> None:
    """Time of each token mixer over that of moving the least it must through memory."""
    for amp, name in itertools.product(("none", "bf16"), mixers.MIXERS):
        sizes = ["--batch-size=2", "--rounds=1", "--calls=1", "--copy-mib=4"] if args.dry else ["--batch-size=256", "--rounds=5", "--calls=20"]
        settings = mixers.parse([*sizes, f"--amp={amp}"])
        found = mixers.ratios(mixers.MIXERS[name], settings, args.device)
        out.write(name, precision=amp, **{key: spread_of(values) for key, values in found.items()})


# ---- (d) stored labels, inference


def measure_labels(out: Out, args: argparse.Namespace) -> None:
    rounds = ["--rounds=1", "--warm-up=0", "--steps=1", "--teacher-model=regnety_002"] if args.dry else ["--rounds=5", "--steps=3"]
    settings = distill.parse([*size_flags(args), *rounds])
    for name, beside in (("teacher beside the student", engine.beside), ("teacher before the student", lambda device, ask: engine.at_once(ask))):
        with mock.patch.object(engine, "beside", beside):
            rounds_s = distill.measure("recnext_m1", settings, utils.Rank(0, 1, 0, 1, args.device))
        ratio = [online / stored for online, stored in zip(rounds_s["online"], rounds_s["stored"], strict=True)]
        ms = {side: spread_of([1e3 * value for value in values]) for side, values in rounds_s.items()}
        out.write(f"recnext_m1, {name}", ms=ms, ratio=spread_of(ratio))


def measure_inference(out: Out, args: argparse.Namespace) -> None:
    sizes = ["--img-size=32", "--batch-size=2", "--rounds=1"] if args.dry else ["--batch-size=256", "--rounds=5"]
    names = ",".join(pick(args, "recnext_m1", "recnext_a1", "recnext_t"))
    _, cases = inference.measure(["-m", names, f"--device={args.device.type}", "--prepare-limit=90", *sizes], report=lambda text: None)
    ratios = inference.ratios(cases)
    for case in cases:
        key = case.trained.name, case.form
        if case.rounds_s:
            ratio = {"ratio": spread_of(ratios[key])} if key in ratios else {}
            out.write(case.trained.name, form=case.form, batch_size=case.batch_size, images_per_s=spread_of(timing.images_per_s(case)), **ratio)
        else:
            out.write(case.trained.name, form=case.form, ok=False, error=case.remark)


PARTS = {  # in the order of their worth, with the seconds that each may take
    "goldens": (check_goldens, 60),
    "ska": (check_ska, 60),
    "batches": (check_batches, 60),
    "runs": (check_runs, 240),
    "step": (measure_step, 180),
    "compiled": (measure_compiled_step, 200),
    "teacher": (measure_teacher, 90),
    "profile": (profile_step, 60),
    "mixers": (measure_mixers, 40),
    "labels": (measure_labels, 60),
    "inference": (measure_inference, 120),
}


# ---- all of it


def machine(device: torch.device) -> dict:
    """What the figures are of."""
    here = timing.describe_machine(device)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__, "torchvision": torchvision.__version__}
    return {**{key: here[key] for key in ("gpu", "cpu", "cores")}, "versions": versions | {"cuda": torch.version.cuda}, "commit": utils.checkout()}


def run_part(name: str, args: argparse.Namespace, limit_s: float) -> bool:
    """Run a part in a process of its own; whether it came to its end in time."""
    command = [sys.executable, __file__, "--only", name, f"--out={args.out}", *(["--dry"] if args.dry else [])]
    env = {**os.environ, **({"TORCH_COMPILE_DISABLE": "1"} if args.dry else {})}  # for a processor, it takes minutes a network
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=errors, start_new_session=True)
        try:
            code = process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):  # and what it started
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        errors.seek(0)
        last = (errors.read().strip().splitlines() or [""])[-1]
    if code != 0:
        Out(args.out, name).write("the whole part", ok=False, error=f"cut off after {limit_s:.0f} s" if code is None else f"code {code}: {last}")
    return code == 0


def check(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=ROOT / "gpu.jsonl", help="file of the results, begun anew [gpu.jsonl]")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to do, in the order of worth [all]")
    parser.add_argument("--limit", type=float, default=570, help="seconds for all of it [%(default)g]")
    parser.add_argument("--dry", action="store_true", help="on the CPU, with tiny sizes")
    parser.add_argument("--only", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.device = hardware.open_device("cpu" if args.dry else "cuda")
    if args.only:
        PARTS[args.only][0](Out(args.out, args.only), args)
        return
    start = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that no part goes on alone
    args.out.write_text("")
    has_fast = not loader_flags()
    note = {} if has_fast else {"left_out": "the fast loader: simplejpeg or OpenCV is missing, images are read through Pillow"}
    Out(args.out, "machine").write("machine", date=time.strftime("%Y-%m-%d", time.gmtime()), dry=args.dry, **machine(args.device), **note)
    for name in [name for name in PARTS if name in args.parts]:
        left_s = args.limit - (time.monotonic() - start)
        if left_s < 15:
            Out(args.out, name).write("the whole part", ok=False, error="no time was left")
            continue
        run_part(name, args, left_s if args.dry else min(left_s, PARTS[name][1]))
    lines = [json.loads(line) for line in args.out.read_text().splitlines()]
    bad = [f"{one['part']}: {one['name']}" for one in lines if one.get("ok") is False]
    print(f"{len(lines) - 1} results in {args.out}, {time.monotonic() - start:.0f} s")
    if bad:
        raise InputError(f"{len(bad)} do not hold: {'; '.join(bad)}")


if __name__ == "__main__":
    sys.exit(run_command(check, sys.argv[1:]))
