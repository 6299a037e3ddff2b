"""A real ``torch.optim.Optimizer``: groups, schedulers, hooks, closures, copies, checkpoints."""

import copy
import inspect
import io
import pickle
import re

import pytest
import torch
from conftest import (
    ADAMS,
    CODES,
    WIDTHS,
    code_step,
    fingerprint,
    frozen,
    give_grads,
    in_ratio,
    same_bits,
    state_values,
    train,
    twins,
)
from torch import nn
from torch.nn import Parameter
from torch.optim import lr_scheduler, swa_utils
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import qadam

MIXED = [(5000,), (3, 40), (), (0,), (64, 80)]
"""With the default ``min_8bit_size``, two of these have 8-bit state and the others 32-bit."""

TORCH = {qadam.Adam: torch.optim.Adam, qadam.AdamW: torch.optim.AdamW}

EACH_WIDTH = pytest.mark.parametrize("width", WIDTHS)
EACH_CODE = pytest.mark.parametrize("code", CODES)


def near(mine, theirs):
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# Parameter groups.


@pytest.mark.parametrize("cls", ADAMS)
def test_each_group_follows_its_own_hyperparameters_as_in_torch(cls):
    mine, theirs = twins((7,), (3, 5), (4,), (2,))

    def groups(p):
        return [
            {"params": [p[0]], "lr": 0.1},
            {"params": [p[1]], "betas": (0.5, 0.7), "weight_decay": 0.3},
            {"params": p[2], "eps": 0.1},
            {"params": iter([p[3]])},
        ]

    a, b = cls(groups(mine), lr=0.02), TORCH[cls](groups(theirs), lr=0.02)
    train(20, a, b)
    near(mine, theirs)


def test_group_options_changed_between_steps_take_effect_as_in_torch():
    mine, theirs = twins((7,), (3, 5))
    optimizers = qadam.AdamW(mine), torch.optim.AdamW(theirs)
    for step, change in enumerate(
        [{"lr": 0.3}, {"betas": (0.1, 0.2)}, {"eps": 0.5}, {"weight_decay": 0.9}]
    ):
        for optimizer in optimizers:
            optimizer.param_groups[0].update(change)
        train(2, *optimizers, first=2 * step)
    near(mine, theirs)


def test_a_group_added_in_mid_training_joins_as_in_torch():
    mine, theirs = twins((7,), (3, 5), (6,))
    a, b = qadam.AdamW(mine[:1]), torch.optim.AdamW(theirs[:1])
    train(3, a, b)
    a.add_param_group({"params": mine[1:], "lr": 0.1, "weight_decay": 0})
    b.add_param_group({"params": theirs[1:], "lr": 0.1, "weight_decay": 0})
    train(5, a, b)
    near(mine, theirs)
    assert [a.state[p]["step"].item() for p in mine] == [8, 5, 5]


BAD_GROUPS = {
    "bad lr": lambda mine: {"params": [Parameter(torch.ones(2))], "lr": -1},
    "bad betas": lambda mine: {"params": [Parameter(torch.ones(2))], "betas": (2, 0)},
    "bad option": lambda mine: {"params": [Parameter(torch.ones(2))], "block_wise": "no"},
    "twice in the group": lambda mine: {"params": [Parameter(torch.ones(2))] * 2},
    "in another group": lambda mine: {"params": [Parameter(torch.ones(2)), mine[0]]},
    "expanded": lambda mine: {"params": [Parameter(torch.ones(1).expand(4))]},
    "float64": lambda mine: {
        "params": [Parameter(torch.ones(2)), Parameter(torch.ones(2, dtype=torch.float64))]
    },
    "not a leaf": lambda mine: {"params": [mine[0] * 2]},
    "not a tensor": lambda mine: {"params": [3]},
    "a set": lambda mine: {"params": {Parameter(torch.ones(2))}},
    "names missing": lambda mine: {"params": [("a", Parameter(torch.ones(2))), mine[0]]},
    "not a dict": lambda mine: [Parameter(torch.ones(2))],
    "no params": lambda mine: {"lr": 0.1},
}


@pytest.mark.parametrize("make", list(BAD_GROUPS.values()), ids=list(BAD_GROUPS.keys()))
def test_a_failing_add_param_group_leaves_the_optimizer_as_it_was(make):
    mine, theirs = twins((7,), (3, 5))
    a, b = qadam.AdamW(mine), qadam.AdamW(theirs)
    train(2, a, b)
    before = frozen(a)
    with pytest.raises((ValueError, TypeError, KeyError)):
        a.add_param_group(make(mine))
    assert frozen(a) == before
    train(2, a, b, first=2)
    assert all(map(same_bits, mine, theirs))


