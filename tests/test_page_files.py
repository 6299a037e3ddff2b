"""The files that hold paged state, and what processes, disks and limits do to them."""

import copy
import errno
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import fingerprint, frozen, give_grads, same_bits, train, twins
from mappings import mappings
from torch.nn import Parameter

import qadam
from qadam import paging

pytestmark = pytest.mark.cpu_only

MIB = 1 << 20


@pytest.fixture
def page_dir(tmp_path, monkeypatch):
    """A directory for page files that nobody else uses."""
    directory = tmp_path / "pages"
    directory.mkdir()
    monkeypatch.setenv("QADAM_PAGE_DIR", os.fspath(directory))
    return directory


def stepped(*shapes, steps=1, cls=qadam.PagedAdamW, **options):
    params = twins(*shapes, n=1)[0]
    optimizer = cls(params, **options)
    train(steps, optimizer)
    return optimizer, params


def maps(directory):
    """The maps of this process that are of files in ``directory``."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in lines if os.fspath(directory) in line]


def files(directory):
    """The descriptors of this process that are of files in ``directory``."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            target = os.fspath(link.readlink())
        except FileNotFoundError:  # that of the listing itself
            continue
        if target.startswith(os.fspath(directory)):
            found.append(target)
    return found


def free(directory):
    stat = os.statvfs(directory)
    return stat.f_bfree * stat.f_frsize


def in_memory(directory):
    """Bytes of page files that this process has in its memory."""
    return sum(fields["Rss"] for _, name, fields in mappings() if os.fspath(directory) in name)


# A file's life.


def test_a_page_file_is_reserved_at_the_first_step_and_never_has_a_name(page_dir):
    params = twins((100_000,), n=1)[0]
    optimizer = qadam.PagedAdamW(params)
    assert (len(maps(page_dir)), len(files(page_dir))) == (0, 0)
    train(1, optimizer)
    assert (len(maps(page_dir)), len(files(page_dir))) == (1, 1)
    assert list(page_dir.iterdir()) == []
    assert "deleted" in maps(page_dir)[0]


def test_space_is_taken_before_it_is_used_and_returned_at_the_end(page_dir, tmp_path):
    """1 GiB, so that what others do to the disk meanwhile hardly matters."""
    path = os.fspath(tmp_path / "sparse")
    large = torch.from_file(path, shared=True, size=128 * MIB, dtype=torch.bfloat16)
    before = free(page_dir)
    pages = paging.allocate([(large, qadam.state.Format(32))])
    full = free(page_dir)
    assert before - full > 512 * MIB
    del pages
    gc.collect()
    deadline = time.monotonic() + 10
    while free(page_dir) < full + 512 * MIB:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert files(page_dir) == maps(page_dir) == []


def test_state_outlives_its_optimizer_and_the_file_its_last_tensor(page_dir):
    optimizer, params = stepped((100_000,), (101_000,))
    last = optimizer.state_dict()["state"][1]["exp_avg_sq"]
    value = last.clone()
    view = last[5:].view(torch.int32)
    del optimizer, params, last
    gc.collect()
    assert (len(maps(page_dir)), len(files(page_dir))) == (1, 1)
    assert same_bits(view.view(torch.float32), value[5:])
    view.zero_()  # still writable
    del view
    gc.collect()
    assert (maps(page_dir), files(page_dir)) == ([], [])


def test_what_a_loaded_dict_replaces_is_freed(page_dir):
    optimizer, _ = stepped((100_000,), (101_000,))
    for _ in range(3):
        optimizer.load_state_dict(optimizer.state_dict())
        gc.collect()
        assert (len(maps(page_dir)), len(files(page_dir))) == (1, 1)


