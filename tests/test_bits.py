"""The same bits from every back end and number of threads, whatever the calling thread has set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache

import pytest

pytestmark = pytest.mark.cpu_only

# Answers questions, each in a fork of one process that has imported torch and not stepped: qadam
# reads its variables once.
SCRIPT = """
import hashlib, itertools, json, os, sys, torch, qadam
from types import SimpleNamespace
torch.set_num_threads(1)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LENGTHS = (0, 1, 7, 8, 15, 16, 17, 31, 33, 255, 256, 257, 1000, 33_003)
INTS = {4: torch.int32, 2: torch.int16}
random = torch.Generator().manual_seed(5)

def bits(n, dtype):
    # any pattern of bits: NaN with payloads, infinities, subnormals, signed zeros, huge ranges
    ints = INTS[dtype.itemsize]
    info = torch.iinfo(ints)
    return torch.randint(info.min, info.max + 1, (n,), generator=random).to(ints).view(dtype)

def mixed(n, dtype):
    # usual numbers, with adversarial ones among them
    x = torch.randn(n, generator=random) * 10 ** (-8 * torch.rand(n, generator=random))
    x = x.to(dtype)
    odd = torch.rand(n, generator=random)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan]).to(dtype)
    pick = special[torch.randint(0, 5, (n,), generator=random)]
    return torch.where(odd < 0.05, bits(n, dtype), torch.where(odd < 0.1, pick, x))

def subnormal(n, dtype):
    ints = INTS[dtype.itemsize]
    top = {torch.float32: 1 << 24, torch.bfloat16: 1 << 8, torch.float16: 1 << 11}[dtype]
    sign = torch.randint(0, 2, (n,), generator=random) * torch.iinfo(ints).min
    return (torch.randint(0, top, (n,), generator=random) + sign).to(ints).view(dtype)

KINDS = {"bits": bits, "mixed": mixed, "subnormal": subnormal}
SETTINGS = {
    "Adam": dict(weight_decay=0.0),
    "AdamL2": dict(weight_decay=0.3),
    "AdamW": dict(weight_decay=0.3, lr=0.1),
    "propagate": dict(weight_decay=0.3, nonfinite="propagate"),
    "extreme": dict(lr=1e3, betas=(0.0, 0.5), eps=1e-30),
    "clipped": dict(max_grad_norm=3.0, percentile_clipping=20,
                    args=SimpleNamespace(max_unorm=0.1, skip_zeros=True)),
    "amsgrad": dict(amsgrad=True, weight_decay=0.3),
    "one scale": dict(block_wise=False, weight_decay=0.3, nonfinite="propagate",
                      percentile_clipping=60, args=SimpleNamespace(max_unorm=1e-3)),
}
CASES = []
for p_dtype, g_dtype in itertools.product(DTYPES, DTYPES):
    for kind, make in KINDS.items():
        values = [make(n, p_dtype) for n in LENGTHS]
        grads = [[make(n, g_dtype) for n in LENGTHS] for _ in range(3)]
        # a transposed pair: another path through memory
        values.append(make(60 * 70, p_dtype).view(60, 70).t())
        for of_step in grads:
            of_step.append(make(60 * 70, g_dtype).view(70, 60))
        CASES.append((f"{p_dtype} {g_dtype} {kind}"[:60], values, grads))

def hashes(settings, width):
    bits, _, code = width.partition(" ")
    digests = {}
    for name in settings:
        cls = qadam.AdamW if name == "AdamW" else qadam.Adam
        # a quarter will do for the ratio code: each kind, and all dtypes
        for case, values, grads in CASES[:: 4 if code == "ratio" else 1]:
            params = [v.clone().requires_grad_() for v in values]
            for p in params:
                p.grad_dtype = None
            options = dict(SETTINGS[name], **({"state_code": code} if code else {}))
            o = cls(params, optim_bits=int(bits), min_8bit_size=0, **options)
            for of_step in grads:
                for p, g in zip(params, of_step):
                    p.grad = g
                o.step()
            digest = hashlib.sha256()
            for p in params:
                tensors = [p.detach(), *(x for x in o.state[p].values() if torch.is_tensor(x))]
                for x in tensors:
                    raw = x.contiguous().reshape(-1).view(torch.uint8)
                    digest.update(raw.numpy().tobytes())
            if o.grad_norm is not None:
                digest.update(o.grad_norm.numpy().tobytes())
            digests[f"{width} {name} {case}"] = digest.hexdigest()[:16] + f" {o.nonfinite_count}"
    return digests

import warnings
warnings.simplefilter("ignore")
o = qadam.Adam([torch.zeros(1, requires_grad=True)])  # what this imports is not imported again

def configuration(threads, flush, settings):
    torch.set_num_threads(threads)
    torch.set_flush_denormal(flush)
    digests = {}
    for width in ("32", "8 dynamic", "8 ratio"):
        digests.update(hashes(settings, width))
    names = [open(f"/proc/self/task/{t}/comm").read() for t in os.listdir("/proc/self/task")]
    flushes = float(torch.tensor([1e-40]) * 1) == 0
    return {
        "digests": digests,
        "backend": qadam.cpu_backend(),
        "threads": sum(name.startswith("qadam-") for name in names),
        "flushes": flushes,
    }

