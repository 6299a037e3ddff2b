"""The CUDA path, from ``step()`` to the shipped PTX: on a GPU where there is one, else on the
software device. Every result equals the CPU back end's bit for bit."""

import contextlib
import math
from types import SimpleNamespace

import cpu_reference
import pytest
import torch
from conftest import same_bits

import qadam

pytestmark = pytest.mark.cuda

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTHS = [0, 1, 255, 256, 257, 4095, 4097]
CLASSES = ["Adam", "AdamW", "Adam8bit", "AdamW8bit"]
SPECIAL = [0.0, -0.0, 1e-45, -1e-40, 1e-30, 3e4, -6e4, 1e-6]


def numbers(shape, dtype, seed, trouble=()):
    """Values over many scales, with special ones among them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    values *= torch.exp(-6 * torch.rand(shape, generator=generator))
    flat = values.view(-1)
    for i, value in enumerate([*SPECIAL, *trouble]):
        if flat.numel() > 40:
            flat[(i * 37 + seed) % flat.numel()] = value
    return values.to(dtype)


def job(name, shapes, *, dtypes=(torch.float32, torch.float32), steps=3, trouble=(), **options):
    """A training run: see ``cpu_reference``."""
    params = [numbers(s, dtypes[0], seed) for seed, s in enumerate(shapes)]
    gradients = [
        [numbers(s, dtypes[1], 100 * step + seed, trouble) for seed, s in enumerate(shapes)]
        for step in range(1, steps + 1)
    ]
    options = {"lr": 1e-2, "min_8bit_size": 0, **options}
    with_strides = [(p, p.stride()) for p in params]
    return {"class": name, "options": options, "params": with_strides, "gradients": gradients}


def assert_equals_cpu(this, device):
    """Runs ``this`` on ``device`` and compares all of it with the CPU back end."""
    params, states = cpu_reference.train(this, device)
    expected_params, expected_states = cpu_reference.expected(this)
    for number, pair in enumerate(zip(params, expected_params, strict=True)):
        assert same_bits(*pair), f"parameter {number}"
    for number, (got, want) in enumerate(zip(states, expected_states, strict=True)):
        assert got.keys() == want.keys()
        for key, value in got.items():
            same = same_bits(value, want[key]) if torch.is_tensor(value) else value == want[key]
            assert same, f"{key} of parameter {number}"


def wait(tensor):
    """Until the device is done."""
    if tensor.is_cuda:
        torch.cuda.synchronize()


def test_it_is_available_and_says_so():
    assert qadam.cuda.is_available()
    assert qadam.cuda.why_not() is None


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("param_dtype", DTYPES)
def test_every_pairing_and_length_equals_the_cpu(device, name, param_dtype, grad_dtype):
    trouble = (float("nan"), float("inf"), -float("inf"))
    shapes = [(n,) for n in LENGTHS]
    this = job(name, shapes, dtypes=(param_dtype, grad_dtype), trouble=trouble, weight_decay=0.1)
    with pytest.warns(RuntimeWarning, match="NaN or infinite"):
        assert_equals_cpu(this, device)


@pytest.mark.parametrize("name", CLASSES)
def test_propagated_nans_equal_the_cpu(device, name):
    trouble = (float("nan"), float("inf"))
    assert_equals_cpu(job(name, [(700,)], trouble=trouble, nonfinite="propagate"), device)


CUTS = {
    "together": {"max_grad_norm": 3.0},
    "measured only": {"max_grad_norm": math.inf},
    "by history": {"percentile_clipping": 30},
    "both": {"max_grad_norm": 1.0, "percentile_clipping": 50},
    "updates": {"args": SimpleNamespace(max_unorm=1e-3)},
    "zeros": {"args": SimpleNamespace(skip_zeros=True), "weight_decay": 0.1},
    "one scale": {"block_wise": False},
    "one scale, third moment": {"block_wise": False, "amsgrad": True},
    "all": {
        "max_grad_norm": 1.0,
        "percentile_clipping": 50,
        "block_wise": False,
        "amsgrad": True,
        "maximize": True,
        "args": SimpleNamespace(max_unorm=1e-2, skip_zeros=True),
    },
}


@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
@pytest.mark.parametrize("options", list(CUTS.values()), ids=list(CUTS))
@pytest.mark.parametrize("name", ["Adam", "AdamW8bit"])
def test_cut_gradients_limited_updates_and_single_scales_equal_the_cpu(
    device, name, options, nonfinite
):
    shapes = [(0,), (1,), (255,), (4097,), (90, 100), (64, 300)]
    dtypes = (torch.float32, torch.bfloat16)
    trouble = (float("nan"), float("inf"), 0.0)
    options = {**options, "nonfinite": nonfinite}
    this = job(name, shapes, dtypes=dtypes, trouble=trouble, steps=4, **options)
    values = this["params"][-1][0]
    this["params"][-1] = (values, (1, 64))  # stored by columns, its gradients by rows
    for gradients in this["gradients"]:
        gradients[3][:200] = 0.0
    warned = pytest.warns(RuntimeWarning) if nonfinite == "skip" else contextlib.nullcontext()
    with warned:
        assert_equals_cpu(this, device)


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit"])
def test_strides_of_parameters_and_gradients(device, name):
    shape = (2, 3, 5, 17)
    base = numbers(shape, torch.float32, 1)
    strides = [base.stride(), (255, 1, 51, 3), (1, 2, 6, 30), (600, 200, 20, 1)]
    layouts = [
        base,
        base.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        base[:1].expand(shape),
    ]
    this = job(name, [shape] * len(strides))
    this["params"] = [(base, stride) for stride in strides]
    this["gradients"] = [[layout] * len(strides) for layout in layouts]
    # as they are: a copy would make them dense
    this["gradients"] = [
        [g.clone() if g.is_contiguous() else g for g in gs] for gs in this["gradients"]
    ]
    assert_equals_cpu(this, device)


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit"])
def test_addresses_aligned_to_an_element_only(device, name):
    memory = torch.zeros(3000, device=device)
    gradients = torch.zeros(3000, device=device)
    values, grads = numbers((1000,), torch.float32, 3), numbers((1000,), torch.float32, 4)
    param = memory[1:1001].copy_(values).requires_grad_()
    param.grad = gradients[3:1003].copy_(grads)
    optimizer = getattr(qadam, name)([param], lr=1e-2, min_8bit_size=0)
    optimizer.step()
    this = {"class": name, "options": {"lr": 1e-2, "min_8bit_size": 0}}
    this |= {"params": [(values, (1,))], "gradients": [[grads]]}
    assert same_bits(param.detach().cpu(), cpu_reference.expected(this)[0][0])
    assert memory[0] == 0
    assert not memory[1001:].any()


def test_gradients_that_are_none_leave_their_parameter_and_its_count(device):
    this = job("AdamW8bit", [(300,), (500,), (20,)], steps=4)
    this["gradients"][1][1] = None
    this["gradients"][2][0] = None
    assert_equals_cpu(this, device)


def test_mixed_widths_dtypes_and_groups_in_one_optimizer(device):
    big, small = numbers((6000,), torch.float32, 1), numbers((100,), torch.bfloat16, 2)
    params = [x.to(device).clone().requires_grad_() for x in (big, small)]
    groups = [{"params": [params[0]], "lr": 1e-2}, {"params": [params[1]], "lr": 1e-3}]
    optimizer = qadam.AdamW8bit(groups, weight_decay=0.1)
    for param in params:
        param.grad = torch.full_like(param, 0.25)
    optimizer.step()
    widths = [8 if "exp_avg_code" in optimizer.state[p] else 32 for p in params]
    assert widths == [8, 32]
    for param, start, lr in zip(params, (big, small), (1e-2, 1e-3), strict=True):
        want = start.double() * (1 - lr * 0.1) - lr
        torch.testing.assert_close(param.detach().cpu().double(), want, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit"])
def test_state_dicts_move_between_devices(device, name):
    """Steps on the device continue what the CPU began, and the reverse, bit for bit."""
    whole = job(name, [(700,), (33,)], steps=4)
    first = {**whole, "gradients": whole["gradients"][:2]}
    params, states = cpu_reference.expected(first)
    on_device = [p.to(device).clone().requires_grad_() for p in params]
    optimizer = getattr(qadam, name)(on_device, **whole["options"])
    saved = optimizer.state_dict()
    saved["state"] = dict(enumerate(states))
    optimizer.load_state_dict(saved)
    for gradients in whole["gradients"][2:]:
        for param, gradient in zip(on_device, gradients, strict=True):
            param.grad = gradient.to(device)
        optimizer.step()
    for got, want in zip(on_device, cpu_reference.expected(whole)[0], strict=True):
        assert same_bits(got.detach().cpu(), want)


def test_lr_as_a_tensor_is_read_by_the_device_and_follows_its_changes(device):
    lr = torch.tensor(0.5, device=device)
    param = torch.zeros(300, device=device, requires_grad=True)
    optimizer = qadam.Adam([param], lr=lr)
    param.grad = torch.ones(300, device=device)
    optimizer.step()
    assert torch.allclose(param, torch.tensor(-0.5))
    lr.fill_(0.25)
    optimizer.step()
    assert torch.allclose(param, torch.tensor(-0.75))


def test_raise_names_the_parameter_before_anything_is_written(device):
    params = [torch.ones(300, device=device, requires_grad=True) for _ in range(2)]
    optimizer = qadam.AdamW8bit(params, min_8bit_size=0, nonfinite="raise")
    for param in params:
        param.grad = torch.ones(300, device=device)
    params[1].grad[7] = float("nan")
    with pytest.raises(RuntimeError, match="parameter 1 has 1 non-finite"):
        optimizer.step()
    assert all(bool((p == 1).all()) for p in params)
    assert not optimizer.state


def test_skipped_elements_are_counted_without_waiting(device):
    param = torch.ones(5000, device=device, requires_grad=True)
    optimizer = qadam.AdamW8bit([param])
    param.grad = torch.ones(5000, device=device)
    param.grad[:3] = float("inf")
    warned = pytest.warns(RuntimeWarning, match="3 gradient elements")
    with warned:  # at the latest by the second step, which sees what the first one counted
        for _ in range(2):
            optimizer.step()
            wait(param)
    assert optimizer.nonfinite_count == 6
    assert bool((param[:3] == 1).all())
    assert bool((param[3:] < 1).all())


def test_parameters_that_share_memory_take_turns(device):
    memory = numbers((1200,), torch.float32, 5).to(device)
    params = [memory[:800].requires_grad_(), memory[400:].detach().requires_grad_()]
    start = memory.detach().cpu().clone()
    grads = [numbers((800,), torch.float32, seed) for seed in (6, 7)]
    optimizer = qadam.AdamW(params, lr=1e-2)
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.to(device)
    optimizer.step()
    options = {"lr": 1e-2}
    one = {"class": "AdamW", "options": options}
    first = cpu_reference.expected(
        one | {"params": [(start[:800], (1,))], "gradients": [[grads[0]]]}
    )
    start[:800] = first[0][0]
    second = cpu_reference.expected(
        one | {"params": [(start[400:], (1,))], "gradients": [[grads[1]]]}
    )
    start[400:] = second[0][0]
    assert same_bits(memory.detach().cpu(), start)