@pytest.mark.parametrize("code", ["dynamic", "ratio"])
def test_a_thousand_optimizers_leave_nothing(code, page_dir, monkeypatch):
    monkeypatch.setattr(paging, "LEAST", 400)
    params = twins((500,), (300,), n=1)[0]
    give_grads(params, seed=0)

    def live():
        optimizer = qadam.PagedAdamW8bit(params, min_8bit_size=0, state_code=code)
        optimizer.step()
        other = copy.deepcopy(optimizer)
        other.load_state_dict(optimizer.state_dict())

    live()
    gc.collect()
    handles = len(list(Path("/proc/self/fd").iterdir()))
    mapped = len(Path("/proc/self/maps").read_text().splitlines())
    for _ in range(167):  # three files each, for each code
        live()
    gc.collect()
    assert (maps(page_dir), files(page_dir), list(page_dir.iterdir())) == ([], [], [])
    assert len(list(Path("/proc/self/fd").iterdir())) == handles
    assert len(Path("/proc/self/maps").read_text().splitlines()) < mapped + 20


def test_a_step_that_may_keep_nothing_in_memory_keeps_little(page_dir, monkeypatch):
    """48 MB of state: all of it stays without a limit, a few windows with one."""
    kept = {}
    for limit in ("", "0", "1000000"):
        monkeypatch.setenv("QADAM_PAGE_MEMORY", limit)
        optimizer, _ = stepped((4_000_000,), (1_000_000,), (1_000_000,), steps=2)
        kept[limit] = in_memory(page_dir)
        del optimizer
        gc.collect()
    assert kept[""] >= 48_000_000
    assert kept["0"] < 16 * MIB, kept
    assert kept["1000000"] < 16 * MIB, kept


# Directories and settings that will not do.


def settings(tmp_path):
    (tmp_path / "file").write_text("")
    return {
        "missing": (tmp_path / "nowhere", FileNotFoundError),
        "a file": (tmp_path / "file", NotADirectoryError),
        "not writable": (Path("/proc"), OSError),
    }


@pytest.mark.parametrize("which", ["missing", "a file", "not writable"])
def test_a_directory_that_will_not_do_is_an_error_at_construction(which, tmp_path, monkeypatch):
    good = qadam.PagedAdamW(twins((10,), n=1)[0])
    directory, error = settings(tmp_path)[which]
    monkeypatch.setenv("QADAM_PAGE_DIR", os.fspath(directory))
    params = twins((100_000,), n=1)[0]
    with pytest.raises(error, match=f'QADAM_PAGE_DIR="{directory}"') as caught:
        qadam.PagedAdamW(params)
    assert caught.value.errno
    before = frozen(good)
    with pytest.raises(error, match="is accepted"):
        good.add_param_group({"params": params, "lr": 1.0})
    assert frozen(good) == before
    train(1, good)  # has nothing to page
    qadam.PagedAdamW(twins((99_999,), n=1)[0])
    qadam.AdamW(params)


@pytest.mark.parametrize("value", ["much", "-1", "1e9", "1.5", "64 MB", str(1 << 64)])
def test_a_limit_that_is_no_number_of_bytes_is_an_error_at_construction(value, monkeypatch):
    monkeypatch.setenv("QADAM_PAGE_MEMORY", value)
    with pytest.raises(ValueError, match=f'QADAM_PAGE_MEMORY is "{value}".*whole number of bytes'):
        qadam.PagedAdamW(twins((100_000,), n=1)[0])


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("which", ["QADAM_PAGE_DIR", "QADAM_PAGE_MEMORY", "removed"])
def test_what_goes_wrong_after_construction_fails_before_anything_is_written(
    which, steps, page_dir, monkeypatch
):
    """New state is needed: by a first step, one with another gradient, loading and copying."""
    params, reference = twins((100_000,), (101_000,))
    optimizer, other = qadam.PagedAdamW(params), qadam.AdamW(reference)
    for seed in range(steps):
        give_grads(params, reference, seed=seed)
        params[1].grad = reference[1].grad = None
        optimizer.step()
        other.step()
    give_grads(params, reference, seed=steps)
    before = frozen(optimizer)
    wrong = {"QADAM_PAGE_DIR": "/nowhere/at/all", "QADAM_PAGE_MEMORY": "x"}.get(which)
    with monkeypatch.context() as patch:
        if wrong is not None:
            patch.setenv(which, wrong)
        else:
            page_dir.rmdir()
        attempts = [optimizer.step]
        if steps:
            saved = optimizer.state_dict()
            attempts += [lambda: optimizer.load_state_dict(saved), lambda: copy.deepcopy(optimizer)]
        for attempt in attempts:
            with pytest.raises((FileNotFoundError, ValueError), match="QADAM_PAGE_"):
                attempt()
            assert frozen(optimizer) == before
    page_dir.mkdir(exist_ok=True)
    optimizer.step()
    other.step()
    assert all(map(same_bits, params, reference))
    assert list(optimizer.state) == params


