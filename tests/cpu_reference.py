"""What qadam's CPU back end makes of a job, in a process of its own.

In a process whose CPU tensors stand in for device memory there is no CPU back end to compare with,
so the reference runs elsewhere, wherever the tests run.
"""

import atexit
import functools
import multiprocessing
import os

import torch

import qadam


def run(job):
    """Parameters and states after the steps of ``job``: a dict of plain values and CPU tensors."""
    torch.set_num_threads(1)
    return train(job, "cpu")


def train(job, device):
    """The same on ``device``; what comes back is on the CPU.

    Where all gradients are cut to a norm, a last "state" has the norms.
    """
    params, norms = [], []
    for values, stride in job["params"]:
        param = torch.empty_strided(values.shape, stride, dtype=values.dtype, device=device)
        params.append(param.copy_(values).requires_grad_())
    optimizer = getattr(qadam, job["class"])(params, **job["options"])
    for gradients in job["gradients"]:
        for param, gradient in zip(params, gradients, strict=True):
            if gradient is not None:
                param.grad_dtype = gradient.dtype
                gradient = gradient.to(device)
            param.grad = gradient
        optimizer.step()
        if optimizer.grad_norm is not None:
            norms.append(optimizer.grad_norm.cpu())
    keep = [p.detach().cpu().clone() for p in params]
    states = [
        {k: v.cpu().clone() if torch.is_tensor(v) else v for k, v in optimizer.state[p].items()}
        if p in optimizer.state
        else {}
        for p in params
    ]
    return keep, [*states, {"norms": torch.stack(norms)}] if norms else states


@functools.cache
def pool():
    """One process without a software device; it imports qadam once."""
    path = os.environ.pop("QADAM_SOFTGPU", None)  # the new process must not take it over
    try:
        started = multiprocessing.get_context("spawn").Pool(1)
        started.apply(int)
    finally:
        if path is not None:
            os.environ["QADAM_SOFTGPU"] = path
    atexit.register(started.terminate)
    return started


def expected(job):
    """What ``job`` gives on the CPU."""
    return pool().apply(run, (job,))