def test_a_parameter_given_twice_is_refused():
    p, q = Parameter(torch.ones(2)), Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="position 2 is the one at 0"):
        qadam.Adam([p, q, p])
    with pytest.raises(ValueError, match="more than one parameter group"):
        qadam.Adam([{"params": [p, q]}, {"params": [p]}])
    with pytest.raises(ValueError, match="position 1 is the one at 0"):
        qadam.Adam([("a", p), ("b", p)])


def test_a_parameter_of_the_group_list_twice_by_hand_is_refused_at_every_step():
    """Both places would have the same state."""
    p = Parameter(torch.ones(2))
    optimizer = qadam.Adam([p])
    optimizer.param_groups[0]["params"].append(p)
    p.grad = torch.ones(2)
    for _ in range(3):
        with pytest.raises(ValueError, match="share memory"):
            optimizer.step()
    assert same_bits(p, torch.ones(2))


def test_named_parameters_keep_their_names_through_a_state_dict():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    optimizer = qadam.AdamW(model.named_parameters())
    names = ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert optimizer.param_groups[0]["param_names"] == names
    train(1, optimizer)
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == names
    other = qadam.AdamW(copy.deepcopy(model).named_parameters())
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["param_names"] == names
    groups = [{"params": model[0].named_parameters()}, {"params": model[1].named_parameters()}]
    assert [g["param_names"] for g in qadam.AdamW(groups).param_groups] == [["weight", "bias"]] * 2


def test_a_parameter_taken_out_of_the_groups_is_left_alone_and_the_others_go_on():
    mine, theirs = twins((5,), (6,), (7,))
    a, b = qadam.AdamW(mine), qadam.AdamW(theirs)
    train(2, a, b)
    left = fingerprint(mine[1])
    del a.param_groups[0]["params"][1]
    give_grads(mine, theirs, seed=9)
    a.step()
    b.step()
    assert fingerprint(mine[1]) == left
    assert same_bits(mine[0], theirs[0])
    assert same_bits(mine[2], theirs[2])


# Learning rate schedules: every class of the module has a line here.

SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 1, 6),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1, 4), lr_scheduler.ExponentialLR(o, 0.8)], [4]
    ),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 8, 2),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 4), lr_scheduler.ExponentialLR(o, 0.8)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=12),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.01, anneal_epochs=5),
}
ABSTRACT = {"LRScheduler"}


def test_every_scheduler_of_torch_is_tried():
    """Fails when torch has a new one."""
    public = {
        name
        for name, cls in inspect.getmembers(lr_scheduler, inspect.isclass)
        if cls.__module__ == lr_scheduler.__name__ and not name.startswith("_")
    } | set(lr_scheduler.__all__)
    assert public - ABSTRACT == SCHEDULERS.keys() - {"SWALR"}


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_drive_it_as_they_drive_torchs(name, tensor_lr):
    mine, theirs = twins((7,), (3, 5))
    lr = (lambda: torch.tensor(0.05)) if tensor_lr else (lambda: 0.05)
    groups = [
        [{"params": p[:1], "lr": lr()}, {"params": p[1:], "lr": lr()}] for p in (mine, theirs)
    ]
    a, b = qadam.AdamW(groups[0]), torch.optim.AdamW(groups[1])
    schedules = SCHEDULERS[name](a), SCHEDULERS[name](b)
    seen = set()
    for step in range(11):
        train(1, a, b, first=step)
        for schedule in schedules:
            schedule.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        for g, h in zip(a.param_groups, b.param_groups, strict=True):
            assert float(g["lr"]) == float(h["lr"])
            assert g["betas"] == h["betas"]
        seen.add((float(a.param_groups[0]["lr"]), a.param_groups[0]["betas"]))
    assert len(seen) > 1
    near(mine, theirs)


def test_schedulers_that_need_momentum_see_betas():
    optimizer = qadam.AdamW(twins((3,))[0])
    lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=5, base_momentum=0.8, max_momentum=0.95)
    assert optimizer.param_groups[0]["betas"] == (0.95, 0.999)


# Learning rate as a tensor.