def test_a_directory_that_disappears_does_not_matter_to_state_that_is_there(page_dir):
    params, reference = twins((100_000,))
    optimizer, other = qadam.PagedAdamW(params), qadam.AdamW(reference)
    train(1, optimizer, other)
    page_dir.rmdir()
    train(2, optimizer, other, first=1)
    assert same_bits(params[0], reference[0])


# A full disk.


def test_a_disk_without_room_is_an_error_before_anything_is_written(page_dir, tmp_path):
    """A parameter in a sparse file is large enough for its state to need more than there is."""
    n = free(page_dir) // 8 + 128 * MIB

    def huge(name):
        path = os.fspath(tmp_path / name)
        return torch.from_file(path, shared=True, size=n, dtype=torch.bfloat16)

    small, reference = twins((100_000,))
    large = Parameter(huge("parameter"))
    optimizer, other = qadam.PagedAdamW([*small, large]), qadam.AdamW(reference)
    give_grads(small, reference, seed=0)
    large.grad = huge("gradient")
    before = fingerprint(small[0])
    start = time.monotonic()
    with pytest.raises(OSError, match=f'reserving [0-9]+ bytes.*QADAM_PAGE_DIR="{page_dir}"') as e:
        optimizer.step()
    assert e.value.errno == errno.ENOSPC
    assert int(str(e.value).split("reserving ")[1].split()[0]) >= 8 * n
    assert "more free space" in str(e.value)
    assert time.monotonic() - start < 5
    assert fingerprint(small[0]) == before
    assert not optimizer.state
    assert (files(page_dir), maps(page_dir)) == ([], [])
    assert (tmp_path / "parameter").stat().st_blocks < 100
    large.grad = None
    for seed in range(2):
        give_grads(small, reference, seed=seed)
        optimizer.step()
        other.step()
    assert same_bits(small[0], reference[0])


COMMON = """
import errno, gc, hashlib, json, os, resource, signal, subprocess, sys, time, torch, qadam
torch.set_num_threads(1)

def make(name="PagedAdamW", n=1_000_000, **options):
    p = torch.nn.Parameter(torch.linspace(-1, 1, n))
    q = torch.nn.Parameter(torch.linspace(-1, 1, n // 4))
    return [p, q], getattr(qadam, name)([p, q], **options)

def step(params, optimizer, number):
    for p in params:
        p.grad = torch.linspace(-0.1, 0.2, p.numel()).mul_(number % 7 - 2)
    # torch's own threads do not survive a fork: only what is qadam's runs on two
    torch.set_num_threads(2 if type(optimizer).__name__.startswith("Paged") else 1)
    optimizer.step()
    torch.set_num_threads(1)

def train(steps, params, optimizer, first=0):
    for number in range(first, first + steps):
        step(params, optimizer, number)

def digest(params, optimizer):
    tensors = [p.detach() for p in params]
    for p in params:
        tensors += [x for x in optimizer.state.get(p, {}).values() if torch.is_tensor(x)]
    return hashlib.sha256(b"".join(x.numpy().tobytes() for x in tensors)).hexdigest()

def forked(function, *arguments):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # ends a child that waits for threads that are not there
        try:
            os.write(write, json.dumps(function(*arguments)).encode())
        except BaseException as error:
            os.write(write, json.dumps(repr(error)).encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else "the child did not finish"
"""


