"""qadam on a GPU: is it right, and how fast is it? For a machine with torch and no network.

    python benches/gpu_check.py --wheel qadam.whl             # everything, in 9 minutes
    python benches/gpu_check.py --wheel qadam.whl --only peers bandwidth --out speed.json
    python benches/gpu_check.py --self-test                   # what can be run without a GPU

Installs the wheel into a temporary folder, and then runs, each in a process of its own, so that
none can take another down:

* ``equality``: the same bits as the CPU back end, over all dtypes, widths and bad inputs;
* ``graph``: a step captured in a CUDA graph and replayed with a changing lr;
* ``bandwidth``: a device-to-device copy, the ceiling for what follows;
* ``tests``: ``pytest -m cuda tests`` on the hardware;
* ``peers``: step times, interleaved with torch's fused AdamW and whatever else can be imported
  (``--extra`` installs wheels of it), as shares of a copy's bandwidth;
* ``sanitizer``: compute-sanitizer over a few small steps of each kind.

Everything, every sample included, goes into one JSON, which is written anew after each part. The
GPU's settings are read and never changed. The exit status is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SECTIONS = ("equality", "graph", "bandwidth", "tests", "peers", "sanitizer")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
PACKAGES = ("torch", "triton", "numpy", "pytest", "bitsandbytes", "torchao", "flashoptim")

DEVICE_SECONDS = 150.0
"""For the first look at the device: a fresh machine reads torch's gigabytes from disk then."""
LEAST_SECONDS = 45.0
"""What each part gets while there is that much; its share may be more."""


# Processes.


def run(
    command: list[str], seconds: float, log: Path, environment: dict[str, str] | None = None
) -> int | None:
    """Runs a command in the repository, output to ``log``; None if it took longer and was ended."""
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 - commands are made here
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def tail(log: Path, characters: int = 4000) -> str:
    """The end of a log."""
    return log.read_text(errors="replace")[-characters:] if log.exists() else ""


def output_of(program: str, *arguments: str) -> str | None:
    """What a program prints, or None where there is none or it fails."""
    path = shutil.which(program)
    if path is None:
        return None
    command = [path, *arguments]
    try:
        done = subprocess.run(  # noqa: S603 - commands are made here
            command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
        )
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


# Parts, and the time each gets.


@dataclass
class Outcome:
    """What became of a part."""

    status: str
    """``passed``, ``failed`` or ``skipped``."""
    failures: list[str] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)
    log: str = ""


@dataclass
class Part:
    """Something to run in a process of its own."""

    name: str
    section: str
    weight: float
    run: Callable[[float], Outcome]


def allowance(left: float, weight: float, weights: Iterable[float]) -> float:
    """Seconds for a part, when ``weights`` are those of all that are still to run, its own too."""
    return min(left, max(left * weight / sum(weights), LEAST_SECONDS))


