"""What a user, or a tool, can do to an optimizer's tensors between two steps: an error or the right
update, never a stale pointer, and never a state that a failed step has changed."""

import time
from pathlib import Path

import pytest
import torch
from conftest import CODES, WIDTHS, frozen, give_grads, same_bits, state_values, train
from torch.nn import Parameter

import qadam
from qadam import _core

EACH_WIDTH = pytest.mark.parametrize("width", WIDTHS)
EACH_CODE = pytest.mark.parametrize("code", CODES)


def optimizer_of(params, width, **options):
    return qadam.AdamW(params, min_8bit_size=0, **WIDTHS[width], **options)


def trained(width, n=600):
    p = Parameter(torch.ones(n))
    optimizer = optimizer_of([p], width)
    train(2, optimizer)
    return p, optimizer


@EACH_WIDTH
def test_freed_state_is_an_error(width):
    p, optimizer = trained(width)
    for key in [k for k in optimizer.state[p] if k.startswith("exp_avg")]:
        kept = optimizer.state[p][key]
        optimizer.state[p][key] = freed = kept.clone()
        optimizer.step()
        freed.untyped_storage().resize_(0)
        with pytest.raises(ValueError, match=key):
            optimizer.step()
        optimizer.state[p][key] = kept


@EACH_WIDTH
@pytest.mark.parametrize("what", ["param", "grad"])
def test_a_freed_storage_behind_a_view_is_an_error(width, what):
    """As FSDP frees flat parameters: the address of a view is then its offset, not null."""
    memory = torch.ones(1200)
    p = Parameter(torch.ones(600) if what == "grad" else memory[600:])
    p.grad = memory[600:] if what == "grad" else torch.ones(600)
    optimizer = optimizer_of([p], width)
    optimizer.step()
    memory.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="memory"):
        optimizer.step()


def as_integers(tensor):
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int8)


@EACH_WIDTH
@pytest.mark.parametrize("change", [lambda tensor: tensor[:10], as_integers])
def test_state_of_another_length_or_dtype_at_the_same_address_is_an_error(width, change):
    p, optimizer = trained(width)
    key = "exp_avg" if width == "32" else "exp_avg_code"
    optimizer.state[p][key].data = change(optimizer.state[p][key])
    before = p.detach().clone()
    with pytest.raises(ValueError, match=key):
        optimizer.step()
    assert same_bits(p.detach(), before)


@EACH_WIDTH
def test_misaligned_state_is_replaced_by_an_aligned_copy(width):
    (p, optimizer), (q, other) = trained(width), trained(width)
    key = "exp_avg" if width == "32" else "exp_avg_scale"
    value = optimizer.state[p][key]
    raw = torch.zeros(4 * value.numel() + 1, dtype=torch.uint8)
    raw[1:] = value.view(torch.uint8)
    optimizer.state[p][key] = torch.frombuffer(raw.numpy(), dtype=torch.float32, offset=1)
    give_grads([p], [q], seed=9)
    optimizer.step()
    other.step()
    assert same_bits(p.detach(), q.detach())


@EACH_WIDTH
def test_a_parameter_that_becomes_a_negated_view_in_place_is_an_error(width):
    p, optimizer = trained(width)
    p.data = torch._neg_view(p.data)
    with pytest.raises(ValueError, match="negated"):
        optimizer.step()


@EACH_WIDTH
def test_gradients_that_share_memory_are_read_as_they_are_before_the_step(width):
    memory = torch.linspace(-1, 1, 5001)
    p = Parameter(memory[1:])
    q = Parameter(memory[1:].clone())
    p.grad, q.grad = memory[:-1], memory[:-1].clone()
    optimizer, other = optimizer_of([p], width), optimizer_of([q], width)
    optimizer.step()
    other.step()
    assert same_bits(p.detach(), q.detach())
    if width == "32":
        p.grad = optimizer.state[p]["exp_avg"]
        q.grad = other.state[q]["exp_avg"].clone()
        optimizer.step()
        other.step()
        assert same_bits(p.detach(), q.detach())