def run(script, page_dir, *, before=(), memory="", arguments=(), common=COMMON):
    """What the script, in a process of its own, printed as JSON."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("QADAM_")}
    done = subprocess.run(
        [*before, sys.executable, "-c", common + script, *map(os.fspath, arguments)],
        env=env | {"QADAM_PAGE_DIR": os.fspath(page_dir), "QADAM_PAGE_MEMORY": memory},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def can_mount():
    """Whether this user may mount a file system of his own."""
    tried = subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"],  # noqa: S607
        capture_output=True,
        check=False,
    )
    return tried.returncode == 0


FULL = """
small, roomy, mounts = sys.argv[1], sys.argv[2], sys.argv[3] == "yes"
if mounts:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", small], check=True)
    assert os.statvfs(small).f_blocks * 4096 <= 9 << 20
else:
    resource.setrlimit(resource.RLIMIT_FSIZE, (9 << 20, 9 << 20))  # files of so many bytes
out = {}
params, optimizer = make(n=500_000)  # 5 MB
train(1, params, optimizer)
untouched = digest(params, optimizer)
others, second = make(n=500_000 if mounts else 1_000_000)  # another 5 MB; 10 MB at once
before = digest(others, second)
try:
    train(1, others, second)
except OSError as error:
    out["errno"], out["text"] = error.errno, str(error)
out["unchanged"] = digest(others, second) == before and not second.state
out["left"] = untouched == digest(params, optimizer)
try:
    copied = make(n=500_000 if mounts else 1_000_000)[1]
    copied.load_state_dict({**make(n=500_000)[1].state_dict(), "state": {
        i: {"step": 1.0, "exp_avg": torch.ones_like(p), "exp_avg_sq": torch.ones_like(p)}
        for i, p in enumerate(others)}})
except OSError as error:
    out["loading"] = error.errno
out["loaded nothing"] = not copied.state
train(2, params, optimizer, first=1)
if mounts:
    os.environ["QADAM_PAGE_DIR"] = roomy
else:
    others, second = make(n=500_000)
train(3, others, second)
reference = make("AdamW", n=others[0].numel())
train(3, *reference)
out["goes on"] = digest(others, second) == digest(*reference)
reference = make("AdamW", n=500_000)
train(3, *reference)
out["first goes on"] = digest(params, optimizer) == digest(*reference)
print(json.dumps(out))
"""


def test_on_a_full_disk_a_step_fails_before_writing_and_another_directory_helps(page_dir, tmp_path):
    """A real disk of 9 MB; where none can be mounted, the system's limit for a file's size."""
    mounts = can_mount()
    before = ["unshare", "-rm"] if mounts else []
    arguments = (page_dir, tmp_path, "yes" if mounts else "no")
    out = run(FULL, page_dir, before=before, arguments=arguments)
    assert out.pop("errno") == out.pop("loading") == (errno.ENOSPC if mounts else errno.EFBIG)
    text = out.pop("text")
    assert "QADAM_PAGE_DIR" in text
    assert "reserving" in text
    assert set(out.values()) == {True}, out


LIMITS = """
def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key + ":"))

def limited(name):
    params, optimizer = make(name, n=8_000_000)  # 80 MB of state
    for p in params:
        p.grad = torch.full_like(p, 0.1)
    limit = status("VmData") + (40 << 20)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
    try:
        for _ in range(3):
            optimizer.step()
    except (RuntimeError, MemoryError) as error:
        return "no memory"
    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return digest(params, optimizer)

def unlimited():
    params, optimizer = make("AdamW", n=8_000_000)
    for p in params:
        p.grad = torch.full_like(p, 0.1)
    for _ in range(3):
        optimizer.step()
    return digest(params, optimizer)
