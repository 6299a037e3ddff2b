"""What only the software device can see of the CUDA path: the driver calls of a step, and what is
left when one of them fails."""

import copy
import gc
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import same_bits

import qadam
from qadam import paging

pytestmark = pytest.mark.software


def five_hundred(device, name="AdamW8bit"):
    params = [torch.ones(300 + n, device=device, requires_grad=True) for n in range(500)]
    for param in params:
        param.grad = torch.ones_like(param)
    return params, getattr(qadam, name)(params, min_8bit_size=400)


def test_a_step_on_500_tensors_makes_few_calls_and_never_waits(device, software):
    params, optimizer = five_hundred(device)
    optimizer.step()
    work = ("cuLaunch", "cuMemcpy", "cuMemset", "cuEventRecord")
    for fresh in (False, True):
        if fresh:
            for param in params:
                param.grad = torch.full_like(param, 0.5)
        software.clear()
        optimizer.step()
        names = [call["call"] for call in software.calls()]
        made = [name for name in names if name.startswith(work)]
        assert len(made) <= (4 if fresh else 1), made
        assert software.syncs() == 0, names


EVERY_STEP = ["cuLaunchKernel", "cuMemcpyHtoDAsync_v2", "cuEventRecord"]


@pytest.mark.parametrize("call", [*EVERY_STEP, "cuMemAlloc_v2", "cuMemHostAlloc"])
def test_a_failed_driver_call_is_an_exception_and_changes_nothing(device, software, call):
    """At a first step and at a later one; then the optimizer goes on as if nothing had been."""
    params = five_hundred(device)[0][:3]
    optimizer = qadam.AdamW8bit(params, min_8bit_size=400, lr=1e-2)
    failures = 0
    for number in range(3):
        for param in params:
            param.grad = torch.full_like(param, 0.1 * (number + 1))
        before = [p.detach().clone() for p in params], states(optimizer)
        software.fail(call, 1, 2)
        error = attempt(optimizer)
        software.disarm()
        if error is None:  # a call that only a first step makes
            continue
        failures += 1
        assert (error.code, error.name) == (2, "CUDA_ERROR_OUT_OF_MEMORY")
        assert error.doing in str(error)
        after = [p.detach() for p in params], states(optimizer)
        for got, want in zip(after, before, strict=True):
            assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))
        optimizer.step()
    assert failures == (3 if call in EVERY_STEP else 1)
    assert all(bool((p < 1).all()) for p in params)


def attempt(optimizer):
    """The error of a step, or None."""
    try:
        optimizer.step()
    except qadam.CudaError as error:
        return error
    return None


def states(optimizer):
    """Copies of all state tensors."""
    entries = optimizer.state.values()
    return [v.clone() for entry in entries for v in entry.values() if torch.is_tensor(v)]


# Paged state.


@pytest.fixture
def least(monkeypatch):
    """Pages small tensors, so that many of them take little time."""
    monkeypatch.setattr(paging, "LEAST", 400)


def names(software):
    return [call["call"] for call in software.calls()]


def two_hundred(device, name="PagedAdamW8bit"):
    params = [torch.ones(350 + n, device=device, requires_grad=True) for n in range(200)]
    for param in params:
        param.grad = torch.full_like(param, 0.5)
    return params, getattr(qadam, name)(params, min_8bit_size=500)


@pytest.mark.usefixtures("least")
def test_a_step_on_200_tensors_prefetches_beside_the_stream_and_never_waits(device, software):
    params, optimizer = two_hundred(device)
    reference = two_hundred(device, "AdamW8bit")
    for _ in range(2):
        optimizer.step()
    memory = optimizer.memory()["managed"]
    for fresh in (False, True):
        if fresh:
            for param in params:
                param.grad = torch.full_like(param, 0.5)
        software.clear()
        optimizer.step()
        calls = software.calls()
        launches = [call["stream"] for call in calls if call["call"] == "cuLaunchKernel"]
        prefetches = [call for call in calls if call["call"] == "cuMemPrefetchAsync"]
        assert len(launches) == 2  # what is not paged, and one window
        assert len(prefetches) == 1
        assert prefetches[0]["bytes"] >= memory["state"] + memory["scales"]
        assert prefetches[0]["stream"] not in launches
        order = [call["call"] for call in calls]
        assert order.index("cuMemPrefetchAsync") < order.index("cuLaunchKernel")
        assert len(order) <= 20, order
        assert software.syncs() == 0, order
    for _ in range(4):
        reference[1].step()
    assert all(map(same_bits, params, reference[0]))
    for p, q in zip(params, reference[0], strict=True):
        mine, theirs = optimizer.state[p], reference[1].state[q]
        assert list(mine) == list(theirs)
        assert all(same_bits(mine[key], theirs[key]) for key in mine)