@pytest.mark.parametrize("cls", ADAMS)
def test_lr_as_a_zero_dimensional_tensor_is_read_at_every_step(cls):
    mine, theirs = twins((7,))
    lr = torch.tensor(0.25)
    a, b = cls(mine, lr=lr), cls(theirs, lr=0.25)
    train(2, a, b)
    lr.fill_(0.125)
    b.param_groups[0]["lr"] = 0.125
    train(2, a, b, first=2)
    assert same_bits(mine[0], theirs[0])
    assert a.param_groups[0]["lr"] is lr


# Closures and hooks.


def test_a_closure_runs_once_with_gradients_enabled_and_its_loss_is_returned():
    mine, theirs = twins((7,))
    a, b = qadam.AdamW(mine, lr=0.1), torch.optim.AdamW(theirs, lr=0.1)
    calls = []

    def closure(optimizer, p):
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    for _ in range(3):
        loss = a.step(lambda: closure(a, mine[0]))
        torch.testing.assert_close(loss, b.step(lambda: closure(b, theirs[0])))
    assert calls == [True] * 6
    assert loss.requires_grad
    near(mine, theirs)
    assert a.step() is None


def test_a_closure_that_raises_changes_nothing():
    optimizer = qadam.AdamW(twins((7,))[0])
    train(1, optimizer)
    before = frozen(optimizer)

    def closure():
        raise LookupError("no loss")

    with pytest.raises(LookupError, match="no loss"):
        optimizer.step(closure)
    assert frozen(optimizer) == before


def test_step_hooks_of_the_instance_and_of_all_optimizers_run_in_order():
    optimizer = qadam.AdamW(twins((3,))[0])
    give_grads(optimizer.param_groups[0]["params"], seed=0)
    calls = []

    def note(name):
        def hook(who, args, kwargs):
            assert who is optimizer
            calls.append((name, len(who.state)))

        return hook

    handles = [
        optimizer.register_step_pre_hook(note("own pre")),
        optimizer.register_step_post_hook(note("own post")),
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
    ]
    try:
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert sorted(calls[:2]) == [("global pre", 0), ("own pre", 0)]
    assert sorted(calls[2:]) == [("global post", 1), ("own post", 1)]
    optimizer.step()
    assert len(calls) == 4


def test_a_step_pre_hook_may_replace_the_closure():
    optimizer = qadam.AdamW(twins((3,))[0])
    optimizer.register_step_pre_hook(lambda who, args, kwargs: ((who, lambda: 42.0), {}))
    assert optimizer.step() == 42.0


def test_state_dict_hooks_run():
    optimizer = qadam.AdamW(twins((3,))[0])
    train(1, optimizer)
    calls = []
    optimizer.register_state_dict_pre_hook(lambda who: calls.append("pre"))
    optimizer.register_state_dict_post_hook(lambda who, saved: {**saved, "extra": 7})
    assert optimizer.state_dict()["extra"] == 7
    assert calls == ["pre"]


def test_load_state_dict_hooks_run_and_may_replace_the_dict():
    mine, theirs = twins((3,))
    a, b = qadam.AdamW(mine, lr=0.5), qadam.AdamW(theirs)
    train(2, a)
    saved = a.state_dict()
    seen = []

    def unwrap(who, wrapped):
        seen.append(("pre", len(who.state)))
        return wrapped["inner"]

    b.register_load_state_dict_pre_hook(unwrap)
    b.register_load_state_dict_post_hook(lambda who: seen.append(("post", len(who.state))))
    b.load_state_dict({"inner": saved})
    assert seen == [("pre", 0), ("post", 1)]
    assert b.param_groups[0]["lr"] == 0.5
    assert same_bits(b.state[theirs[0]]["exp_avg"], a.state[mine[0]]["exp_avg"])


def test_a_load_state_dict_pre_hook_may_change_its_argument_without_changing_the_callers_dict():
    mine, theirs = twins((3,))
    a, b = qadam.AdamW(mine), qadam.AdamW(theirs)
    train(1, a)
    saved = a.state_dict()

    def forget(who, state_dict):
        state_dict["state"] = {}

    b.register_load_state_dict_pre_hook(forget)
    b.load_state_dict(saved)
    assert len(saved["state"]) == 1
    assert len(b.state) == 0


# Gradients that are not there.