qadam.Adam([torch.zeros(1, requires_grad=True)])  # imports what torch imports at the first one
print(json.dumps([forked(limited, "AdamW"), forked(limited, "PagedAdamW"), forked(unlimited)]))
"""


@pytest.mark.parametrize("memory", ["", "1000000"])
def test_paged_state_trains_where_state_in_memory_does_not_fit(page_dir, memory):
    """Of private memory the process may have half as much more as the state takes."""
    plain, paged, reference = run(LIMITS, page_dir, memory=memory)
    assert plain == "no memory"
    assert paged == reference


# Other processes.

RESUME = """
checkpoint = torch.load(sys.argv[1], weights_only=True)
params, optimizer = make("PagedAdamW8bit", n=400_000, state_code=sys.argv[2])
for p, value in zip(params, checkpoint["params"]):
    p.data.copy_(value)
optimizer.load_state_dict(checkpoint["optimizer"])
train(3, params, optimizer, first=3)
print(json.dumps([digest(params, optimizer), optimizer.memory()["mapped"]["state"]]))
"""


@pytest.mark.parametrize("code", ["dynamic", "ratio"])
def test_another_process_resumes_from_a_checkpoint_with_the_same_bits(code, page_dir, tmp_path):
    names = {}
    exec(COMMON, names)  # noqa: S102 - the very functions of the other process
    threads = torch.get_num_threads()
    params, optimizer = names["make"]("PagedAdamW8bit", n=400_000, state_code=code)
    names["train"](3, params, optimizer)
    checkpoint = {"params": [p.detach() for p in params], "optimizer": optimizer.state_dict()}
    torch.save(checkpoint, tmp_path / "checkpoint")
    names["train"](3, params, optimizer, first=3)
    torch.set_num_threads(threads)
    got, paged = run(RESUME, page_dir, arguments=[tmp_path / "checkpoint", code])
    assert got == names["digest"](params, optimizer)
    assert paged == 2 * (400_000 + 100_000)


KILLS = """
import random
pages, path, steps = sys.argv[1], sys.argv[2], 8
qadam.Adam([torch.zeros(1, requires_grad=True)])  # imports what torch imports at the first one

def free():
    stat = os.statvfs(pages)
    return stat.f_bfree * stat.f_frsize

def life(report, endless):
    params, optimizer = make(n=3_000_000)  # 30 MB of state, hundreds of windows
    first = 0
    if os.path.exists(path):
        saved = torch.load(path, weights_only=True)
        for p, value in zip(params, saved["params"]):
            p.data.copy_(value)
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["steps"]
    for number in range(first, steps):
        step(params, optimizer, number)
        saved = {"params": [p.detach() for p in params], "optimizer": optimizer.state_dict()}
        torch.save({**saved, "steps": number + 1}, path + ".new")
        os.replace(path + ".new", path)
        if endless:
            os.write(report, b"saved")
        while endless:  # until it is killed
            optimizer.step()
    return digest(params, optimizer)

random.seed(0)
out = {"killed": 0, "returned": 0, "left": [], "files": []}
for _ in range(5):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        life(write, True)
        os._exit(0)
    os.close(write)
    os.read(read, 99)
    out["files"].append(len([x for x in os.listdir(f"/proc/{child}/fd")
                             if os.readlink(f"/proc/{child}/fd/{x}").startswith(pages)]))
    time.sleep(random.random() * 0.4)
    full = free()
    os.kill(child, signal.SIGKILL)
    out["killed"] += os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    out["left"] += os.listdir(pages)
    deadline = time.monotonic() + 3
    while free() < full + (15 << 20) and time.monotonic() < deadline:
        time.sleep(0.01)
    out["returned"] += free() >= full + (15 << 20)
    os.close(read)
