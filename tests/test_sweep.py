"""The sweep over an optimizer's tensors: what it remembers from step to step changes nothing. After
whatever users do between two steps, an engine that remembers does as a new one does."""

import ctypes
import math
import mmap
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CODES, WIDTHS, give_grads, scale_key, train
from mappings import mappings
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode

import qadam
from qadam import _core

EACH_WIDTH = pytest.mark.parametrize("width", WIDTHS)
SIDE = 24
"""Matrices of that many rows and columns: they can be transposed in place."""


def trained(width, **options):
    """An optimizer of two square parameters whose gradients share one piece of memory."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, SIDE, SIDE, generator=generator)
    params = [Parameter(value.clone()) for value in values]
    optimizer = qadam.AdamW(params, min_8bit_size=0, **WIDTHS[width], **options)
    train(2, optimizer)
    give_grads(params, seed=7)
    optimizer.step()
    optimizer.step()  # everything is known by now
    return optimizer


def moment(optimizer, which=0):
    """An entry of the state and the name of its first moment."""
    entry = optimizer.state[optimizer.param_groups[0]["params"][which]]
    return entry, "exp_avg_code" if "exp_avg_code" in entry else "exp_avg"


def look(tensor):
    """All that there is to see of a tensor, but for its address."""
    if tensor.numel() and tensor.untyped_storage().nbytes() == 0:
        return "freed"
    whole = tensor.detach().resolve_neg().contiguous().flatten()
    bits = whole.view(torch.uint8).numpy().tobytes()
    return tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.is_neg(), bits


def held(optimizer):
    """All values that an optimizer holds and updates."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    entries = [optimizer.state.get(p, {}) for p in params]
    found = [{key: look(tensor) for key, tensor in entry.items()} for entry in entries]
    return [look(p) for p in params], found


def outcome(optimizer):
    """What some further steps do: the error, or nothing, and all values."""
    error = None
    try:
        for _ in range(3):
            optimizer.step()
    except Exception as caught:  # whatever it is, it must be the same
        error = type(caught), re.sub(r"0x[0-9a-f]+", "0x...", str(caught))
    return error, held(optimizer)


def in_place(change):
    """Changes what a tensor is to something else at the same address."""

    def apply(tensor):
        address = tensor.data_ptr()
        tensor.data = change(tensor.data)
        assert tensor.data_ptr() == address

    return apply


def as_type(tensor, dtype):
    """The same shape and strides from the same address on."""
    return tensor.flatten().view(dtype)[: tensor.numel()].view_as(tensor)


transpose = in_place(lambda x: x.t())
negate = in_place(torch._neg_view)
shorten = in_place(lambda x: x[:1])
expand = in_place(lambda x: x[:1].expand_as(x))
flatten = in_place(lambda x: x.view(-1))
reinterpret = in_place(lambda x: as_type(x, torch.int8 if x.dtype == torch.uint8 else torch.int32))
halve = in_place(lambda x: x if x.dtype == torch.uint8 else as_type(x, torch.bfloat16))


def free(tensor):
    tensor.untyped_storage().resize_(0)


def free_by_an_alias(tensor):
    tensor.detach().untyped_storage().resize_(0)


def grow_by_an_alias(tensor):
    """The tensor's values go elsewhere with the memory that it shares."""
    alias = tensor.detach()
    alias.resize_(2 * alias.numel() + 4096)


def swap(tensor):
    """The object becomes another tensor, and the other one this."""
    torch.utils.swap_tensors(tensor, Parameter(tensor.detach().clone()))


def move(tensor):
    tensor.data = tensor.data.clone()


CHANGES = {
    "transpose": transpose,
    "negate": negate,
    "shorten": shorten,
    "expand": expand,
    "flatten": flatten,
    "reinterpret": reinterpret,
    "halve": halve,
    "free": free,
    "free by an alias": free_by_an_alias,
    "grow by an alias": grow_by_an_alias,
    "move": move,
}
"""What can become of a tensor."""


def names(changes):
    return pytest.mark.parametrize(
        "change", [pytest.param(change, id=name) for name, change in changes.items()]
    )


def same_as_new(width, change, **options):
    """Whether a known and a new engine do the same after ``change``; what they do."""
    known, new = trained(width, **options), trained(width, **options)
    for optimizer in (known, new):
        change(optimizer)
    new._engine = new._new_engine()
    found, expected = outcome(known), outcome(new)
    assert found == expected
    return found


@EACH_WIDTH
@names({k: change for k, change in CHANGES.items() if change is not reinterpret} | {"swap": swap})
def test_a_parameter_that_changes_in_place_is_noticed(width, change):
    same_as_new(width, lambda o: change(o.param_groups[0]["params"][1]))