def test_zero_grad_clears_or_zeroes():
    params = twins((3,))[0]
    optimizer = qadam.AdamW(params)
    params[0].grad = torch.ones(3)
    optimizer.zero_grad(set_to_none=False)
    assert same_bits(params[0].grad, torch.zeros(3))
    optimizer.zero_grad()
    assert params[0].grad is None


@EACH_WIDTH
def test_a_parameter_without_gradient_keeps_its_state_and_step_count(width):
    mine, theirs = twins((300,), (300,))
    a = qadam.AdamW(mine, min_8bit_size=0, **WIDTHS[width])
    b = qadam.AdamW(theirs, min_8bit_size=0, **WIDTHS[width])
    mine[0].grad = torch.ones(300)
    a.step()
    assert list(a.state) == [mine[0]], "no gradient yet, no state yet"
    theirs[0].grad = torch.ones(300)
    b.step()
    train(1, a, b)
    held = fingerprint(mine[1]), {k: fingerprint(v) for k, v in a.state[mine[1]].items()}
    mine[1].grad = theirs[1].grad = None
    a.step()
    b.step()
    assert held == (fingerprint(mine[1]), {k: fingerprint(v) for k, v in a.state[mine[1]].items()})
    train(1, a, b, first=7)
    assert [a.state[p]["step"].item() for p in mine] == [4, 2]
    assert all(map(same_bits, mine, theirs))


def test_a_step_without_any_gradient_does_nothing():
    optimizer = qadam.AdamW8bit(twins((3,), (5000,))[0])
    before = frozen(optimizer)
    assert optimizer.step() is None
    assert frozen(optimizer) == before
    assert len(optimizer.state) == 0


def test_a_frozen_parameter_may_be_in_a_group():
    mine, theirs = twins((3,), (4,))
    for params in (mine, theirs):
        params[1].requires_grad_(False)
    a, b = qadam.AdamW(mine), torch.optim.AdamW(theirs)
    for optimizer, params in ((a, mine), (b, theirs)):
        params[0].grad = torch.ones(3)
        optimizer.step()
    near(mine, theirs)
    assert mine[1] not in a.state


# Copies.


def copies(optimizer):
    saved = io.BytesIO()
    torch.save(optimizer, saved)
    saved.seek(0)
    return {
        "pickle": pickle.loads(pickle.dumps(optimizer)),
        "deepcopy": copy.deepcopy(optimizer),
        "torch.save": torch.load(saved, weights_only=False),
    }


@pytest.mark.parametrize("cls", ADAMS)
@EACH_WIDTH
@pytest.mark.parametrize("how", ["pickle", "deepcopy", "torch.save"])
def test_a_copy_goes_on_alike_and_alone(cls, width, how):
    optimizer = cls(twins(*MIXED)[0], lr=0.01, nonfinite="propagate", **WIDTHS[width])
    train(3, optimizer)
    before = frozen(optimizer)
    other = copies(optimizer)[how]
    assert type(other) is cls
    train(3, other, first=3)
    assert frozen(optimizer) == before, "the copy shares nothing"
    train(3, optimizer, first=3)
    mine, theirs = (o.param_groups[0]["params"] for o in (optimizer, other))
    assert all(map(same_bits, mine, theirs))
    assert other.state_dict().keys() == optimizer.state_dict().keys()
    for p, q in zip(mine, theirs, strict=True):
        assert {k: fingerprint(v) for k, v in optimizer.state[p].items()} == {
            k: fingerprint(v) for k, v in other.state[q].items()
        }


@EACH_CODE
@pytest.mark.parametrize("how", ["pickle", "deepcopy", "torch.save"])
def test_a_copy_keeps_the_options_that_are_not_in_its_groups(how, code):
    params = twins((300,))[0]
    optimizer = qadam.AdamW(params, optim_bits=8, min_8bit_size=300, state_code=code)
    params[0].grad = torch.full((300,), float("nan"))
    with pytest.warns(RuntimeWarning, match="300 gradient elements"):
        optimizer.step()
    other = copies(optimizer)[how]
    assert other.nonfinite_count == 300
    of_copy, of_original = (re.sub(r"Memory: .*", "", repr(o)) for o in (other, optimizer))
    assert of_copy == of_original  # a copy has no launches on a device yet, and no memory for them
    for size, name in ((299, "exp_avg"), (300, "exp_avg_code")):
        p = Parameter(torch.ones(size))
        other.add_param_group({"params": [p]})
        p.grad = torch.ones(size)
        other.step()
        assert name in other.state[p]
    assert in_ratio(other.state[p]) == (code == "ratio")