@dataclass
class Setup:
    """Where things are, for parts."""

    folder: Path
    environment: dict[str, str]
    options: argparse.Namespace

    def log(self, name: str) -> Path:
        """A log for a part."""
        return self.folder / f"{name.replace(' ', '-')}.log"

    def child(self, name: str, seconds: float) -> Outcome:
        """Runs this script's job ``name`` and reads what it found."""
        out, log = self.folder / f"{name.replace(' ', '-')}.json", self.log(name)
        command = [sys.executable, str(HERE / "gpu_check.py"), "--job", name, "--out", str(out)]
        command += ["--seconds", str(0.9 * seconds), "--rounds", str(self.options.rounds)]
        command += ["--large", str(self.options.large)]
        code = run(command, seconds, log, self.environment)
        if code is None:
            return Outcome("failed", [f"took longer than {seconds:.0f} s"], log=tail(log))
        if code != 0 or not out.exists():
            return Outcome("failed", [f"ended with status {code}"], log=tail(log))
        result = json.loads(out.read_text())
        failures = result.pop("failures")
        if failures:
            return Outcome("failed", failures, result, tail(log))
        if "skipped" in result:
            return Outcome("skipped", [], result)
        return Outcome("passed", [], result)

    def tests(self, seconds: float) -> Outcome:
        """The tests of the CUDA path, on the hardware."""
        log = self.log("tests")
        command = [sys.executable, "-m", "pytest", "-m", "cuda", "-p", "no:cacheprovider", "tests"]
        code = run(command, seconds, log, self.environment)
        text = tail(log, 1 << 20)
        summary = pytest_summary(text)
        result = {"summary": summary, "exit_status": code}
        if code is None:
            return Outcome("failed", [f"took longer than {seconds:.0f} s"], result, tail(log))
        if code != 0 or " passed" not in summary:
            return Outcome("failed", [summary or f"status {code}"], result, tail(log))
        return Outcome("passed", [], result)

    def sanitizer(self, tool: str, seconds: float) -> Outcome:
        """compute-sanitizer over the small steps."""
        program = find_sanitizer()
        if program is None:
            return Outcome("skipped", result={"skipped": "compute-sanitizer is not installed"})
        command = [program, "--tool", tool, "--error-exitcode", "86"]
        if tool == "memcheck":
            command += ["--report-api-errors", "no"]  # torch probes; qadam checks each call
        if tool != "initcheck":  # which must see what torch's kernels initialise
            command += ["--kernel-name", "kernel_substring=qadam"]
        command += [sys.executable, str(HERE / "gpu_bits.py"), "cuda"]
        # Each tensor an allocation of its own: else what lies beside one is memory as well.
        environment = {**self.environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        log = self.log(f"sanitizer {tool}")
        code = run(command, seconds, log, environment)
        text = tail(log, 1 << 20)
        found = sanitizer_errors(text)
        result = {"errors": found, "exit_status": code}
        if code is None:
            return Outcome("failed", [f"took longer than {seconds:.0f} s"], result, tail(log))
        failures = []
        if found != 0:
            failures.append(f"{tool}: {'no summary' if found is None else f'{found} errors'}")
        if " 0 differences from the CPU" not in text:
            failures.append(f"{tool}: the steps did not end well")
        if code != 0 and not failures:
            failures.append(f"{tool}: ended with status {code}")
        return Outcome("failed" if failures else "passed", failures, result, tail(log))

    def parts(self, sections: Iterable[str]) -> list[Part]:
        """What to run, in this order: what is quick and says most comes first."""
        chosen = set(sections)
        all_parts = [
            self.job("equality", "equality", 12),
            self.job("graph", "graph", 4),
            self.job("bandwidth", "bandwidth", 4),
            Part("tests", "tests", 20, self.tests),
        ]
        cases = itertools.product((("large", 8), ("small", 8), ("gpt2", 12)), ("f32", "bf16"))
        all_parts += [self.job(f"peers {case} {d}", "peers", weight) for (case, weight), d in cases]
        for tool in TOOLS:
            watch = lambda seconds, tool=tool: self.sanitizer(tool, seconds)  # noqa: E731
            all_parts.append(Part(f"sanitizer {tool}", "sanitizer", 7, watch))
        return [part for part in all_parts if part.section in chosen]

    def job(self, name: str, section: str, weight: float) -> Part:
        """A part that is a job of this script."""
        return Part(name, section, weight, lambda seconds: self.child(name, seconds))


def pytest_summary(text: str) -> str:
    """The last line of pytest, such as ``12 passed, 1 skipped in 3.4s``."""
    pattern = r"^=*\s*((?:\d+ \w+|no tests ran)[^\n=]* in [\d.]+ ?s[^\n=]*?)\s*=*$"
    found = re.findall(pattern, text, re.MULTILINE)
    return str(found[-1]) if found else ""


def sanitizer_errors(text: str) -> int | None:
    """How many errors or hazards a sanitizer's summary counts; None without a summary."""
    found = re.findall(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", text)
    return sum(int(errors or hazards) for errors, hazards in found) if found else None


def find_sanitizer() -> str | None:
    """compute-sanitizer, on the PATH or where CUDA puts it."""
    places = [shutil.which("compute-sanitizer")]
    for pattern in ("cuda*/bin/compute-sanitizer", "cuda*/compute-sanitizer/compute-sanitizer"):
        places += [str(path) for path in sorted(Path("/usr/local").glob(pattern))]
    return next((place for place in places if place is not None), None)


# Jobs: what runs in the processes of its own.


def look_at_device() -> dict[str, Any]:
    """The device and the versions of everything; a failure without a device."""
    import torch

    import qadam

    versions = {"python": platform.python_version(), "qadam": qadam.__version__}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    result: dict[str, Any] = {
        "versions": {**versions, "cuda of torch": torch.version.cuda},
        "qadam_file": qadam.__file__,
        "cpu_backend": qadam.cpu_backend(),
        "host": {"machine": platform.machine(), "kernel": platform.release()},
        "threads": torch.get_num_threads(),
        "failures": [],
    }
    fields = "name,driver_version,memory.used,clocks.sm,clocks.mem,power.limit,temperature.gpu"
    result["nvidia_smi"] = output_of("nvidia-smi", f"--query-gpu={fields}", "--format=csv")
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    result["driver"] = driver.splitlines()[0] if driver else None
    if not torch.cuda.is_available():
        return {**result, "failures": ["torch finds no CUDA device"]}
    properties = torch.cuda.get_device_properties(0)
    torch.ones(1, device="cuda").add_(1).item()
    names = ("name", "total_memory", "multi_processor_count", "L2_cache_size")
    result |= {name: getattr(properties, name, None) for name in names}
    result["capability"] = list(torch.cuda.get_device_capability(0))
    result["free_memory"] = torch.cuda.mem_get_info()[0]
    if not qadam.cuda.is_available():
        result["failures"] = [f"qadam finds no CUDA device: {qadam.cuda.why_not()}"]
    return result


def job_equality(seconds: float) -> dict[str, Any]:
    """All configs, and tensors of more than 2^32 elements."""
    import gpu_bits
    import torch

    warnings.simplefilter("ignore")  # of gradients that are not finite
    huge = {}
    for bits in (8, 32):
        huge[bits] = gpu_bits.check_huge(bits)
        torch.cuda.empty_cache()
    result = gpu_bits.check_equality("cuda", time.monotonic() + 0.7 * seconds)
    for bits, row in huge.items():
        result["failures"] += row.pop("failures")
        result[f"more than 2^32 elements, {bits} bits"] = row
    return result


def do_job(options: argparse.Namespace) -> None:
    """Runs one job and writes what it found."""
    begin = time.monotonic()
    try:
        if options.job == "device":
            result = look_at_device()
        elif options.job == "equality":
            result = job_equality(options.seconds)
        elif options.job == "graph":
            import gpu_bits

            result = gpu_bits.check_graphs()
        elif options.job == "bandwidth":
            import gpu_speed

            sizes = tuple(gibibytes << 30 for gibibytes in (1, 2, 4, 8))
            result = gpu_speed.measure_bandwidth(gpu_speed.CudaMeter(), options.rounds, sizes)
        else:
            import gpu_speed

            _, case, dtype = options.job.split()
            meter, deadline = gpu_speed.CudaMeter(), begin + 0.9 * options.seconds
            rounds, large = options.rounds, options.large
            result = gpu_speed.measure_case(case, dtype, meter, rounds, deadline, large)
    except Exception as error:  # noqa: BLE001, RUF100 - whatever it is, it is recorded
        traceback.print_exc()
        result = {"failures": [f"{type(error).__name__}: {error}"[:1500]]}
    options.out.write_text(json.dumps(result))


# The report.


def slug(name: str) -> str:
    """A device's name as a part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def free_path(path: Path) -> Path:
    """``path``, or one with a number if there is such a file already."""
    others = (path.with_stem(f"{path.stem}-{number}") for number in range(2, 1000))
    return path if not path.exists() else next(other for other in others if not other.exists())


def table(report: dict[str, Any]) -> str:
    """The measurements: medians with minimum and maximum."""
    lines = []
    ceiling = report["parts"].get("bandwidth", {}).get("result", {}).get("best_bytes_per_second")
    if ceiling:
        lines += [f"device-to-device copy: {ceiling / 1e12:.3f} TB/s, bytes read and written", ""]
    for name, part in report["parts"].items():
        result = part["result"]
        if part["section"] != "peers" or "title" not in result:
            continue
        head = f"{result['title']}, {result['dtype']}"
        if "skipped" in result:
            lines += [f"{head}: skipped, {result['skipped']}", ""]
            continue
        lines += [f"{head} ({name}, {result['rounds']} rounds)"]
        columns = "kernels ms (min to max) of copy  x fused | idle ms  x fused | host us  temp MB"
        lines += [f"  {'':29}{columns}"]
        lines += [row_text(*item) for item in result["optimizers"].items()]
        for why in ("absent", "errors"):
            lines += [f"  {who:29}{why}: {text[:90]}" for who, text in result[why].items()]
        lines.append("")
    return "\n".join(lines)


def row_text(name: str, row: dict[str, Any]) -> str:
    """One line of the table."""
    kernels = {key: value * 1e3 for key, value in row["seconds"]["queued_device"].items()}
    times = f"{kernels['median']:9.3f} ({kernels['min']:.3f} to {kernels['max']:.3f})"
    share = f"{row['share_of_copy']:6.1%}" if "share_of_copy" in row else "      "
    ratios = row.get("ratio_to_fused", {})
    of = {key: f"{ratios[key]['median']:7.3f}" for key in ("queued_device", "wall") if ratios}
    idle, host = row["seconds"]["wall"]["median"] * 1e3, row["seconds"]["host"]["median"] * 1e6
    peak = row.get("peak_bytes_of_a_step")
    temporary = "" if peak is None else f"{peak / 1e6:8.1f}"
    first = f"  {name:28}{times:30} {share} {of.get('queued_device', ''):>7}"
    return f"{first} | {idle:8.3f} {of.get('wall', ''):>7} | {host:8.0f} {temporary}"


def has_failed(report: dict[str, Any]) -> bool:
    """Whether any part failed."""
    return any(part["status"] == "failed" for part in report["parts"].values())


def record(section: str, outcome: Outcome, seconds: float, allowed: float) -> dict[str, Any]:
    """A part as the report has it."""
    return {
        "section": section,
        "status": outcome.status,
        "seconds": round(seconds, 1),
        "allowed_seconds": round(allowed, 1),
        "failures": outcome.failures,
        "result": outcome.result,
        "log": outcome.log,
    }


def install(wheels: list[Path], site: Path, folder: Path) -> dict[str, str]:
    """Installs wheels one by one, so that each may fail alone; the errors of those that did."""
    errors = {}
    options = ["--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade", "--quiet"]
    for wheel in wheels:
        log = folder / f"pip-{wheel.name}.log"
        command = [sys.executable, "-m", "pip", "install", *options, "--target", str(site)]
        if run([*command, str(wheel.resolve())], 120, log) != 0:
            errors[wheel.name] = tail(log)
    return errors


def start_report(options: argparse.Namespace) -> dict[str, Any]:
    """What is known before anything has run."""
    report: dict[str, Any] = {
        "schema": 1,
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "arguments": {key: str(value) for key, value in sorted(vars(options).items())},
        "commit": options.commit or output_of("git", "rev-parse", "HEAD"),
        "changed_files": output_of("git", "status", "--porcelain"),
    }
    if options.wheel is not None:
        digest = hashlib.sha256(options.wheel.read_bytes()).hexdigest()
        report["wheel"] = {"name": options.wheel.name, "sha256": digest}
    return {**report, "parts": {}}


def run_parts(setup: Setup, report: dict[str, Any], write: Callable[[], None]) -> None:
    """Runs the parts within the time there is."""
    end = time.monotonic() + 60 * setup.options.minutes - setup.options.used
    pending = setup.parts(setup.options.only)
    while pending:
        begin = time.monotonic()
        part, left = pending[0], end - begin
        allowed = allowance(left, part.weight, [p.weight for p in pending])
        pending.pop(0)
        outcome = Outcome("failed", ["no time was left"]) if left < 15 else part.run(allowed)
        seconds = time.monotonic() - begin
        report["parts"][part.name] = record(part.section, outcome, seconds, allowed)
        reasons = [*outcome.failures[:3], *([outcome.result.get("skipped", "")])]
        reason = "; ".join(text for text in reasons if text)
        print(f"{part.name:20} {outcome.status:8} {seconds:6.1f} s  {reason[:300]}", flush=True)
        write()


def check(options: argparse.Namespace) -> int:
    """Runs what was asked for; the exit status."""
    begin = time.monotonic()
    report = start_report(options)
    with tempfile.TemporaryDirectory(prefix="qadam-gpu-") as name:
        folder = Path(name)
        site = folder / "site"
        environment = {k: v for k, v in os.environ.items() if not k.startswith("QADAM_")}
        given = [options.wheel] if options.wheel is not None else []
        report["not_installed"] = install([*given, *options.extra], site, folder)
        for wheel in given:
            if wheel.name in report["not_installed"]:
                print(report["not_installed"][wheel.name])
                return 1
        paths = [str(site), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        setup = Setup(folder, environment, options)

        look = setup.child("device", DEVICE_SECONDS)
        report["device"] = look.result
        where = look.result.get("qadam_file", "")
        if given and not Path(where).resolve().is_relative_to(site.resolve()):
            look = Outcome("failed", [*look.failures, f"qadam is {where!r}, not the wheel's"])
        seconds = time.monotonic() - begin
        report["parts"]["device"] = record("device", look, seconds, DEVICE_SECONDS)
        device = report["device"].get("name") or "none"
        path = f"gpu-{slug(device)}-{report['started'][:10]}.json"
        out = options.out or free_path(HERE / "results" / path)

        def write() -> None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(report, indent=1))

        write()
        print(f"{device}, driver {report['device'].get('driver')}, commit {report['commit']}")
        print(json.dumps({k: report["device"].get(k) for k in ("capability", "versions")}))
        for wheel_name, error in report["not_installed"].items():
            print(f"{wheel_name} was not installed: {error[-300:]}")
        if look.status == "failed":
            print("\n".join([*look.failures, look.log]))
            return 1
        options.used = time.monotonic() - begin
        run_parts(setup, report, write)
        write()
    print(f"\n{table(report)}\nwrote {out}")
    return 1 if has_failed(report) else 0


# The self-test.


class Expectations:
    """Collects what is not as it should be."""

    def __init__(self) -> None:
        self.unmet: list[str] = []

    def __call__(self, condition: bool, what: str) -> None:
        """Notes ``what`` unless ``condition``."""
        if not condition:
            self.unmet.append(what)


def self_test() -> int:
    """Whatever runs without a GPU; the exit status."""
    expect = Expectations()
    test_bookkeeping(expect)
    test_comparisons(expect)
    test_measuring(expect)
    print("\n".join(expect.unmet) if expect.unmet else "self-test passed")
    return 1 if expect.unmet else 0


def test_bookkeeping(expect: Expectations) -> None:
    """Reading others' output, names, time."""
    lines = {
        "===== 12 passed, 1 skipped, 3 deselected in 3.40s =====": "12 passed, 1 skipped",
        "1 failed, 2 passed in 61.00s (0:01:01)": "1 failed, 2 passed",
        "= 5 deselected in 0.01s =": "5 deselected",
        "no tests ran in 0.01s": "no tests ran",
        "Traceback": "",
    }
    for text, want in lines.items():
        expect(pytest_summary(f"x\n{text}\n").startswith(want), f"pytest_summary: {text}")
    race = "========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)"
    expect(sanitizer_errors("========= ERROR SUMMARY: 0 errors") == 0, "no errors")
    expect(sanitizer_errors("========= ERROR SUMMARY: 1 error") == 1, "one error")
    expect(sanitizer_errors(race) == 2, "two hazards")
    expect(sanitizer_errors("Device not supported") is None, "no summary")
    expect(slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3", "slug")
    expect(allowance(400, 1, [1, 1, 2]) == 100, "a share of the time")
    expect(allowance(60, 1, [1, 9]) == LEAST_SECONDS, "at least so much")
    expect(allowance(20, 1, [1, 9]) == 20, "no more than is left")
    options = parser().parse_args(["--only", "graph", "peers", "--minutes", "3"])
    parts = Setup(Path(), {}, options).parts(options.only)
    expect({part.section for part in parts} == {"graph", "peers"}, "sections chosen")


def test_comparisons(expect: Expectations) -> None:
    """Comparisons see a bit."""
    import gpu_bits
    import torch

    ones = torch.ones(300, dtype=torch.bfloat16)
    other = ones.clone()
    expect(gpu_bits.same_bits(ones, other), "the same bits")
    other.view(torch.int16)[299] ^= 1
    expect(not gpu_bits.same_bits(ones, other), "one bit")
    expect(not gpu_bits.same_bits(torch.tensor([0.0]), torch.tensor([-0.0])), "a sign of zero")
    expect(not gpu_bits.same_bits(ones, ones.view(torch.float16)), "a dtype")
    nans = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    expect(gpu_bits.same_bits(nans, nans.clone()), "NaNs are equal to themselves")
    expect(not gpu_bits.same_bits(nans[:1], nans[1:]), "payloads")
    keys = list(gpu_bits.state_differences({"a": ones, "b": 1}, {"a": other, "b": 1}))
    expect(keys == ["a"], "state")

    warnings.simplefilter("ignore")  # of gradients that are not finite
    result = gpu_bits.check_equality("cpu", time.monotonic() + 60, most=6)
    expect(result["failures"] == [] and result["checked"] == 6, f"equality: {result}")
    config = gpu_bits.Config(torch.float32, torch.bfloat16, 8, "AdamW", "ordinary")
    given = gpu_bits.inputs(config)
    sides = [gpu_bits.Side(config, given, "cpu") for _ in range(2)]
    for side in sides:
        side.step(0)
    expect(gpu_bits.side_differences(*sides) == [], "equal sides")
    sides[0].memories[-2][-1] = 0.0
    found = gpu_bits.side_differences(*sides)
    expect(len(found) == 1 and "beside" in found[0], f"a write beside a tensor: {found}")
    sides[0].step(1)
    expect(any("state" in what for what in gpu_bits.side_differences(*sides)), "a step more")


def test_measuring(expect: Expectations) -> None:
    """Byte counts; a small race on the CPU, its table and its JSON."""
    import contest
    import gpu_speed
    import torch

    counts = {(4, 4, 8): 28, (4, 4, 2.03125): 16.0625, (2, 2, 2.03125): 10.0625}
    counts |= {(2, 2, 8): 22, (2, 2, 4): 14}
    for sizes, want in counts.items():
        expect(contest.step_bytes(*sizes) == want, f"step_bytes{sizes}")
    expect(len(contest.gpt2_shapes()) == 148, "GPT-2's tensors")
    elements = sum(torch.Size(shape).numel() for shape in contest.gpt2_shapes())
    expect(elements == 124_439_808, "GPT-2's parameters")

    meter, deadline = gpu_speed.HostMeter(), time.monotonic() + 60
    names = gpu_speed.REQUIRED
    parts = {}
    for dtype in ("f32", "bf16"):
        case = gpu_speed.measure_case("large", dtype, meter, 4, deadline, 25_600, 1 << 16, names)
        expect(case["failures"] == [] and case["rounds"] == 4, f"a case: {case['errors']}")
        outcome = Outcome("passed", [], case)
        parts[f"peers large {dtype}"] = record("peers", outcome, 1, 2)
    bandwidth = gpu_speed.measure_bandwidth(meter, 3, (1 << 20,))
    expect(bandwidth["failures"] == [] and bandwidth["best_bytes_per_second"] > 0, "a copy")
    parts["bandwidth"] = {"section": "bandwidth", "status": "passed", "result": bandwidth}
    report: dict[str, Any] = {"parts": parts}
    text = table(report)
    expect(all(name in text for name in (*names, gpu_speed.COPY, "25,600")), f"a table:\n{text}")
    expect(json.loads(json.dumps(report)) == report, "JSON")
    expect(not has_failed(report), "nothing failed")
    print(text)

    arena = gpu_speed.Case([(600,)], torch.float32, meter)

    def lazy(params: list[Any], _: torch.dtype) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.0)

    def greedy(params: list[Any], _: torch.dtype) -> torch.optim.Optimizer:
        params[0].grad.add_(1)
        return torch.optim.AdamW(params)

    def slow(_: list[Any], __: torch.dtype) -> torch.optim.Optimizer:
        time.sleep(5)
        raise AssertionError

    arena.add("lazy", lazy, 10)
    arena.add("greedy", greedy, 10)
    arena.add("slow", slow, 0.2)
    arena.add("absent", contest.from_package(["qadam.nowhere"], "Adam"), 10)
    expect("moved only" in arena.errors["lazy"], "one that does not move")
    expect("gradients" in arena.errors["greedy"], "one that changes gradients")
    expect("longer" in arena.errors["slow"], "one that takes too long")
    expect("qadam.nowhere" in arena.absent["absent"], "one that is not there")


# The command line.


def parser() -> argparse.ArgumentParser:
    """What the command line takes."""
    made = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--wheel", type=Path, help="qadam's; without it, the one that is installed")
    made.add_argument("--extra", type=Path, nargs="+", default=[], help="other wheels to install")
    made.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    made.add_argument("--minutes", type=float, default=9.0, help="for everything together")
    made.add_argument("--rounds", type=int, default=51, help="as far as time allows")
    made.add_argument("--large", type=int, default=10**9, help="elements of the large tensor")
    made.add_argument("--out", type=Path, help="the JSON; default: in benches/results")
    made.add_argument("--commit", help="to record, where git cannot say")
    made.add_argument("--self-test", action="store_true", help="what needs no GPU")
    made.add_argument("--job", help=argparse.SUPPRESS)
    made.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    return made


def main() -> None:
    """Does what the command line says."""
    options = parser().parse_args()
    if options.job is not None:
        do_job(options)
    elif options.self_test:
        sys.exit(self_test())
    else:
        if options.wheel is not None and not options.wheel.is_file():
            sys.exit(f"there is no wheel {options.wheel}")
        sys.exit(check(options))


if __name__ == "__main__":
    main()