out["steps"] = torch.load(path, weights_only=True)["steps"]
out["resumed"] = forked(life, None, False)
params, optimizer = make("AdamW", n=3_000_000)
train(steps, params, optimizer)
out["reference"] = digest(params, optimizer)
print(json.dumps(out))
"""


def test_killed_in_mid_step_it_leaves_nothing_and_restarts_from_its_checkpoint(page_dir, tmp_path):
    out = run(KILLS, page_dir, memory="0", arguments=[page_dir, tmp_path / "checkpoint"])
    assert out["killed"] == 5
    assert out["files"] == [1, 1, 1, 1, 1]
    assert out["left"] == []
    assert out["returned"] >= 3  # of 5: others may fill the disk meanwhile
    assert out["steps"] == 5
    assert out["resumed"] == out["reference"]


FORKS = """
out = {}

def refused(params, optimizer):
    for p in params:
        p.grad = torch.ones_like(p)
    before = digest(params, optimizer)
    try:
        optimizer.step()
    except RuntimeError as error:
        return [str(error), digest(params, optimizer) == before]

def alone(params, optimizer, first=2):
    optimizer.load_state_dict(optimizer.state_dict())
    train(2, params, optimizer, first=first)
    return digest(params, optimizer)

def plainly(params, optimizer, first=2):
    train(2, params, optimizer, first=first)
    return digest(params, optimizer)

def grandchild(params, optimizer):
    alone(params, optimizer)
    return [forked(refused, params, optimizer), forked(alone, params, optimizer, 4)]

class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        return float(index)

for memory, code in (("", "dynamic"), ("0", "ratio")):
    os.environ["QADAM_PAGE_MEMORY"] = memory
    made = {}
    for name in ("PagedAdamW", "AdamW"):
        made[name] = make(name, n=800_000, optim_bits=8, state_code=code)
        train(2, *made[name])
    paged, plain = made["PagedAdamW"], made["AdamW"]
    here = {"digest": digest(*paged) == digest(*plain)}
    here["refused"] = forked(refused, *paged)
    here["parent after"] = digest(*paged) == digest(*plain)
    here["alone"] = forked(alone, *paged) == forked(plainly, *plain)
    here["parent is unaffected"] = digest(*paged) == digest(*plain)
    here["grandchild"] = forked(grandchild, *paged)
    fresh = make("PagedAdamW", n=800_000, optim_bits=8, state_code=code)
    here["before the first step"] = forked(plainly, *fresh) == forked(
        plainly, *make("AdamW", n=800_000, optim_bits=8, state_code=code))
    loader = torch.utils.data.DataLoader(Numbers(), batch_size=None, num_workers=2, timeout=60)
    here["loader"] = list(loader) == [0, 1, 2, 3]
    # a child that lives on while the parent steps, copies nothing and ends
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(write)
        os.read(read, 1)
        del paged, made
        gc.collect()
        os._exit(0)
    train(1, *paged, first=2)
    train(1, *plain, first=2)
    os.close(write)
    os.waitpid(child, 0)
    train(1, *paged, first=3)
    train(1, *plain, first=3)
    here["parent goes on"] = digest(*paged) == digest(*plain)
    train(2, *plain, first=4)
    here["grandchild alone"] = here["grandchild"][1] == digest(*plain)
    out[memory] = here
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    return run(FORKS, tmp_path_factory.mktemp("pages"))


@pytest.mark.parametrize("memory", ["", "0"])
def test_a_forked_child_may_not_write_its_parents_state(forks, memory):
    for text, unchanged in (forks[memory]["refused"], forks[memory]["grandchild"][0]):
        assert "optimizer.load_state_dict(optimizer.state_dict())" in text
        assert "forked" in text
        assert unchanged


@pytest.mark.parametrize("memory", ["", "0"])
def test_a_child_with_state_of_its_own_and_its_parent_train_independently(forks, memory):
    here = {key: value for key, value in forks[memory].items() if isinstance(value, bool)}
    assert set(here.values()) == {True}, here
    assert len(here) == 8
