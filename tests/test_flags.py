"""torch.optim.Adam's flags: amsgrad, maximize, decoupled decay, tensor lr, and mixed precision."""

import copy

import pytest
import torch
from conftest import ADAMS, CODES, WIDTHS, frozen, give_grads, same_bits, state_values, train, twins
from torch.amp import GradScaler
from torch.nn import Parameter

import qadam

FLAGS = [
    {"amsgrad": True},
    {"maximize": True},
    {"amsgrad": True, "maximize": True, "weight_decay": 0.1},
]
TORCH = {qadam.Adam: torch.optim.Adam, qadam.AdamW: torch.optim.AdamW}
EACH_WIDTH = pytest.mark.parametrize("width", WIDTHS)
EACH_CODE = pytest.mark.parametrize("code", CODES)


def errors(steps, cls, options, width="32"):
    """Largest errors of qadam's and of torch's f32 parameters against torch in float64."""
    ours, theirs, exact = twins((700,), (30, 50), n=3)
    for param in exact:
        param.data = param.data.double()
    optimizers = [
        cls(ours, lr=1e-2, min_8bit_size=0, **WIDTHS[width], **options),
        TORCH[cls](theirs, lr=1e-2, **options),
        TORCH[cls](exact, lr=1e-2, **options),
    ]
    for seed in range(steps):
        give_grads(ours, theirs, exact, seed=seed, scale=1.0 + 10 * (seed % 9 == 0))
        for optimizer in optimizers:
            optimizer.step()
    error = lambda params: max(  # noqa: E731
        (p.detach().double() - x.detach()).abs().max() for p, x in zip(params, exact, strict=True)
    )
    return error(ours), error(theirs)


@pytest.mark.parametrize("options", FLAGS, ids=str)
@pytest.mark.parametrize("cls", ADAMS)
def test_32_bits_are_as_near_to_float64_as_torch(cls, options):
    mine, torchs = errors(200, cls, options)
    assert mine <= 1.2 * torchs + 1e-7


@pytest.mark.parametrize("cls", ADAMS)
def test_adam_takes_decoupled_decay_as_torch_does(cls):
    options = {"weight_decay": 0.3, "decoupled_weight_decay": True}
    if cls is qadam.AdamW:
        with pytest.raises(TypeError, match="decoupled_weight_decay"):
            cls([Parameter(torch.ones(3))], **options)
        return
    mine, torchs = errors(50, cls, options)
    assert mine <= 1.2 * torchs + 1e-7
    ours, theirs = twins((300,), (400,))
    options = {"lr": 0.01, "weight_decay": 0.3}
    for code in CODES:
        options |= {"state_code": code, "min_8bit_size": 350}
        decoupled = qadam.Adam8bit([{"params": ours, "decoupled_weight_decay": True}], **options)
        train(4, decoupled, qadam.AdamW8bit(theirs, **options))
        assert all(same_bits(a, b) for a, b in zip(ours, theirs, strict=True))


@EACH_WIDTH
def test_maximizing_is_descending_the_negated_gradient(width):
    ours, theirs = twins((300,), (5000,))
    up = qadam.Adam(ours, maximize=True, weight_decay=0.1, **WIDTHS[width])
    down = qadam.Adam(theirs, weight_decay=0.1, **WIDTHS[width])
    for seed in range(4):
        give_grads(ours, theirs, seed=seed)
        for param in theirs:
            param.grad.neg_()
        up.step()
        down.step()
    assert all(same_bits(a, b) for a, b in zip(ours, theirs, strict=True))


# AMSGrad.


@EACH_WIDTH
def test_amsgrad_remembers_the_largest_second_moment(width):
    (param,), _ = twins(5000)
    optimizer = qadam.Adam([param], amsgrad=True, **WIDTHS[width])
    param.grad = torch.full_like(param, 100.0)
    optimizer.step()
    entry = optimizer.state[param]
    key = "max_exp_avg_sq" if width == "32" else "max_exp_avg_sq_code"
    high = entry[key].clone()
    for seed in range(1, 20):
        give_grads([param], seed=seed, scale=1e-3)
        optimizer.step()
    assert same_bits(entry[key], high)
    assert (state_values(entry, "exp_avg_sq") < state_values(entry, "max_exp_avg_sq")).all()


