"""Step times on the CPU: torch, qadam and its peers side by side, and memory's own speed.

    python benches/cpu.py                  # all cases, 1 thread and 2
    python benches/cpu.py --quick          # torch alone as a peer, 2 threads, cases a and c
    python benches/cpu.py --cases b --threads 2 --only torchao --rounds 5

Each case runs in a process of its own (``cpu_race.py``), where all contenders take turns. Reported
are medians over the rounds of the ratio to torch's fused AdamW in the same round, with the least
and the most, as absolute times drift on shared machines; and the bytes that a step takes in memory
for its duration. A peer that cannot be had is absent, with the reason. docs/performance.md explains
the columns.

Writes ``target/bench/cpu.json`` with every sample, and ``target/bench/cpu.png``. Exits with status
1 if a step failed a check, after naming it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from contest import BASELINE, ROOT, commit, spread, versions
from cpu_chart import draw
from cpu_race import CASES, CONTENDERS, Settings, last_lines

import qadam

sys.path.append(str(ROOT / "examples"))

OUT = ROOT / "target" / "bench"
QUICK = [name for name, c in CONTENDERS.items() if c.package is None and c.backend is None]
BUSY = 0.9
"""Where no stream uses a larger share of its threads' time, other programs had the rest."""
PAIRS = {
    "AVX2 by AVX-512": ("qadam.AdamW8bit, avx2", "qadam.AdamW8bit, avx512"),
    "by 1 thread": ("qadam.AdamW8bit", "qadam.AdamW8bit, 1 thread"),
    "ratio by dynamic": ("qadam.AdamW8bit, ratio", "qadam.AdamW8bit"),
}
"""Whose steps are compared with each other too."""


def environment(threads: int) -> dict[str, str]:
    """What a race runs in: every package's OpenMP is told the threads, and caches stay here."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",  # ninja
        "TORCH_EXTENSIONS_DIR": str(OUT / "extensions"),
        "TORCHINDUCTOR_CACHE_DIR": str(OUT / "inductor"),
        "DS_ACCELERATOR": "cpu",
    }


def run(settings: Settings) -> dict[str, Any]:
    """Measures one case; its ``error`` is set if the process did not live to tell."""
    command = [sys.executable, str(ROOT / "benches" / "cpu_race.py"), json.dumps(asdict(settings))]
    done = subprocess.run(  # noqa: S603 - the command is made here
        command, env=environment(settings.threads), capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        reason = f"status {done.returncode}: {last_lines(done.stderr)}"
        return {"case": settings.case, "threads": settings.threads, "error": reason}
    found: dict[str, Any] = json.loads(Path(settings.out).read_text())
    summarize(found)
    return found


def summarize(race: dict[str, Any]) -> None:
    """Adds to each row what its samples say; pairs beside each other; was the machine busy?"""
    rows = race["optimizers"]
    for row in rows.values():
        seconds, elements = row["seconds"], race["elements"]
        pairs = zip(seconds, row["baseline_seconds"], strict=True)
        row["ratio"] = spread([own / base for own, base in pairs])
        row["ns_per_param"] = spread([1e9 * s / elements for s in seconds])
        moved = row["step_bytes_per_param"] * elements
        row["gb_per_second"] = spread([moved / s / 1e9 for s in seconds])
        cores = [cpu / s for cpu, s in zip(row["cpu_seconds"], seconds, strict=True)]
        row["cores"] = statistics.median(cores)
    streams = [row["cores"] for name, row in rows.items() if name.startswith("stream")]
    # the shortest may wait for a thread to wake up; torch gives small tensors to one thread
    enough = BUSY * race["threads"]
    race["busy"] = race["case"] != "c" and max(streams, default=enough) < enough
    race["pairs"] = {
        title: by_round(*(rows[name] for name in pair))
        for title, pair in PAIRS.items()
        if all(name in rows for name in pair)
    }


def by_round(own: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """The ratio of two contenders' steps in the rounds that both were in."""
    seconds = dict(zip(other["rounds"], other["seconds"], strict=True))
    pairs = zip(own["rounds"], own["seconds"], strict=True)
    return spread([s / seconds[number] for number, s in pairs if number in seconds])