@EACH_WIDTH
@names(CHANGES)
def test_a_gradient_that_changes_in_place_is_noticed(width, change):
    same_as_new(width, lambda o: change(o.param_groups[0]["params"][1].grad))


@EACH_WIDTH
@names(CHANGES)
def test_a_moment_that_changes_in_place_is_noticed(width, change):
    def apply(optimizer):
        entry, key = moment(optimizer)
        change(entry[key])

    same_as_new(width, apply)


@pytest.mark.parametrize("code", CODES)
@names({key: change for key, change in CHANGES.items() if change is not transpose})
def test_scales_that_change_in_place_are_noticed(code, change):
    def apply(optimizer):
        entry, _ = moment(optimizer)
        change(entry[scale_key(entry, "exp_avg_sq")])

    same_as_new(code, apply)


@EACH_WIDTH
@names({key: CHANGES[key] for key in ("negate", "free", "move", "reinterpret", "halve")})
def test_a_count_that_changes_in_place_is_noticed(width, change):
    same_as_new(width, lambda o: change(moment(o)[0]["step"]))


@names({key: CHANGES[key] for key in ("negate", "shorten", "expand", "free", "move")})
@pytest.mark.parametrize("code", CODES)
def test_a_history_that_changes_in_place_is_noticed(code, change):
    same_as_new(code, lambda o: change(moment(o)[0]["gnorm_vec"]), percentile_clipping=50)


def replace_moment(optimizer):
    entry, key = moment(optimizer)
    entry[key] = torch.zeros_like(entry[key]) if key == "exp_avg" else entry[key].flip(0)


def rename_moment(optimizer):
    entry, key = moment(optimizer)
    entry["moment"] = entry.pop(key)


def replace_entry(optimizer):
    p = optimizer.param_groups[0]["params"][0]
    optimizer.state[p] = {k: v.clone() for k, v in optimizer.state[p].items()}
    optimizer.state[p]["step"] += 5


def swap_entries(optimizer):
    p, q = optimizer.param_groups[0]["params"]
    optimizer.state[p], optimizer.state[q] = optimizer.state[q], optimizer.state[p]


def forget_entry(optimizer):
    del optimizer.state[optimizer.param_groups[0]["params"][0]]


def add_to_entry(optimizer):
    moment(optimizer)[0]["more"] = torch.zeros(3)


def load_again(optimizer):
    saved = optimizer.state_dict()
    saved["state"][0]["step"] = torch.tensor(9.0)
    optimizer.load_state_dict(saved)


@EACH_WIDTH
@names(
    {
        change.__name__: change
        for change in (
            replace_moment,
            rename_moment,
            replace_entry,
            swap_entries,
            forget_entry,
            add_to_entry,
            load_again,
        )
    }
)
def test_state_that_is_replaced_is_noticed(width, change):
    same_as_new(width, change)


def set_option(name, value):
    return lambda optimizer: optimizer.param_groups[0].update({name: value})


def reverse(optimizer):
    optimizer.param_groups[0]["params"].reverse()


def replace_param(optimizer):
    params = optimizer.param_groups[0]["params"]
    old, params[0] = params[0], Parameter(params[0].detach() + 1)
    params[0].grad = old.grad


def replace_param_by_its_memory(optimizer):
    """Another parameter at the same address, which has no state yet."""
    params = optimizer.param_groups[0]["params"]
    old, params[0] = params[0], Parameter(params[0].detach())
    params[0].grad = old.grad


def add_group(optimizer):
    p = Parameter(torch.ones(5))
    p.grad = torch.ones(5)
    optimizer.add_param_group({"params": [p], "lr": 0.5})


def drop_gradient(optimizer):
    optimizer.param_groups[0]["params"][0].grad = None


@EACH_WIDTH
@names(
    {
        "lr": set_option("lr", 0.25),
        "betas": set_option("betas", (0.5, 0.5)),
        "weight_decay": set_option("weight_decay", 0.5),
        "amsgrad": set_option("amsgrad", True),
        "percentile_clipping": set_option("percentile_clipping", 10),
        "reverse": reverse,
        "replace_param": replace_param,
        "replace_param_by_its_memory": replace_param_by_its_memory,
        "add_group": add_group,
        "drop_gradient": drop_gradient,
    }
)
def test_groups_that_change_are_noticed(width, change):
    error, *_ = same_as_new(width, change)
    assert error is None


def share_parameters(optimizer):
    p, q = optimizer.param_groups[0]["params"]
    q.data = p.data


