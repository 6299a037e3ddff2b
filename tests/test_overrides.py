"""Options of single parameters: group keys, ``args``, and the GlobalOptimManager."""

import copy
import gc
from types import SimpleNamespace

import pytest
import torch
from conftest import CODES, give_grads, in_ratio, same_bits, train, twins
from torch import nn
from torch.nn import Parameter
from torch.optim.lr_scheduler import LambdaLR, StepLR

import qadam


@pytest.fixture
def manager():
    """The manager, without overrides before and after."""
    manager = qadam.GlobalOptimManager.get_instance()
    manager.initialize()
    yield manager
    manager.initialize()


def width(optimizer, param):
    """The bits of a parameter's state."""
    return 8 if "exp_avg_code" in optimizer.state[param] else 32


# Group keys.


def test_a_group_has_its_own_width_threshold_and_paging():
    a, b, c, d = (torch.ones(100_000, requires_grad=True) for _ in range(4))
    groups = [
        {"params": [a]},
        {"params": [b], "optim_bits": 32},
        {"params": [c], "min_8bit_size": 100_001},
        {"params": [d], "is_paged": True, "optim_bits": 32},
    ]
    optimizer = qadam.AdamW8bit(groups)
    train(1, optimizer)
    assert [width(optimizer, p) for p in (a, b, c, d)] == [8, 32, 32, 32]
    assert [qadam.paging.is_paged(optimizer.state[p]) for p in (a, b, c, d)] == [
        False,
        False,
        False,
        True,
    ]


def test_a_paged_class_leaves_a_group_alone_that_says_so():
    a, b = (torch.ones(100_000, requires_grad=True) for _ in range(2))
    original = qadam.PagedAdam([{"params": [a]}, {"params": [b], "is_paged": False}])
    train(1, original)
    for optimizer in (original, copy.deepcopy(original)):
        entries = list(optimizer.state.values())
        assert [qadam.paging.is_paged(entry) for entry in entries] == [True, False]


def test_group_keys_count_when_a_state_dict_is_loaded():
    (a,), (b,) = twins(5000)
    eight = qadam.Adam8bit([a])
    train(2, eight)
    wide = qadam.Adam8bit([{"params": [b], "optim_bits": 32}])
    saved = eight.state_dict()
    saved["param_groups"][0]["optim_bits"] = 32
    wide.load_state_dict(saved)
    assert width(wide, b) == 32


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("optim_bits", 16),
        ("min_8bit_size", -1),
        ("min_8bit_size", 1.5),
        ("percentile_clipping", 0),
        ("state_code", "foo"),
        ("nonfinite", "raise"),
        ("args", SimpleNamespace()),
    ],
)
def test_a_bad_group_key_is_named_and_the_group_not_added(option, value):
    optimizer = qadam.AdamW([Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match=option):
        optimizer.add_param_group({"params": [Parameter(torch.ones(3))], option: value})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("other", CODES)
@pytest.mark.parametrize("own", CODES)
def test_a_group_has_its_own_code(own, other):
    params = [torch.ones(5000, requires_grad=True) for _ in range(2)]
    groups = [{"params": params[:1]}, {"params": params[1:], "state_code": other}]
    optimizer = qadam.AdamW8bit(groups, state_code=own)
    train(1, optimizer)
    of = ["ratio" if in_ratio(optimizer.state[p]) else "dynamic" for p in params]
    assert of == [own, other]
    saved = optimizer.state_dict()
    assert [group.get("state_code") for group in saved["param_groups"]] == [None, other]
    again = qadam.AdamW8bit([{"params": params[:1]}, {"params": params[1:]}], state_code=own)
    again.load_state_dict(saved)  # a group's key is the dict's
    of = ["ratio" if in_ratio(again.state[p]) else "dynamic" for p in params]
    assert of == [own, other]


# args.


def test_args_replace_keywords_and_what_they_lack_stays():
    (param,) = twins(5000, n=1)[0:1][0]
    args = SimpleNamespace(optim_bits=8, min_8bit_size=5000, percentile_clipping=100)
    optimizer = qadam.Adam([param], optim_bits=32, args=args, min_8bit_size=9999)
    train(1, optimizer)
    assert width(optimizer, param) == 8
    args = SimpleNamespace(block_wise=True, max_unorm=0.0, skip_zeros=False)
    optimizer = qadam.Adam([param], optim_bits=8, args=args, min_8bit_size=5001)
    train(1, optimizer)
    assert width(optimizer, param) == 32


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("optim_bits", 16),
        ("min_8bit_size", -3),
        ("percentile_clipping", 0),
        ("state_code", "foo"),
    ],
)
def test_bad_args_are_named(attribute, value):
    args = SimpleNamespace(**{attribute: value})
    with pytest.raises(ValueError, match=attribute):
        qadam.AdamW([Parameter(torch.ones(3))], args=args)


