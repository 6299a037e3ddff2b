"""Installs the optimizers that ``cpu.py`` compares with, each by itself, from PyPI.

    target/bench/venv/bin/python benches/install_peers.py     # `make bench` does this

A package that will not install is no failure: the last lines of its error go into
``target/bench/peers.json``, and the report repeats them. What is installed already (torch, above
all) stays as it is, so that no peer changes what the others are measured beside.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path

OUT = Path(__file__).resolve().parents[1] / "target" / "bench" / "peers.json"
"""Errors by package."""
PEERS: dict[str, tuple[str, ...]] = {
    "bitsandbytes": (),
    "torchao": (),
    "deepspeed": ("--no-build-isolation",),  # its setup.py imports torch
}
"""Packages, and what pip has to be told for them."""
LAST_LINES = 12


def installed() -> str:
    """This environment, as constraints for pip."""
    found = importlib.metadata.distributions()
    return "\n".join(sorted({f"{d.metadata['Name']}=={d.version}" for d in found}))


def install(package: str, options: tuple[str, ...]) -> str | None:
    """Installs one; the end of what pip said if that did not work."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write(installed())
        constraints.flush()
        command = [sys.executable, "-m", "pip", "install", "--quiet", *options]
        command += ["--constraint", constraints.name, package]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode == 0:
        return None
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return "\n".join(lines[-LAST_LINES:])


def main() -> None:
    """Installs all, and writes down what went wrong."""
    errors = {}
    for package, options in PEERS.items():
        error = install(package, options)
        if error is not None:
            print(f"{package}: not installed\n{error}", file=sys.stderr)
            errors[package] = error
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(errors, indent=1))


if __name__ == "__main__":
    main()