def share_state(optimizer):
    (one, key), (other, _) = moment(optimizer, 0), moment(optimizer, 1)
    one[key].data = other[key].data


@EACH_WIDTH
@names({"parameters": share_parameters, "state": share_state})
def test_memory_that_comes_to_be_shared_is_noticed(width, change):
    same_as_new(width, change)


@pytest.mark.parametrize("what", ["moment", "parameter", "other parameter"])
def test_what_comes_to_lie_where_a_gradient_is_is_noticed(what):
    """The gradient stays where it was found to be alone."""

    def step_twice(n, first):
        memory = torch.linspace(-1, 1, n + 1)
        q, p = Parameter(torch.ones(n)), Parameter(torch.ones(n))
        p.grad, q.grad = memory[:-1], torch.ones(n)
        optimizer = qadam.AdamW([q, p], optim_bits=32)
        for _ in range(2):
            optimizer.step()
        mine = memory[1:] if first else memory[1:].clone()
        if what == "moment":
            optimizer.state[q]["exp_avg"] = mine
        elif what == "parameter":
            p.data = mine
        else:
            q.data = mine
        optimizer.step()
        return p.detach().clone()

    assert torch.equal(step_twice(5000, first=True), step_twice(5000, first=False))


@EACH_WIDTH
@pytest.mark.parametrize("of", ["parameter", "gradient", "moment"])
def test_shapes_of_many_dimensions_are_noticed(width, of):
    """torch keeps them elsewhere than in the tensor."""

    def trained(shape=(2, 3, 2, 2, 2, 2, 2, 4)):
        p = Parameter(torch.linspace(-1, 1, math.prod(shape)).view(shape))
        optimizer = qadam.AdamW([p], min_8bit_size=0, **WIDTHS[width])
        give_grads([p], seed=3)
        for _ in range(4):
            optimizer.step()
        return optimizer

    def turn(optimizer):
        p = optimizer.param_groups[0]["params"][0]
        entry, key = moment(optimizer)
        tensor = {"parameter": p, "gradient": p.grad, "moment": entry[key]}[of]
        tensor.data = tensor.data.transpose(0, 1) if of == "moment" else tensor.data.transpose(2, 3)

    known, new = trained(), trained()
    for optimizer in (known, new):
        turn(optimizer)
    new._engine = new._new_engine()
    assert outcome(known) == outcome(new)


@EACH_WIDTH
def test_gradients_that_come_and_go_in_turns(width):
    """Which parameters have gradients changes at every step, and some share memory."""
    known, new = trained(width), trained(width)
    for step in range(6):
        for optimizer in (known, new):
            p, q = optimizer.param_groups[0]["params"]
            if step == 3:
                share_parameters(optimizer)
            give_grads([p, q], seed=step)
            if step % 3:
                (p if step % 2 else q).grad = None
        new._engine = new._new_engine()
        known.step()
        new.step()
    assert held(known) == held(new)


@EACH_WIDTH
def test_memory_that_is_gone_may_be_asked_for_ahead(width):
    """In steps of many parameters another thread asks for the memory that is going to be looked at,
    which it finds out anew three steps after a registration and then every 32 steps."""

    def many():
        values = torch.randn(2500, 8, generator=torch.Generator().manual_seed(0))
        params = [Parameter(value.clone()) for value in values]
        return qadam.AdamW(params, min_8bit_size=0, **WIDTHS[width])

    known, new = many(), many()
    threads = torch.get_num_threads()
    try:
        for step in range(44):
            for optimizer, count in ((known, 4), (new, 1)):
                params = optimizer.param_groups[0]["params"]
                if step in (0, 15):  # the gradients before are freed; no registration
                    give_grads(params, seed=step)
                if step == 6:  # half of all are registered anew
                    for which in range(0, len(params), 2):
                        entry, key = moment(optimizer, which)
                        entry[key] = entry[key].clone()
                        move(params[which])
                torch.set_num_threads(count)
                optimizer.step()
    finally:
        torch.set_num_threads(threads)
    assert held(known) == held(new)


# By which way tensors are read.


class Recorder(TorchFunctionMode):
    """Which of torch's functions are called."""

    def __init__(self):
        super().__init__()
        self.called = set()

    def __torch_function__(self, function, _types, args=(), kwargs=None):
        self.called.add(function)
        return function(*args, **(kwargs or {}))


def attributes_read(optimizer):
    with Recorder() as recorder:
        optimizer.step()
    return bool(recorder.called & {torch.Tensor.data_ptr, torch.Tensor.stride})


WITHOUT = "QADAM_TEST_NO_EXCHANGE" in os.environ
LACKS = ("QADAM_TEST_NO_EXCHANGE", "QADAM_TEST_NO_IMPRESSIONS")
"""What conftest.py takes away from torch."""