@pytest.mark.usefixtures("least")
@pytest.mark.parametrize("call", ["cuMemAllocManaged", "cuLaunchKernel", "cuMemcpyHtoDAsync_v2"])
def test_a_failed_call_of_a_paged_step_changes_nothing(device, software, call):
    """At a first step and at a later one; then the optimizer goes on as if nothing had been."""
    params = [torch.ones(400 + n, device=device, requires_grad=True) for n in range(3)]
    optimizer = qadam.PagedAdamW8bit(params, min_8bit_size=401, lr=1e-2)
    failures = 0
    for number in range(3):
        for param in params:
            param.grad = torch.full_like(param, 0.1 * (number + 1))
        before = [p.detach().clone() for p in params], states(optimizer)
        software.fail(call, 1, 2)
        error = attempt(optimizer)
        software.disarm()
        if error is None:
            continue
        failures += 1
        assert (error.code, error.name) == (2, "CUDA_ERROR_OUT_OF_MEMORY")
        after = [p.detach() for p in params], states(optimizer)
        for got, want in zip(after, before, strict=True):
            assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))
        optimizer.step()
    assert failures == (1 if call == "cuMemAllocManaged" else 3)
    assert optimizer.memory()["managed"]["state"] > 0
    assert all(bool((p < 1).all()) for p in params)


@pytest.mark.usefixtures("least")
@pytest.mark.parametrize("call", ["cuMemPrefetchAsync", "cuStreamWaitEvent", "cuStreamCreate"])
def test_a_prefetch_that_fails_is_no_error(device, software, call):
    outcomes = []
    for name in ("AdamW", "PagedAdamW"):
        params = [torch.ones(500, device=device, requires_grad=True)]
        params[0].grad = torch.full_like(params[0], 0.5)
        optimizer = getattr(qadam, name)(params)
        for _ in range(3):
            software.fail(call, 1, 2)
            optimizer.step()
            software.disarm()
        outcomes.append((params[0].detach(), *states(optimizer)))
    assert all(map(same_bits, *outcomes))


@pytest.fixture
def without(software):
    """Takes an ability from the device, for one test."""
    taken = []

    def take(ability):
        taken.append(ability)
        getattr(software.library, f"softgpu_set_{ability}")(0)

    yield take
    for ability in taken:
        getattr(software.library, f"softgpu_set_{ability}")(1)


def test_a_device_without_managed_memory_is_named_at_construction(device, without):
    params = [torch.ones(100_000, device=device, requires_grad=True)]
    optimizer = qadam.PagedAdamW([torch.ones(10, device=device, requires_grad=True)])
    without("managed_memory")
    with pytest.raises(RuntimeError, match=r"device 0 has no managed memory.*not paged"):
        qadam.PagedAdamW(params)
    with pytest.raises(RuntimeError, match="device 0 has no managed memory"):
        optimizer.add_param_group({"params": params})
    assert len(optimizer.param_groups) == 1
    qadam.PagedAdamW([torch.ones(99_999, device=device, requires_grad=True)])  # nothing to page
    qadam.AdamW(params)


@pytest.mark.usefixtures("least")
def test_without_concurrent_access_a_step_is_one_launch_without_prefetch(device, software, without):
    without("concurrent_managed_access")
    params, optimizer = two_hundred(device)
    software.clear()
    optimizer.step()
    optimizer.step()
    made = names(software)
    assert "cuMemPrefetchAsync" not in made
    assert "cuMemAdvise" not in made
    assert made.count("cuLaunchKernel") == 2
    assert made.count("cuMemAllocManaged") >= 1
    reference = two_hundred(device, "AdamW8bit")
    for _ in range(2):
        reference[1].step()
    assert all(map(same_bits, params, reference[0]))