@EACH_CODE
@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_a_copy_made_before_the_first_step_works(how, code):
    mine = twins(*MIXED)[0]
    optimizer = qadam.AdamW8bit(mine, state_code=code)
    other = copies(optimizer)[how]
    train(2, optimizer, other)
    assert all(map(same_bits, mine, other.param_groups[0]["params"]))


@EACH_CODE
def test_deepcopy_of_model_and_optimizer_together_keeps_them_together(code):
    model = nn.Sequential(nn.Linear(70, 70), nn.Linear(70, 3))
    optimizer = qadam.AdamW8bit(model.parameters(), lr=0.01, state_code=code)
    train(2, optimizer)
    other_model, other = copy.deepcopy((model, optimizer))
    assert all(
        p is q
        for p, q in zip(other_model.parameters(), other.param_groups[0]["params"], strict=True)
    )
    assert all(any(p is q for q in other.state) for p in other_model.parameters())
    train(2, optimizer, other, first=2)
    assert all(map(same_bits, model.parameters(), other_model.parameters()))


@EACH_CODE
def test_deepcopy_keeps_the_memory_order_of_state(code):
    p = Parameter(torch.randn(4, 8, 6, 6).to(memory_format=torch.channels_last))
    optimizer = qadam.AdamW8bit([p], min_8bit_size=0, state_code=code)
    train(2, optimizer)
    other = copy.deepcopy(optimizer)
    train(2, optimizer, other, first=2)
    assert same_bits(p, other.param_groups[0]["params"][0])


def test_repr_says_class_options_width_and_nonfinite():
    text = repr(qadam.AdamW8bit(twins((3,))[0], lr=0.25, min_8bit_size=77, nonfinite="raise"))
    for part in ("AdamW8bit (", "Parameter Group 0", "lr: 0.25", "betas: (0.9, 0.999)"):
        assert part in text
    assert "8-bit" in text
    assert "77" in text
    assert "raise" in text
    assert "32-bit" in repr(qadam.Adam(twins((3,))[0]))


# Checkpoints.


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("cls", ADAMS)
@EACH_WIDTH
def test_resume_is_bit_exact(cls, width):
    mine, theirs = twins(*MIXED)
    a = cls(mine, lr=0.01, weight_decay=0.1, **WIDTHS[width])
    schedule = lr_scheduler.ExponentialLR(a, 0.9)
    for step in range(4):
        train(1, a, first=step)
        schedule.step()
    saved = through_a_file(a.state_dict())
    with torch.no_grad():
        for p, q in zip(mine, theirs, strict=True):
            q.copy_(p)
    b = cls(theirs, **WIDTHS[width])
    resumed = lr_scheduler.ExponentialLR(b, 0.9)
    b.load_state_dict(saved)
    resumed.load_state_dict(schedule.state_dict())
    for step in range(4, 8):
        train(1, a, b, first=step)
        schedule.step()
        resumed.step()
    assert all(map(same_bits, mine, theirs))
    first, second = frozen(a), frozen(b)
    assert first[1:] == second[1:]


@EACH_CODE
def test_a_loaded_state_dict_shares_nothing_with_the_optimizer(code):
    mine, theirs = twins(*MIXED)
    a, b = (qadam.AdamW8bit(params, state_code=code) for params in (mine, theirs))
    train(2, a)
    saved = a.state_dict()
    before = copy.deepcopy(saved)
    b.load_state_dict(saved)
    train(2, b, first=2)
    assert str(saved["param_groups"]) == str(before["param_groups"])
    for index, entry in before["state"].items():
        for key, value in entry.items():
            assert fingerprint(saved["state"][index][key]) == fingerprint(value)


@EACH_CODE
def test_a_checkpoint_loaded_in_mid_training_replaces_all_state(code):
    mine, theirs = twins(*MIXED)
    a, b = (qadam.AdamW8bit(params, state_code=code) for params in (mine, theirs))
    train(3, a)
    train(5, b, first=10)
    b.load_state_dict(a.state_dict())
    with torch.no_grad():
        for p, q in zip(mine, theirs, strict=True):
            q.copy_(p)
    train(3, a, b, first=3)
    assert all(map(same_bits, mine, theirs))