def table(race: dict[str, Any]) -> str:
    """A race as aligned text."""
    lines = [f"\n{race['case']}: {race.get('title', '')}, threads: {race['threads']}"]
    if "error" in race:
        return "\n".join([*lines, f"  failed: {race['error']}"])
    lines.append(
        f"  {'':34} {'median':>7} {'least':>7} {'most':>7} {'rounds':>6} {'ns':>7} {'GB/s':>6}"
        f" {'cores':>5} {'peak B':>7} {'state B':>7}"
    )
    for name, row in race["optimizers"].items():
        ratio = row["ratio"]
        lines.append(
            f"  {name:34} {ratio['median']:7.2f} {ratio['min']:7.2f} {ratio['max']:7.2f}"
            f" {len(row['rounds']):6} {row['ns_per_param']['median']:7.2f}"
            f" {row['gb_per_second']['median']:6.1f} {row['cores']:5.2f}"
            f" {cell(row.get('peak_bytes_per_param'))} {cell(row.get('state_bytes_per_param'))}"
        )
    for title, ratio in race["pairs"].items():
        spelled = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
        lines.append(f"  qadam.AdamW8bit, {title}: {spelled}")
    if race["busy"]:
        lines.append("  other programs took part of the cores: these figures mean little")
    lines += [f"  absent: {name}: {reason}" for name, reason in race["absent"].items()]
    lines += [f"  WRONG: {name}: {reason}" for name, reason in race["broken"].items()]
    return "\n".join(lines)


def cell(value: float | None) -> str:
    """Bytes a parameter, if there are any to tell."""
    return f"{'' if value is None else f'{value:.2f}':>7}"


def install_errors(path: Path) -> dict[str, str]:
    """What ``install_peers.py`` could not install, by package."""
    try:
        errors: dict[str, str] = json.loads(path.read_text())
    except OSError:
        return {}
    missing = [package for package, version in versions(errors).items() if version is None]
    return {package: error for package, error in errors.items() if package in missing}


def explain_absence(race: dict[str, Any], errors: dict[str, str]) -> None:
    """Says of peers that were not installed why they were not."""
    for name in race.get("absent", {}):
        error = errors.get(CONTENDERS[name].package or "")
        if error is not None:
            race["absent"][name] = f"not installed: {last_lines(error)}"


def chosen(only: list[str] | None, quick: bool) -> list[str]:
    """Contenders besides torch's fused AdamW."""
    names = QUICK if quick else list(CONTENDERS)
    return [
        name
        for name in names
        if name != BASELINE and (only is None or any(part in name for part in only))
    ]


def parser() -> argparse.ArgumentParser:
    """What the command line takes."""
    made = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--quick", action="store_true", help="torch and qadam; a and c; 2 threads")
    made.add_argument("--cases", nargs="+", choices=CASES)
    made.add_argument("--threads", nargs="+", type=int)
    made.add_argument("--only", nargs="+", metavar="PART", help="contenders by part of their name")
    made.add_argument("--rounds", type=int, default=Settings.rounds)
    made.add_argument("--elements", type=int, default=Settings.elements, help="of a large tensor")
    made.add_argument(
        "--budget", type=float, default=Settings.budget, help="seconds of a peer's steps in a case"
    )
    made.add_argument(
        "--limit", type=float, default=Settings.limit, help="seconds for a peer's first steps"
    )
    made.add_argument("--out", type=Path, default=OUT, help="the directory of the report")
    return made


def main() -> None:
    """Runs the cases, prints their tables and writes the samples and the chart."""
    from machine import machine  # of the examples

    options = parser().parse_args()
    cases = options.cases or (["a", "c"] if options.quick else list(CASES))
    threads = options.threads or ([2] if options.quick else [1, 2])
    errors = install_errors(OUT / "peers.json")
    report: dict[str, Any] = {
        "machine": machine(),
        "load": os.getloadavg(),
        "commit": commit(),
        "versions": versions(c.package for c in CONTENDERS.values()),
        "backend": qadam.cpu_backend(),
        "not_installed": errors,
        "arguments": sys.argv[1:],
        "races": [],
    }
    print("\n".join(f"{key}: {value}" for key, value in report.items() if value != []))
    options.out.mkdir(parents=True, exist_ok=True)
    for case in cases:
        for count in threads:
            with tempfile.NamedTemporaryFile(suffix=".json") as out:
                race = run(
                    Settings(
                        case=case,
                        threads=count,
                        out=out.name,
                        names=chosen(options.only, options.quick),
                        rounds=options.rounds,
                        elements=options.elements,
                        budget=options.budget,
                        limit=options.limit,
                    )
                )
            explain_absence(race, errors)
            report["races"].append(race)
            print(table(race), flush=True)
            (options.out / "cpu.json").write_text(json.dumps(report, indent=1))
    measured = [race for race in report["races"] if "error" not in race]
    if measured:
        draw(measured, options.out / "cpu.png")
    print(f"\nwrote {options.out / 'cpu.json'} and cpu.png")
    if any("error" in race or race["broken"] for race in report["races"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