def test_args_may_not_contradict_the_class():
    with pytest.raises(ValueError, match="AdamW32bit keeps 32-bit state, got optim_bits=8"):
        qadam.AdamW32bit([Parameter(torch.ones(3))], args=SimpleNamespace(optim_bits=8))


# The manager.


def test_there_is_one_manager_at_both_places(manager):
    assert qadam.optim.GlobalOptimManager.get_instance() is manager
    with pytest.raises(RuntimeError, match="get_instance"):
        qadam.GlobalOptimManager()


def test_an_override_changes_one_parameters_state(manager):
    a, b = (torch.ones(100_000, requires_grad=True) for _ in range(2))
    manager.register_parameters([a, b])
    manager.override_config(a, "optim_bits", 32)
    manager.override_config([a], key_value_dict={"is_paged": True})
    optimizer = qadam.AdamW8bit([a, b])
    train(1, optimizer)
    assert [width(optimizer, p) for p in (a, b)] == [32, 8]
    assert [qadam.paging.is_paged(optimizer.state[p]) for p in (a, b)] == [True, False]


@pytest.mark.parametrize("code", CODES)
def test_an_override_changes_one_parameters_code(manager, code):
    """Before the first step, and where a state dict is loaded; not state that is there."""
    params, others = twins((5000,), (6000,), (7000,))
    usual = next(name for name in CODES if name != code)
    manager.override_config(params[0], "state_code", code)
    optimizer = qadam.AdamW8bit(params, state_code=usual)
    train(1, optimizer)
    manager.override_config([params[1], others[2]], "state_code", code)
    train(1, optimizer)
    assert [in_ratio(optimizer.state[p]) == (code == "ratio") for p in params] == [
        True,
        False,
        False,
    ]
    loaded = qadam.AdamW8bit(others, state_code=usual)
    loaded.load_state_dict(optimizer.state_dict())
    assert [in_ratio(loaded.state[p]) == (code == "ratio") for p in others] == [False, False, True]
    optimizer.load_state_dict(optimizer.state_dict())
    assert [in_ratio(optimizer.state[p]) == (code == "ratio") for p in params] == [
        True,
        True,
        False,
    ]