@EACH_CODE
def test_amsgrad_at_8_bits_stays_near_32_bits(code):
    mine, _ = errors(50, qadam.AdamW, {"amsgrad": True}, code)
    plain, _ = errors(50, qadam.AdamW, {}, code)
    assert mine <= 1.5 * plain


@pytest.mark.parametrize("paged", [False, True])
@EACH_WIDTH
def test_amsgrads_state_is_saved_copied_and_paged(width, paged):
    ours, theirs = twins((100_000,), (300,))
    options = {"amsgrad": True, "is_paged": paged, **WIDTHS[width]}
    a = qadam.AdamW(ours, **options)
    train(2, a)
    b = qadam.AdamW(theirs, lr=9.0, **WIDTHS[width])
    b.load_state_dict(copy.deepcopy(a.state_dict()))  # amsgrad is the dict's
    for p, q in zip(ours, theirs, strict=True):
        q.data.copy_(p.data)
    train(2, a, b, first=2)
    assert all(same_bits(p, q) for p, q in zip(ours, theirs, strict=True))
    c = copy.deepcopy(a)
    assert qadam.paging.is_paged(c.state[c.param_groups[0]["params"][0]]) == paged
    assert frozen(c)[1:] == frozen(a)[1:]
    keys = {key for entry in c.state.values() for key in entry if key.startswith("max_")}
    scales = {"dynamic": "max_exp_avg_sq_scale", "ratio": "max_exp_avg_sq_range"}
    coded = {"max_exp_avg_sq_code", scales[width]} if width in scales else set()
    assert keys == {"max_exp_avg_sq"} | coded  # the small one is 32 bits wide


def test_torchs_amsgrad_goes_on_in_qadam_and_back():
    ours, theirs, exact = twins((300,), (20, 30), n=3)
    first = torch.optim.AdamW(theirs, amsgrad=True)
    train(5, first)
    second = qadam.AdamW32bit(ours)
    second.load_state_dict(first.state_dict())
    for p, q in zip(ours, theirs, strict=True):
        p.data.copy_(q.data)
    train(20, first, second, first=5)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=4e-6, atol=4e-6)
    third = torch.optim.AdamW(exact)
    third.load_state_dict(qadam.state.to_torch(second.state_dict()))
    assert third.param_groups[0]["amsgrad"]
    for p, q in zip(exact, ours, strict=True):
        p.data.copy_(q.data)
    train(20, second, third, first=25)
    for p, q in zip(ours, exact, strict=True):
        torch.testing.assert_close(p, q, rtol=4e-6, atol=4e-6)


def test_amsgrad_can_be_switched_between_steps():
    """torch misses the third moment; here it begins at 0, which the next step raises.

    Of the dynamic code: in the ratio code first moments are encoded anew, see test_ratio.py.
    """
    ours, theirs = twins(5000)
    optimizer = qadam.AdamW8bit(ours, state_code="dynamic")
    plain = qadam.AdamW8bit(theirs, state_code="dynamic")
    train(2, optimizer, plain)
    optimizer.param_groups[0]["amsgrad"] = True
    give_grads(ours, theirs, seed=2, scale=5.0)  # exceeds what was: the maximum is the new one
    optimizer.step()
    plain.step()
    assert same_bits(ours[0], theirs[0])
    assert "max_exp_avg_sq_code" in optimizer.state[ours[0]]
    optimizer.param_groups[0]["amsgrad"] = False
    train(1, optimizer, plain, first=3)
    assert same_bits(ours[0], theirs[0])


# What says how to compute the update, and what cannot be.


@pytest.mark.parametrize("cls", ADAMS)
def test_foreach_fused_and_capturable_change_nothing(cls):
    ours, theirs = twins((300,), (400,))
    options = {"foreach": True, "fused": True, "capturable": True}
    a, b = cls(ours, **options), cls(theirs)
    assert {key: a.param_groups[0][key] for key in options} == options
    train(3, a, b)
    assert all(same_bits(p, q) for p, q in zip(ours, theirs, strict=True))


def test_differentiable_is_refused_clearly():
    with pytest.raises(ValueError, match="differentiable must be False, got True"):
        qadam.AdamW([Parameter(torch.ones(3))], differentiable=True)