def test_impressions_are_taken():
    expected = sys.platform == "linux" and not any(lack in os.environ for lack in LACKS)
    assert _core.takes_impressions() == expected


@pytest.mark.parametrize(
    "setting",
    [
        "torch.set_default_dtype(torch.bfloat16)",
        "torch.set_default_device('meta')",
        "torch.inference_mode().__enter__()",
        "torch._subclasses.FakeTensorMode().__enter__()",
        "torch.autograd.graph.save_on_cpu().__enter__()",
        "torch.use_deterministic_algorithms(True)",
    ],
)
def test_what_a_program_has_set_does_not_keep_impressions_from_being_taken(setting):
    program = f"import torch\nfrom qadam import _core\n{setting}\n"
    program += "print(_core.takes_impressions())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == str(sys.platform == "linux"), done.stderr


@EACH_WIDTH
@pytest.mark.parametrize("of", ["parameter", "gradient", "moment"])
def test_a_lazy_copy_keeps_its_values(width, of):
    """Its memory is shared until somebody writes, which a step does by address."""
    optimizer = trained(width)
    p = optimizer.param_groups[0]["params"][0]
    entry, key = moment(optimizer)
    lazy = torch.ops.aten._lazy_clone(
        {"parameter": p.detach(), "gradient": p.grad, "moment": entry[key]}[of]
    )
    expected = trained(width)
    before = look(lazy.clone())
    for _ in range(3):
        optimizer.step()
        expected.step()
    assert look(lazy) == before
    assert held(optimizer) == held(expected)


def in_huge_pages(tensor):
    """Bytes in huge pages of the mappings that a tensor's memory is in; 0 where nobody says.

    Not of the whole process: what earlier tests left is freed at any time.
    """
    first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes - 1
    return sum(
        fields["AnonHugePages"]
        for addresses, _, fields in mappings()
        if addresses.start <= last and first < addresses.stop
    )


def can_move():
    """Whether this system moves memory into huge pages if asked, and gives none unasked."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    nodes = Path("/sys/devices/system/node/online")
    if not setting.exists() or "[madvise]" not in setting.read_text():
        return False
    if nodes.exists() and not nodes.read_text().strip().isdecimal():
        return False
    huge, collapse = 2 << 20, 25
    advise = ctypes.CDLL(None).madvise

    def moves():
        # a mapping of its own: of malloc's memory it was refused once, in a run of all tests
        with mmap.mmap(-1, 4 * huge, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            memory.write(bytes(4 * huge))
            address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            start = ctypes.c_void_p(-(-address // huge) * huge)
            return advise(start, ctypes.c_size_t(2 * huge), collapse) == 0

    return any(moves() for _ in range(5))


@pytest.mark.cpu_only
def test_what_stays_moves_into_huge_pages_and_what_is_new_does_not():
    n = 1 << 24  # 64 MiB, to which malloc gives a mapping of their own
    p = Parameter(torch.zeros(n))
    optimizer = qadam.AdamW([p])
    before = in_huge_pages(p)
    for _ in range(6):
        p.grad = None
        p.grad = torch.ones(n)
        optimizer.step()
    of_parameter = in_huge_pages(p) - before
    before = in_huge_pages(p.grad)
    for _ in range(3):
        optimizer.step()
    of_gradient = in_huge_pages(p.grad) - before
    assert torch.equal(p.grad, torch.ones(n))
    moved = [of_parameter / p.nbytes, of_gradient / p.nbytes]
    stays = 1 if _core.takes_impressions() else 0  # else nobody knows that a gradient is the same
    # some pages may find no place, and other memory may share a mapping
    assert moved == pytest.approx([1, stays] if can_move() else [0, 0], abs=0.5)


@EACH_WIDTH
def test_attributes_are_read_where_a_glance_does_not_do(width):
    optimizer = trained(width)
    assert attributes_read(optimizer) == WITHOUT
    p = optimizer.param_groups[0]["params"][0]
    p.grad = p.grad.as_subclass(type("Other", (torch.Tensor,), {}))
    assert attributes_read(optimizer)


@pytest.mark.cpu_only
@pytest.mark.parametrize("name", ["test_sweep.py", "test_hostile.py", "test_tensors.py"])
@pytest.mark.parametrize("lack", LACKS)
def test_all_is_the_same_with_a_torch_that_lacks_something(name, lack):
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["-k", "not lacks_something", str(here / name)]  # not itself again
    environment = {**os.environ, lack: "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=here.parent)
    assert done.returncode == 0, done.stdout[-3000:]
