"""What only the software device can see of the CUDA path: the driver calls of a step, and what is
left when one of them fails."""

import pytest
import torch
from conftest import same_bits

import qadam

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