@pytest.mark.parametrize(
    ("old", "new"), [(old, new) for old in WIDTHS for new in WIDTHS if old != new]
)
def test_resume_into_another_width(old, new):
    """From 8 to 32 bits nothing is lost; the other way the values are within one code step."""
    mine, theirs = twins((5000,), (3, 40))
    a = qadam.AdamW(mine, **WIDTHS[old])
    train(4, a)
    with torch.no_grad():
        for p, q in zip(mine, theirs, strict=True):
            q.copy_(p)
    b = qadam.AdamW(theirs, **WIDTHS[new])
    b.load_state_dict(through_a_file(a.state_dict()))
    assert ("exp_avg_code" in b.state[theirs[0]]) == (new != "32")
    assert in_ratio(b.state[theirs[0]]) == (new == "ratio")
    assert "exp_avg" in b.state[theirs[1]], "a small tensor is 32 bits wide either way"
    for p, q in zip(mine, theirs, strict=True):
        before, after = a.state[p], b.state[q]
        assert same_bits(before["step"], after["step"])
        for name in ("exp_avg", "exp_avg_sq"):
            x, y = state_values(before, name), state_values(after, name)
            if new != "32" and q is theirs[0]:
                assert ((x - y).abs() <= code_step(after, name)).all()
            else:
                torch.testing.assert_close(x, y, rtol=2e-7, atol=0)
    train(1, a, b, first=4)
    if (old, new) == ("dynamic", "32"):
        assert all(map(same_bits, mine, theirs)), "the same values, so the same next step"
    else:
        assert (mine[0] - theirs[0]).abs().max() < 1e-3
    train(3, b, first=5)
    assert all(b.state[q]["step"] == 8 for q in theirs)


# Mixed precision and real models.


def test_grad_scaler_unscales_steps_and_skips_overflow():
    mine, theirs = twins((7,), (300,))
    a, b = qadam.AdamW(mine), torch.optim.AdamW(theirs)
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2)]
    for step in range(5):
        for optimizer, params, scaler in ((a, mine, scalers[0]), (b, theirs, scalers[1])):
            optimizer.zero_grad()
            x = torch.full((7,), float("inf") if step == 2 else 0.5)
            loss = (params[0] * x).sum() + (params[1] ** 2).mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
    assert scalers[0].get_scale() == 512
    assert a.state[mine[0]]["step"] == 4
    assert a.nonfinite_count == 0
    near(mine, theirs)


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 50)

    def forward(self, x):
        return self.head(self.norm(self.embedding(x)))


@pytest.mark.parametrize(
    "make",
    [
        lambda p: qadam.Adam(p, lr=1e-2),
        lambda p: qadam.AdamW(p, lr=1e-2),
        lambda p: qadam.Adam8bit(p, lr=1e-2, min_8bit_size=64, state_code="dynamic"),
        lambda p: qadam.AdamW8bit(p, lr=1e-2, min_8bit_size=64, state_code="ratio"),
    ],
    ids=["Adam", "AdamW", "Adam8bit, dynamic", "AdamW8bit, ratio"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_learns(make, dtype):
    torch.manual_seed(0)
    model = Tiny().to(dtype)
    optimizer = make(model.parameters())
    x = torch.arange(50)
    y = (x * 7) % 50
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x).float(), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 3
    assert losses[-1] < 0.3


def test_optimizers_may_step_in_backward_hooks():
    """One optimizer a parameter, stepped as soon as its gradient is there."""
    torch.manual_seed(0)
    models = [nn.Linear(30, 20) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    together = qadam.AdamW(models[1].parameters())
    own = {p: qadam.AdamW([p]) for p in models[0].parameters()}

    def hook(p):
        own[p].step()
        own[p].zero_grad()

    for p in own:
        p.register_post_accumulate_grad_hook(hook)
    for step in range(3):
        x = torch.full((4, 30), 1.0 + step)
        for model in models:
            (model(x) ** 2).mean().backward()
        together.step()
        together.zero_grad()
    assert all(map(same_bits, models[0].parameters(), models[1].parameters()))


def test_a_step_counts_as_an_in_place_write_for_autograd():
    """Otherwise a backward of the old graph would silently use the new values."""
    p = Parameter(torch.ones(3))
    loss = (p**2).sum()
    p.grad = torch.ones(3)
    version = p._version
    qadam.AdamW([p]).step()
    assert p.is_leaf
    assert p.requires_grad
    assert p._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
