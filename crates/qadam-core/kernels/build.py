#!/usr/bin/env python3
"""Compile the CUDA sources to the PTX that is committed; needs no GPU and no CUDA.

usage: build.py [--check]

NVRTC and ptxas come from PyPI, pinned, into target/nvidia. --check writes nothing: it compares
with what is committed, then assembles every file for the architectures it serves and fails on
spilled registers and stack frames.
"""

import ctypes
import difflib
import pathlib
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[3]
CORE = ROOT / "crates/qadam-core/kernels"
SOFTGPU = ROOT / "crates/softgpu/tests"
SITE = ROOT / "target/nvidia"

# NVRTC 12.0 writes PTX 8.0, which every driver from 525 on loads. The assembler is the newest that
# knows both sm_75 and the latest GPUs.
WHEELS = [
    "nvidia-cuda-nvrtc-cu12==12.0.140",
    "nvidia-cuda-runtime-cu12==12.0.146",
    "nvidia-cuda-nvcc-cu12==12.9.86",
]
OPTIONS = [
    "--std=c++17",
    "--fmad=false",
    "--ftz=false",
    "--prec-div=true",
    "--prec-sqrt=true",
    "--device-as-default-execution-space",
]
TARGETS = (75, 80)


class File(NamedTuple):
    """A PTX file."""

    source: pathlib.Path
    target: int
    path: pathlib.Path
    ships: bool


def files() -> list[File]:
    """What is shipped, and what softgpu is tested with."""
    found = [
        File(CORE / "adam.cu", target, CORE / f"ptx/qadam_sm_{target}.ptx", True)
        for target in TARGETS
    ]
    for source in sorted((SOFTGPU / "kernels").glob("*.cu")):
        for target in TARGETS:
            path = SOFTGPU / f"ptx/{source.stem}.sm_{target}.ptx"
            found.append(File(source, target, path, False))
    return found


def install() -> None:
    """Fetches the wheels, once."""
    stamp = SITE / "stamp"
    if stamp.exists() and stamp.read_text() == "\n".join(WHEELS):
        return
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
    subprocess.run([*pip, "--target", SITE, *WHEELS], check=True)
    stamp.write_text("\n".join(WHEELS))


def load_nvrtc() -> ctypes.CDLL:
    """The compiler."""
    folder = SITE / "nvidia/cuda_nvrtc/lib"
    ctypes.CDLL(str(folder / "libnvrtc-builtins.so.12.0"), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(folder / "libnvrtc.so.12"))


def compile_ptx(nvrtc: ctypes.CDLL, file: File) -> str:
    """The PTX of a file's source."""

    def check(code: int) -> None:
        if code:
            sys.exit(f"{file.source.name}: NVRTC error {code}")

    def text(size_of: str, get: str) -> str:
        size = ctypes.c_size_t()
        check(nvrtc[size_of](program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        check(nvrtc[get](program, buffer))
        return buffer.value.decode()

    program = ctypes.c_void_p()
    name, source = file.source.name.encode(), file.source.read_bytes()
    check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, name, 0, None, None))
    include = [file.source.parent, SITE / "nvidia/cuda_runtime/include"]
    options = [
        f"--gpu-architecture=compute_{file.target}",
        *OPTIONS,
        *(f"--include-path={folder}" for folder in include),
    ]
    array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    code = nvrtc.nvrtcCompileProgram(program, len(options), array)
    log = text("nvrtcGetProgramLogSize", "nvrtcGetProgramLog")
    if log.strip():
        print(log, file=sys.stderr)
    check(code)
    ptx = text("nvrtcGetPTXSize", "nvrtcGetPTX")
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    # a counter that runs on from one compilation of the process to the next
    return re.sub(r" // callseq .*", "", ptx)


def difference(file: File, ptx: str) -> str:
    """The first lines in which the committed file differs from its source's PTX, if it does."""
    committed = file.path.read_text() if file.path.exists() else ""
    name = str(file.path.relative_to(ROOT))
    lines = difflib.unified_diff(
        committed.splitlines(), ptx.splitlines(), name, "as built", n=1, lineterm=""
    )
    return "\n".join(line for line, _ in zip(lines, range(30), strict=False))


def architectures(ptxas: pathlib.Path) -> list[int]:
    """Those that this assembler knows, but for the variants of one chip."""
    text = subprocess.run([ptxas, "--help"], check=True, capture_output=True, text=True).stdout
    known = {int(number) for number in re.findall(r"'sm_(\d+)'", text)}
    return sorted(number for number in known if number >= TARGETS[0])


def assemble(ptxas: pathlib.Path, file: File, architecture: int) -> list[str]:
    """One row of the table for each kernel."""
    command = [ptxas, "-v", f"-arch=sm_{architecture}", file.path, "-o", "/dev/null"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{file.path.name} for sm_{architecture}:\n{done.stderr}")
    return re.findall(
        r"Function properties for (\w+)\s+(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads\s+ptxas info\s*: Used (\d+) registers",
        done.stderr,
    )


def check_assembly(ptxas: pathlib.Path) -> bool:
    """Prints the table; false if a kernel spills or has a stack frame."""
    known = architectures(ptxas)
    jobs = []
    for file in files():
        # the file that a driver takes: the newest target that is not newer than the device
        newest = {number: max(t for t in TARGETS if t <= number) for number in known}
        serves = [number for number in known if newest[number] == file.target]
        jobs += [(file, number) for number in (serves if file.ships else [file.target])]
    with ThreadPoolExecutor(2) as pool:
        tables = list(pool.map(lambda job: assemble(ptxas, *job), jobs))
    row = "{:20} {:>7} {:14} {:>9} {:>6} {:>6}".format
    print(row("file", "arch", "kernel", "registers", "spills", "stack"))
    clean = True
    for (file, number), table in zip(jobs, tables, strict=True):
        for kernel, stack, stores, loads, registers in table:
            spills = int(stores) + int(loads)
            print(row(file.path.name, f"sm_{number}", kernel, registers, spills, stack))
            clean = clean and (spills == int(stack) == 0 or not file.ships)
        clean = clean and bool(table)
    return clean


def main() -> None:
    """Builds or checks."""
    if sys.argv[1:] not in ([], ["--check"]):
        sys.exit(__doc__)
    check = bool(sys.argv[1:])
    install()
    nvrtc = load_nvrtc()
    stale = []
    for file in files():
        ptx = compile_ptx(nvrtc, file)
        if not check:
            file.path.parent.mkdir(exist_ok=True)
            file.path.write_text(ptx)
            print(f"{file.path.relative_to(ROOT)}: {len(ptx)} bytes")
        elif lines := difference(file, ptx):
            stale.append(lines)
    if stale:
        sys.exit("\n".join([*stale, "the committed PTX is not its sources': run `make ptx`"]))
    if check and not check_assembly(SITE / "nvidia/cuda_nvcc/bin/ptxas"):
        sys.exit("a kernel spills registers or has a stack frame (or there is none)")


if __name__ == "__main__":
    main()