@pytest.mark.usefixtures("least")
def test_paged_optimizers_leave_nothing_on_the_device(device, software):
    """500 times: construction, a step, a loaded dict, a copy and its step."""
    params = [torch.ones(size, device=device, requires_grad=True) for size in (400, 7)]
    for param in params:
        param.grad = torch.full_like(param, 0.5)

    def live():
        optimizer = qadam.PagedAdamW8bit(params, min_8bit_size=0)
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        copy.deepcopy(optimizer).step()

    live()
    gc.collect()
    before = json.loads(software.text("softgpu_leaks"))
    for _ in range(500):
        live()
        software.clear()
    gc.collect()
    assert json.loads(software.text("softgpu_leaks")) == before
    assert before["managed_bytes"] == 0


@pytest.mark.usefixtures("least")
def test_state_outlives_its_optimizer_and_is_freed_with_its_last_tensor(device, software):
    gc.collect()
    before = json.loads(software.text("softgpu_leaks"))["managed_bytes"]
    params = [torch.ones(500, device=device, requires_grad=True) for _ in range(2)]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = qadam.PagedAdam(params)
    optimizer.step()
    last = optimizer.state[params[1]]["exp_avg"]
    value = last.clone()
    del optimizer
    gc.collect()
    assert json.loads(software.text("softgpu_leaks"))["managed_bytes"] > before
    assert same_bits(last, value)
    del last
    gc.collect()
    assert json.loads(software.text("softgpu_leaks"))["managed_bytes"] == before


CUTS = {
    "together": ({"max_grad_norm": 0.1}, 3),
    "by history": ({"percentile_clipping": 50}, 3),
    "limited": ({"args": SimpleNamespace(max_unorm=1e-3)}, 2),
    "one scale": ({"block_wise": False}, 2),
    "all": (
        {
            "max_grad_norm": 0.1,
            "percentile_clipping": 50,
            "block_wise": False,
            "args": SimpleNamespace(max_unorm=1e-3, skip_zeros=True),
        },
        4,
    ),
}


@pytest.mark.parametrize(("options", "launches"), list(CUTS.values()), ids=list(CUTS))
def test_cutting_and_measuring_take_few_launches_and_no_wait(device, software, options, launches):
    params = [torch.ones(300 + n, device=device, requires_grad=True) for n in range(100)]
    optimizer = qadam.AdamW8bit(params, min_8bit_size=0, **options)
    for param in params:
        param.grad = torch.full_like(param, 0.5)
    for _ in range(3):
        software.clear()
        optimizer.step()
        assert software.syncs() == 0
        assert names(software).count("cuLaunchKernel") <= launches
    software.clear()
    optimizer.step()
    work = ("cuLaunch", "cuMem", "cuEvent")
    made = [call for call in names(software) if call.startswith(work)]
    assert made.count("cuLaunchKernel") == launches
    if "max_grad_norm" not in options:  # each step's norm has a place of its own
        assert len(made) == launches, "nothing changed: nothing is uploaded"


@pytest.mark.parametrize(("options", "launches"), list(CUTS.values()), ids=list(CUTS))
@pytest.mark.parametrize("call", ["cuLaunchKernel", "cuMemcpyHtoDAsync_v2", "cuMemAlloc_v2"])
def test_a_failed_call_of_a_cut_step_changes_nothing(device, software, options, launches, call):
    for k in range(1, launches + 1):
        params = [torch.ones(300 + n, device=device, requires_grad=True) for n in range(3)]
        optimizer = qadam.AdamW8bit(params, min_8bit_size=0, **options)
        for number in range(2):
            for n, param in enumerate(params):
                param.grad = torch.full_like(param, 0.1 * (number + n + 1))
            before = [p.detach().clone() for p in params], states(optimizer)
            software.fail(call, k, 2)
            error = attempt(optimizer)
            software.disarm()
            if error is None:
                continue
            assert error.code == 2
            after = [p.detach() for p in params], states(optimizer)
            for got, want in zip(after, before, strict=True):
                assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))
            optimizer.step()
        assert call != "cuLaunchKernel" or error is not None


def test_the_gradient_scalers_word_is_read_on_the_device(device, software):
    params, optimizer = five_hundred(device)
    optimizer.step()
    for found in (0.0, 1.0):
        optimizer.grad_scale = torch.tensor(1024.0, device=device)
        optimizer.found_inf = torch.tensor(found, device=device)
        before = [p.detach().clone() for p in params]
        software.clear()
        optimizer.step()
        assert software.syncs() == 0
        stayed = [same_bits(p.detach(), b) for p, b in zip(params, before, strict=True)]
        assert all(stayed) if found else not any(stayed)
        assert float(optimizer.state[params[0]]["step"]) == 2