@EACH_CODE
def test_a_failed_step_does_not_encode_state_anew(code):
    p = Parameter(torch.randn(2, 16, 8, 8))
    optimizer = optimizer_of([p], code, nonfinite="raise")
    train(3, optimizer)
    p.data = p.data.contiguous(memory_format=torch.channels_last)
    p.grad = torch.full_like(p, float("nan"))
    before = frozen(optimizer)
    with pytest.raises(RuntimeError, match="non-finite"):
        optimizer.step()
    assert frozen(optimizer) == before


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_moments_that_adam_cannot_have_are_not_loaded(name, value):
    _, optimizer = trained("32")
    saved = optimizer.state_dict()
    saved["state"] = {0: {k: v.clone() for k, v in saved["state"][0].items()}}
    saved["state"][0][name][7] = value
    before = frozen(optimizer)
    if name == "exp_avg" and value == -1.0:
        optimizer.load_state_dict(saved)
        return
    with pytest.raises(ValueError, match=f"'{name}' holds {value}"):
        optimizer.load_state_dict(saved)
    assert frozen(optimizer) == before


@EACH_CODE
def test_an_element_that_is_skipped_for_long_keeps_its_state(code):
    """Beside elements whose moments decay, and with them the scale of the block."""
    p = Parameter(torch.ones(256))
    optimizer = optimizer_of([p], code)
    p.grad = torch.full((256,), 1e-2)
    p.grad[1:] = 1.0
    optimizer.step()
    start = {n: state_values(optimizer.state[p], n)[0].item() for n in ("exp_avg", "exp_avg_sq")}
    p.grad = torch.zeros(256)
    p.grad[0] = float("nan")
    with pytest.warns(RuntimeWarning, match="NaN or infinite"):
        optimizer.step()
    for _ in range(500):
        optimizer.step()
    for name, value in start.items():
        assert state_values(optimizer.state[p], name)[0].item() == value, name


@pytest.mark.parametrize(
    "change",
    [
        {"nonfinite": "raise"},
        {"max_grad_norm": 1.0},
        {"percentile_clipping": 0},
        {"max_unorm": float("nan")},
    ],
)
def test_options_put_into_a_group_between_steps_are_refused(change):
    _, optimizer = trained("32")
    optimizer.param_groups[0].update(change)
    with pytest.raises(ValueError, match=next(iter(change))):
        optimizer.step()


def test_betas_out_of_range_are_refused_between_steps_too():
    _, optimizer = trained("32")
    optimizer.param_groups[0]["betas"] = (0.9, 1.5)
    with pytest.raises(ValueError, match=r"betas\[1\] of group 0 is 1.5"):
        optimizer.step()


def test_the_codec_refuses_memory_that_is_freed_or_misaligned():
    codes, scales = torch.zeros(4, dtype=torch.uint8), torch.zeros(1)
    raw = torch.zeros(17, dtype=torch.uint8)
    misaligned = torch.frombuffer(raw.numpy(), dtype=torch.float32, offset=1)
    with pytest.raises(TypeError, match="values"):
        _core.encode_blocks(misaligned, codes, scales, True)


def test_many_parameters_are_checked_for_duplicates_quickly():
    params = [Parameter(torch.ones(1)) for _ in range(5000)]
    with pytest.raises(ValueError, match="position 5000 is the one at 17"):
        qadam.Adam([*params, params[17]])


@pytest.mark.cpu_only
@EACH_WIDTH
def test_subnormal_coefficients_survive_flush_to_zero_in_the_calling_thread(width):
    """torch.set_flush_denormal would make an eps of 1e-39 zero, and the update infinite."""

    def stepped():
        p = Parameter(torch.ones(300))
        p.grad = torch.full((300,), 1e-25)
        optimizer_of([p], width, eps=1e-39).step()
        return p.detach()

    want = stepped()
    assert want.isfinite().all()
    torch.set_flush_denormal(True)
    try:
        got = stepped()
    finally:
        torch.set_flush_denormal(False)
    assert same_bits(got, want)


@pytest.mark.cpu_only
def test_threads_of_earlier_thread_counts_do_not_pile_up():
    def name(task):
        try:
            return (task / "comm").read_text()
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            return ""

    def count():
        return sum(name(task).startswith("qadam-") for task in Path("/proc/self/task").iterdir())

    p = Parameter(torch.ones(300_000))
    p.grad = torch.ones(300_000)
    optimizer = qadam.Adam([p])
    before = torch.get_num_threads()
    try:
        for threads in (5, 6, 7, 3):
            torch.set_num_threads(threads)
            optimizer.step()
    finally:
        torch.set_num_threads(before)
    deadline = time.monotonic() + 20  # they end on their own
    while count() > 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert count() <= 3


@EACH_CODE
def test_a_default_device_does_not_reach_into_loading(code):
    _, optimizer = trained("32")
    other = optimizer_of([Parameter(torch.ones(600))], code)
    with torch.device("meta"):
        other.load_state_dict(optimizer.state_dict())
    (entry,) = other.state.values()
    assert not any(value.is_meta for value in entry.values())