def first_step():
    p = torch.ones(5000, requires_grad=True)
    p.grad = torch.ones(5000)
    o = qadam.Adam8bit([p])
    outcomes = []
    for _ in range(2):  # an error does not go away by itself
        try:
            o.step()
        except ValueError as error:
            outcomes.append(str(error))
            assert (p == 1).all() and not o.state, "something was written"
        else:
            outcomes.append("stepped")
    return outcomes

for line in sys.stdin:
    environment, function, *arguments = json.loads(line)
    child = os.fork()
    if child == 0:
        os.environ.update(environment)
        try:
            print(json.dumps(globals()[function](*arguments)), flush=True)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit("failed: " + line)
"""

FEW = ["AdamW", "clipped", "one scale"]
ALL = [*FEW, "Adam", "AdamL2", "amsgrad", "propagate", "extreme"]


Environment = dict[str, str]
INVALID = [
    *(("QADAM_CPU", value) for value in ("neon", "AVX2", "avx2 ", "\udcff")),
    *(("QADAM_NUM_THREADS", value) for value in ("0", "-1", "two", "1.5", "4096", "\udcff")),
]
"""Values that are refused; the last is a byte that is not UTF-8."""
EMPTY = [("QADAM_CPU", ""), ("QADAM_NUM_THREADS", "")]


def ask(questions: list) -> list:
    """What each function of the script, called in a fork with its environment, returned."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input="".join(json.dumps(question) + "\n" for question in questions),
        env={k: v for k, v in os.environ.items() if not k.startswith("QADAM_")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(questions)
    return answers


@cache
def first_steps() -> dict[tuple[str, str], str]:
    """What the first step said for each of the invalid and the empty values."""
    pairs = [*INVALID, *EMPTY]
    answers = ask([[{name: value}, "first_step"] for name, value in pairs])
    assert all(first == second for first, second in answers), answers
    return {pair: answer[0] for pair, answer in zip(pairs, answers, strict=True)}


@cache
def backends() -> list[str]:
    """Those of this machine, as the error for an unknown one lists them."""
    return first_steps()["QADAM_CPU", "neon"].partition("accepts ")[2].split(", ")


@cache
def results() -> list[tuple[Environment, int, bool, dict]]:
    """Environment, torch's threads, flush_denormal, and what they gave."""
    asked = [({"QADAM_CPU": name}, 1, False, ALL) for name in backends()]
    asked += [({}, n, False, FEW) for n in range(1, 9)]
    asked += [({"QADAM_NUM_THREADS": str(n)}, 2, False, FEW) for n in range(1, 9)]
    asked += [({"QADAM_CPU": name}, 4, False, FEW) for name in backends()]
    asked += [({"QADAM_CPU": name}, n, True, FEW) for name in backends() for n in (1, 3)]
    answers = ask([[environment, "configuration", *rest] for environment, *rest in asked])
    return [(*a[:3], answer) for a, answer in zip(asked, answers, strict=True)]


def test_every_back_end_and_number_of_threads_gives_the_same_bits():
    assert backends()[0] == "scalar"
    reference = results()[0][3]["digests"]  # scalar, one thread, no flushing
    assert len(set(reference.values())) > 0.9 * len(reference)  # the hashes see the data
    for environment, threads, flush, result in results():
        where = f"{environment}, {threads} threads of torch, flush_denormal {flush}"
        digests = result["digests"]
        different = [case for case, digest in digests.items() if digest != reference[case]]
        assert not different, f"{where}: {len(different)} of {len(digests)}, {different[:5]}"


def test_the_variables_are_heeded():
    for environment, threads, _, result in results():
        assert result["backend"] == environment.get("QADAM_CPU", backends()[-1])
        wanted = int(environment.get("QADAM_NUM_THREADS", threads))
        assert result["threads"] == (wanted if wanted > 1 else 0), (environment, threads)


def test_flush_denormal_is_left_as_the_caller_set_it():
    assert {flush for _, _, flush, _ in results()} == {True, False}
    assert all(result["flushes"] == flush for _, _, flush, result in results())


@pytest.mark.parametrize(("name", "value"), INVALID)
def test_an_invalid_variable_is_an_error_before_anything_is_written(name, value):
    text = first_steps()[name, value]
    accepted = {
        "QADAM_CPU": "this machine accepts " + ", ".join(backends()),
        "QADAM_NUM_THREADS": "a whole number from 1 to 1024 is accepted",
    }[name]
    assert text.startswith(f"{name} is "), text
    assert text.endswith(f"; {accepted}"), text
    assert value == "\udcff" or f'"{value}"' in text


@pytest.mark.parametrize(("name", "value"), EMPTY)
def test_an_empty_variable_is_as_none(name, value):
    assert first_steps()[name, value] == "stepped"