def test_overridden_hyperparameters_are_those_of_a_group_of_its_own(manager):
    ours, theirs = twins((300,), (70, 80))
    options = {"betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.3, "lr": 0.05}
    manager.override_config(ours[1], key_value_dict=options)
    overridden = qadam.AdamW8bit(ours)
    grouped = qadam.AdamW8bit([{"params": theirs[:1]}, {"params": theirs[1:], **options}])
    train(5, overridden, grouped)
    assert all(same_bits(a, b) for a, b in zip(ours, theirs, strict=True))


def test_an_overridden_lr_follows_a_scheduler_and_survives_saving(manager):
    ours, theirs = twins((300,), (400,))
    manager.override_config(ours[1], "lr", 0.05)
    overridden = qadam.AdamW(ours, lr=1e-3)
    grouped = qadam.AdamW([{"params": theirs[:1], "lr": 1e-3}, {"params": theirs[1:], "lr": 0.05}])
    schedulers = [StepLR(optimizer, 2, 0.5) for optimizer in (overridden, grouped)]
    for first in range(5):
        train(1, overridden, grouped, first=first)
        for scheduler in schedulers:
            scheduler.step()
    again = qadam.AdamW(ours, lr=7.0)
    again.load_state_dict(overridden.state_dict())
    train(1, again, grouped, first=5)
    assert all(same_bits(a, b) for a, b in zip(ours, theirs, strict=True))


def test_an_overridden_lr_follows_changes_by_hand_and_warm_up_from_zero(manager):
    (param,), _ = twins(300)
    manager.override_config(param, "lr", 0.1)
    optimizer = qadam.Adam([param], lr=1e-3)

    def moved():
        before = param.detach().clone()
        give_grads([param], seed=0)
        param.grad.fill_(1.0)
        optimizer.step()
        return float((before - param.detach()).mean())

    assert moved() == pytest.approx(0.1, rel=1e-3)
    optimizer.param_groups[0]["lr"] *= 0.5
    assert moved() == pytest.approx(0.05, rel=1e-3)

    (param,), _ = twins(300)
    manager.override_config(param, "lr", 0.1)
    optimizer = qadam.Adam([param], lr=1e-3)
    scheduler = LambdaLR(optimizer, lambda step: step / 2)
    assert moved() == 0.0
    scheduler.step()
    assert moved() == pytest.approx(0.05, rel=1e-2)


def test_an_override_ends_with_its_parameter(manager):
    """Python reuses addresses: an override by ``id`` would find another parameter."""
    for _ in range(100):
        param = Parameter(torch.ones(3))
        manager.override_config(param, "lr", 9.0)
        del param
        gc.collect(0)
        others = [Parameter(torch.ones(3)) for _ in range(3)]
        assert manager.configs() == {}
        del others


def test_a_module_override_follows_the_modules_parameter(manager):
    module = nn.Linear(70, 80)
    manager.register_module_override(module, "weight", {"optim_bits": 32})
    module.weight = Parameter(torch.ones(80, 70))
    other = nn.Linear(70, 80)
    optimizer = qadam.AdamW8bit([*module.parameters(), *other.parameters()])
    train(1, optimizer)
    assert (width(optimizer, module.weight), width(optimizer, other.weight)) == (32, 8)
    manager.override_config(module.weight, "optim_bits", 8)  # the nearer one counts
    assert manager.configs()[id(module.weight)] == {"optim_bits": 8}
    del module, optimizer
    gc.collect()
    assert manager.configs() == {}


def test_other_parameters_and_optimizers_are_not_affected(manager):
    ours, theirs = twins((300,), (5000,))
    stranger = Parameter(torch.ones(3))
    manager.override_config(stranger, "lr", 5.0)
    a = qadam.Adam8bit(ours)
    train(2, a)
    manager.initialize()
    b = qadam.Adam8bit(theirs)
    train(2, b)
    assert all(same_bits(p, q) for p, q in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"lr": -1.0}, ValueError),
        ({"betas": (0.9, 1.0)}, ValueError),
        ({"eps": float("nan")}, ValueError),
        ({"optim_bits": 4}, ValueError),
        ({"state_code": "foo"}, ValueError),
        ({"weight_decay": "much"}, (TypeError, ValueError)),
    ],
)
def test_an_override_out_of_range_is_refused_at_once(manager, options, error):
    params, _ = twins((300,), (400,))
    manager.override_config(params[1], "lr", 0.5)
    before = manager.configs()
    for override in (
        lambda: manager.override_config(params[1], key_value_dict=options),
        lambda: manager.register_module_override(nn.Linear(2, 2), "weight", options),
    ):
        with pytest.raises(error, match=next(iter(options))):
            override()
    assert manager.configs() == before


def test_an_override_leaves_a_schedule_alone_that_passes_below_zero(manager):
    (param,), _ = twins(300)
    manager.override_config(param, "eps", 1e-6)
    optimizer = qadam.AdamW([param])
    optimizer.param_groups[0]["lr"] = -1e-20
    train(1, optimizer)


def test_an_overridden_lr_is_relative_to_the_constructors_in_a_warm_up_by_hand(manager):
    (param,), _ = twins(300)
    manager.override_config(param, "lr", 1e-4)
    optimizer = qadam.Adam([param], lr=1e-3)
    for step in range(11):
        optimizer.param_groups[0]["lr"] = 1e-3 * step / 10
        before = param.detach().clone()
        param.grad = torch.ones_like(param)
        optimizer.step()
        moved = float((before - param.detach()).mean())
        assert moved == pytest.approx(1e-4 * step / 10, rel=1e-2)
        optimizer = copy.deepcopy(optimizer) if step == 5 else optimizer
        param = optimizer.param_groups[0]["params"][0]
        manager.override_config(param, "lr", 1e-4)
    assert "unscheduled_lr" not in optimizer.state_dict()["param_groups"][0]


def test_what_cannot_be_overridden_is_refused_and_nothing_is(manager):
    param = Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="'momentum' cannot be overridden"):
        manager.override_config(param, key_value_dict={"lr": 0.1, "momentum": 0.9})
    with pytest.raises(TypeError, match="parameters must be tensors, got str"):
        manager.override_config([param, "weight"], "lr", 0.1)
    with pytest.raises(TypeError, match="parameters must be tensors"):
        manager.register_parameters([{"params": [3]}])
    with pytest.raises(ValueError, match="'nope'"):
        manager.register_module_override(nn.Linear(2, 2), "weight", {"nope": 1})
    assert manager.configs() == {}