@pytest.mark.parametrize("options", [{}, *FLAGS], ids=str)
def test_a_tensor_as_lr_is_a_number(options):
    ours, theirs = twins((300,), (400,))
    lr = torch.tensor(0.01)
    a, b = qadam.AdamW(ours, lr=lr, **options), qadam.AdamW(theirs, lr=0.01, **options)
    train(2, a, b)
    lr.fill_(0.5)
    b.param_groups[0]["lr"] = 0.5
    train(2, a, b, first=2)
    assert all(same_bits(p, q) for p, q in zip(ours, theirs, strict=True))


# Mixed precision.


def scaled_training(width, steps=6):
    """The same training with scaled losses and without; the third step's loss overflows."""
    ours, theirs = twins((300,), (5000,))
    a, b = (qadam.AdamW(params, **WIDTHS[width]) for params in (ours, theirs))
    scaler = GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for number in range(steps):
        give_grads(ours, theirs, seed=number)
        for param in ours:
            param.grad.mul_(scaler.get_scale())
        if number == 2:
            ours[1].grad[7] = float("inf")
        scaler.scale(torch.ones(()))  # a loss
        scaler.step(a)
        scaler.update()
        if number != 2:
            b.step()
    return ours, theirs, a, b


@EACH_WIDTH
def test_a_scaled_step_is_the_step_of_unscaled_gradients(width):
    ours, theirs, a, b = scaled_training(width)
    assert all(same_bits(p, q) for p, q in zip(ours, theirs, strict=True))
    for p, q in zip(ours, theirs, strict=True):
        assert float(a.state[p]["step"]) == float(b.state[q]["step"]) == 5
        assert all(same_bits(x, b.state[q][key]) for key, x in a.state[p].items())
    assert a.nonfinite_count == 0  # an overflow is the scaler's business
    assert not hasattr(a, "grad_scale")


@EACH_CODE
def test_a_step_that_overflowed_leaves_everything_as_it_was(code):
    params, _ = twins((300,), (400,))
    optimizer = qadam.AdamW8bit(params, min_8bit_size=0, state_code=code, nonfinite="raise")
    train(2, optimizer)
    give_grads(params, seed=2)
    params[0].grad[0] = float("nan")
    before = frozen(optimizer)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.grad_scale = torch.tensor(65536.0)
    optimizer.step()
    assert frozen(optimizer) == before


def test_gradients_unscaled_beforehand_are_not_scaled_again():
    ours, theirs = twins((300,), (400,))
    a, b = qadam.AdamW(ours), qadam.AdamW(theirs)
    scaler = GradScaler("cpu", init_scale=256.0)
    scaler.scale(torch.ones(()))  # a loss
    give_grads(ours, theirs, seed=0)
    for param in ours:
        param.grad.mul_(256.0)
    scaler.unscale_(a)
    torch.nn.utils.clip_grad_norm_(ours, 1e9)
    scaler.step(a)
    b.step()
    assert all(same_bits(p, q) for p, q in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("grad_scale", torch.tensor(0.0), ValueError),
        ("grad_scale", torch.tensor(float("nan")), ValueError),
        ("grad_scale", torch.ones(2), ValueError),
        ("found_inf", torch.zeros(0), ValueError),
    ],
)
@pytest.mark.cpu_only  # a device reads them when the step runs
def test_a_scale_that_cannot_be_is_refused(name, value, error):
    params, _ = twins((300,), (400,))
    optimizer = qadam.AdamW(params)
    give_grads(params, seed=0)
    setattr(optimizer, name, value)
    before = frozen(optimizer)
    with pytest.raises(error, match=name):
        optimizer.step()
    assert frozen(optimizer) == before


def test_a_scale_does_not_outlive_a_step_that_failed():
    params, _ = twins((300,), (400,))
    optimizer = qadam.AdamW(params, nonfinite="raise")
    give_grads(params, seed=0)
    good = params[0].grad.clone()
    params[0].grad[3] = float("nan")
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    with pytest.raises(RuntimeError, match="non-finite"):
        optimizer.step()
    params[0].grad.copy_(good)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[params[0]]["exp_avg"], 0.1 * good)
