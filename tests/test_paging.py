"""Paged state: the bits, the dicts and the copies of state that is not, and where its bytes are."""

import copy
import io
import itertools
import pickle
import threading
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    CODES,
    SOFTWARE,
    WIDTHS,
    fingerprint,
    frozen,
    give_grads,
    same_bits,
    train,
    twins,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import Parameter

import qadam
from qadam import _core, paging
from qadam import state as qstate
from qadam.codes import CODES as CODES_BY_NAME

BASES = [
    getattr(qadam, rule + width) for rule in ("Adam", "AdamW") for width in ("", "8bit", "32bit")
]
TIER = "mapped" if SOFTWARE is None else "managed"
"""Where paged state is, for CPU parameters and for those of the software device."""
SHAPES = [(100_000,), (3000,), (40, 50, 51), ()]
"""The first and the third are paged; of the others, one is large enough for 8 bits, if 4096 is."""
OPTIONS = {
    "32": {},
    "8": {"optim_bits": 8, "state_code": "dynamic"},
    "ratio": {"optim_bits": 8, "state_code": "ratio"},
    "mixed": {"optim_bits": 8, "min_8bit_size": 101_000, "state_code": "dynamic"},
    "cut": {
        "optim_bits": 8,
        "state_code": "ratio",
        "percentile_clipping": 20,
        "max_grad_norm": 1.0,
    },
    "measured": {
        "optim_bits": 8,
        "state_code": "dynamic",
        "block_wise": False,
        "args": SimpleNamespace(max_unorm=1e-3),
    },
    "measured ratio": {
        "optim_bits": 8,
        "state_code": "ratio",
        "block_wise": False,
        "amsgrad": True,
        "args": SimpleNamespace(max_unorm=1e-3),
    },
}
WIDTH = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def parameters(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def values(optimizer):
    """Parameters and state, bit by bit, wherever they are."""
    return [fingerprint(p) for p in parameters(optimizer)], frozen(optimizer)[1]


def tiers(optimizer):
    """Where the moments of each parameter are."""
    found = []
    for p in parameters(optimizer):
        entry = optimizer.state.get(p, {})
        moments = [value for key, value in entry.items() if key.startswith("exp_avg")]
        found.append("/".join(sorted({_core.memory_tier(moment)[0] for moment in moments})))
    return found


def both(*shapes, cls=qadam.AdamW, dtype=torch.float32, **options):
    """An optimizer whose state is not paged, and its twin, whose state is."""
    plain, paged = twins(*shapes, dtype=dtype)
    return cls(plain, **options), cls(paged, is_paged=True, **options)


def all_paged(optimizer):
    """Whether exactly those tensors' state is paged that ought to be."""
    large = [p.numel() >= paging.LEAST for p in parameters(optimizer)]
    return [tier == TIER for tier in tiers(optimizer)] == large


# The same bits.


@pytest.mark.parametrize("cls", BASES)
def test_the_paged_class_and_is_paged_have_the_bits_of_the_class(cls):
    a, b, c = twins(*SHAPES, n=3)
    plain, named, asked = (
        cls(a, weight_decay=0.1),
        getattr(qadam, f"Paged{cls.__name__}")(b, weight_decay=0.1),
        cls(c, weight_decay=0.1, is_paged=True),
    )
    assert isinstance(named, cls)
    train(3, plain, named, asked)
    assert values(plain) == values(named) == values(asked)
    assert all_paged(named)
    assert all_paged(asked)
    assert TIER not in tiers(plain)


@WIDTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_width_and_dtype_has_the_bits_of_state_in_memory(options, dtype):
    plain, paged = both(*SHAPES, dtype=dtype, **options)
    train(3, plain, paged)
    assert values(plain) == values(paged)
    assert all_paged(paged)


def padded(t):
    return torch.zeros(*t.shape[:-1], 2 * t.shape[-1] + 1)[..., 1::2].copy_(t)


LAYOUTS = {
    "transposed": lambda t: t.transpose(0, 3).contiguous().transpose(0, 3),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "gaps": padded,
}


@pytest.mark.parametrize("of_grad", ["contiguous", *LAYOUTS])
@pytest.mark.parametrize("of_param", ["contiguous", *LAYOUTS])
@pytest.mark.parametrize("width", WIDTHS)
def test_every_memory_order_has_the_bits_of_state_in_memory(width, of_param, of_grad, monkeypatch):
    monkeypatch.setattr(paging, "LEAST", 1)  # small tensors, for the software device's sake
    shape = (5, 6, 10, 17)
    value, grad = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    identity = torch.Tensor.clone
    optimizers = []
    for is_paged in (False, True):
        p = Parameter(LAYOUTS.get(of_param, identity)(value))
        p.grad = LAYOUTS.get(of_grad, identity)(grad)
        optimizers.append(qadam.Adam([p], is_paged=is_paged, **WIDTHS[width]))
    for optimizer in optimizers:
        optimizer.step()
        optimizer.step()
    plain, paged = optimizers
    assert values(plain) == values(paged)
    assert tiers(paged) == [TIER]


@WIDTH
def test_only_parameters_of_100_000_elements_are_paged(options):
    sizes = [99_999, 100_000, 100_001]
    plain, paged = both(*((n,) for n in sizes), **options)
    train(2, plain, paged)
    assert values(plain) == values(paged)
    assert [tier == TIER for tier in tiers(paged)] == [False, True, True]


@WIDTH
@pytest.mark.cpu_only
@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("limit", [None, "0"])
def test_any_number_of_threads_gives_the_same_bits(threads, limit, options, monkeypatch):
    if limit is not None:
        monkeypatch.setenv("QADAM_PAGE_MEMORY", limit)
    before = torch.get_num_threads()
    plain, paged = both((700_001,), (5000,), (300, 900), **options)
    try:
        train(2, plain)
        torch.set_num_threads(threads)
        train(2, paged)
    finally:
        torch.set_num_threads(before)
    assert values(plain) == values(paged)


@WIDTH
def test_parameters_without_gradients_and_ones_added_later_are_like_others(options):
    plain, paged = both((100_000,), (101_000,), (300,), **options)
    mine, theirs = parameters(plain), parameters(paged)
    for step in range(4):
        give_grads(mine, theirs, seed=step)
        if step < 2:
            mine[step].grad = theirs[step].grad = None
        if step == 2:
            added = twins((102_000,), (200,), seed=9)
            for optimizer, params in zip((plain, paged), added, strict=True):
                optimizer.add_param_group({"params": params, "lr": 0.1})
            give_grads(*added, seed=7)
        plain.step()
        paged.step()
        assert values(plain) == values(paged)
    assert all_paged(paged)
    assert [paged.state[p]["step"].item() for p in parameters(paged)] == [3, 3, 4, 2, 2]


# Out of memory and back.


@pytest.mark.cpu_only
@pytest.mark.parametrize("limit", ["0", "1000000", "20000000", None])
@WIDTH
def test_state_that_is_streamed_through_memory_has_the_same_bits(options, limit, monkeypatch):
    """Many windows, within parameters and over several: 22 MB of state at 32 bits, 5.6 at 8."""
    if limit is not None:
        monkeypatch.setenv("QADAM_PAGE_MEMORY", limit)
    plain, paged = both((2_000_003,), (130_000,), (50_000,), (700, 900), **options)
    for step in range(3):
        train(1, plain, paged, first=step)
        assert values(plain) == values(paged)  # which also brings all of it back into memory


@pytest.mark.cpu_only
def test_optimizers_of_different_limits_step_side_by_side(monkeypatch):
    """On threads of their own, the state of one being let go while the other's is needed."""
    pairs = []
    for limit, code in (("0", "dynamic"), ("4000000", "ratio")):
        monkeypatch.setenv("QADAM_PAGE_MEMORY", limit)
        pairs.append(both((900_000,), (150_000,), optim_bits=8, state_code=code))
    errors = []

    def run(paged):
        try:
            for _ in range(5):
                paged.step()
        except BaseException as error:
            errors.append(error)

    for seed, pair in enumerate(pairs):
        give_grads(*map(parameters, pair), seed=seed)
        for _ in range(5):
            pair[0].step()
    threads = [threading.Thread(target=run, args=(paged,)) for _, paged in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    for plain, paged in pairs:
        assert values(plain) == values(paged)


def test_two_optimizers_in_turn_do_not_disturb_each_other():
    pairs = [both((100_000 + n,), **options) for n, options in enumerate(WIDTHS.values())]
    for seed, pair in itertools.product(range(2), pairs):
        train(1, *pair, first=seed)
    for plain, paged in pairs:
        assert values(plain) == values(paged)


TENSORS = st.tuples(
    st.sampled_from([0, 1, 4096, 99_999, 100_000, 100_001, 131_072, 150_001, 300_000]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)


@pytest.mark.cpu_only
@settings(max_examples=30, deadline=None)
@given(
    tensors=st.lists(TENSORS, min_size=1, max_size=5),
    width=st.sampled_from(sorted(WIDTHS)),
    least=st.sampled_from([0, 4096, 100_001]),
    limit=st.sampled_from(["", "0", "300000", "2000000"]),
    seed=st.integers(0, 99),
)
def test_any_list_of_tensors_gives_the_same_bits(tensors, width, least, limit, seed):
    optimizers = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QADAM_PAGE_MEMORY", limit)
        for is_paged in (False, True):
            params = [
                p
                for i, (n, dtype) in enumerate(tensors)
                for p in twins((n,), n=1, dtype=dtype, seed=seed + i)[0]
            ]
            optimizers.append(
                qadam.Adam(params, min_8bit_size=least, is_paged=is_paged, **WIDTHS[width])
            )
        train(2, *optimizers, first=seed)
    plain, paged = optimizers
    assert values(plain) == values(paged)
    assert all_paged(paged)


# State dicts.


def saved(optimizer):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    return file


@WIDTH
def test_a_state_dict_does_not_say_whether_it_was_paged(options):
    plain, paged = both(*SHAPES, **options)
    train(2, plain, paged)
    mine, theirs = (
        [
            (i, [(k, fingerprint(v)) for k, v in e.items()])
            for i, e in o.state_dict()["state"].items()
        ]
        for o in (plain, paged)
    )
    assert mine == theirs  # in order
    assert plain.state_dict()["param_groups"] == paged.state_dict()["param_groups"]
    a, b = saved(plain), saved(paged)
    assert len(a.getvalue()) == len(b.getvalue())
    # torch's pickles name each storage by its address, in decimal: at most 20 digits
    digits = 20 * sum(len(entry) for entry in plain.state_dict()["state"].values())
    sizes = [len(pickle.dumps(o.state_dict())) for o in (plain, paged)]
    assert abs(sizes[0] - sizes[1]) <= digits


@pytest.mark.parametrize("new", WIDTHS)
@pytest.mark.parametrize("old", WIDTHS)
@pytest.mark.parametrize("how", ["state_dict", "torch.save", "deepcopy", "pickle"])
def test_a_dict_loads_into_any_width_paged_or_not(old, new, how):
    sources = both((100_100,), (5000,), **WIDTHS[old])
    train(2, *sources)
    loaded = []
    for source in sources:
        state = source.state_dict()
        if how == "torch.save":
            file = saved(source)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        elif how == "deepcopy":
            state = copy.deepcopy(state)
        elif how == "pickle":
            state = pickle.loads(pickle.dumps(state))
        before = values(source)
        targets = both((100_100,), (5000,), **WIDTHS[new])
        for target in targets:
            target.load_state_dict(state)
            with torch.no_grad():
                for p, q in zip(parameters(target), parameters(source), strict=True):
                    p.copy_(q)
        assert tiers(targets[1])[0] == TIER
        assert TIER not in tiers(targets[0])
        loaded += targets
        train(1, *targets, first=2)
        assert values(source) == before, "nothing is shared"
    first = values(loaded[0])
    assert all(values(other) == first for other in loaded[1:])
    if old == new:
        train(1, sources[1], first=2)
        assert values(sources[1]) == first


@pytest.mark.parametrize("code", CODES)
def test_a_dict_loaded_in_mid_training_replaces_paged_state(code):
    plain, paged = both((100_000,), (300,), optim_bits=8, state_code=code)
    train(2, plain, paged)
    checkpoint = copy.deepcopy(plain.state_dict())
    train(2, plain, paged, first=2)
    for optimizer in (plain, paged):
        optimizer.load_state_dict(checkpoint)
    train(1, plain, paged, first=4)
    assert values(plain) == values(paged)
    assert all_paged(paged)


def test_a_refused_dict_leaves_a_paged_optimizer_as_it_was():
    optimizer = both((100_000,), (101_000,))[1]
    train(2, optimizer)
    damaged = copy.deepcopy(optimizer.state_dict())
    damaged["state"][1]["exp_avg"][5] = float("nan")
    before = frozen(optimizer)
    with pytest.raises(ValueError, match="exp_avg"):
        optimizer.load_state_dict(damaged)
    assert frozen(optimizer) == before
    assert all_paged(optimizer)


def test_an_unpaged_optimizers_state_takes_over_after_paging_by_hand():
    """A user may put tensors of his own into the state."""
    plain, paged = both((100_000,), (101_000,))
    train(1, plain, paged)
    entry = paged.state[parameters(paged)[0]]
    entry["exp_avg"] = entry["exp_avg"].clone()  # one moment paged, the other not
    paged.state[parameters(paged)[1]]["exp_avg_sq"] = torch.zeros(101_000)
    plain.state[parameters(plain)[1]]["exp_avg_sq"] = torch.zeros(101_000)
    train(2, plain, paged, first=1)
    assert values(plain) == values(paged)


# Copies.

COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
    "torch.save": lambda optimizer: torch.load(whole(optimizer), weights_only=False),
}
COPY = pytest.mark.parametrize("how", COPIES)


def whole(optimizer):
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return file


@COPY
@pytest.mark.parametrize("cls", [qadam.PagedAdam, qadam.PagedAdamW])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_copy_is_paged_and_goes_on_alike_and_alone(width, cls, how):
    optimizer = cls(twins((100_000,), (300,))[0], **WIDTHS[width])
    train(2, optimizer)
    before = frozen(optimizer)
    other = COPIES[how](optimizer)
    assert type(other) is cls
    assert values(other) == values(optimizer)
    assert all_paged(other)
    train(1, other, first=2)
    assert frozen(optimizer) == before
    train(1, optimizer, first=2)
    assert values(other) == values(optimizer)


@COPY
@pytest.mark.parametrize("width", WIDTHS)
def test_a_copy_made_before_the_first_step_pages_what_it_makes(width, how):
    plain, paged = both((100_000,), (300,), **WIDTHS[width])
    other = COPIES[how](paged)
    assert other.memory() == paged.memory()
    train(2, plain, other)
    assert values(plain) == values(other)
    assert all_paged(other)
    assert not paged.state


@COPY
def test_moments_that_are_nan_survive_a_copy(how):
    plain, paged = both((100_000,), (101_000,), nonfinite="propagate")
    train(1, plain, paged)
    for optimizer in (plain, paged):
        parameters(optimizer)[0].grad[7] = float("nan")
        optimizer.step()
    moment = paged.state[parameters(paged)[0]]["exp_avg"]
    assert moment.isnan().sum() == 1
    other = COPIES[how](paged)
    assert values(other) == values(paged) == values(plain)
    assert all_paged(other)


@COPY
@pytest.mark.parametrize("moments", [True, False])
def test_whatever_else_an_entry_holds_survives_a_copy(how, moments):
    optimizer = both((100_000,), (101_000,))[1]
    if moments:
        train(1, optimizer)
    notes = {"text": "x", "tensor": torch.arange(5), "none": None, "note": [1]}
    entry = optimizer.state[parameters(optimizer)[0]]
    entry.update(copy.deepcopy(notes))
    other = COPIES[how](optimizer)
    copied = other.state[parameters(other)[0]]
    assert list(copied) == list(entry)
    assert copied["tensor"] is not entry["tensor"]
    assert {key: fingerprint(copied[key]) for key in notes} == {
        key: fingerprint(value) for key, value in notes.items()
    }
    if moments:
        assert all_paged(other)
        other.load_state_dict(optimizer.state_dict())
        loaded = other.state[parameters(other)[0]]
        assert {key: fingerprint(loaded[key]) for key in notes} == {
            key: fingerprint(value) for key, value in notes.items()
        }


@pytest.mark.parametrize("code", CODES)
def test_a_model_and_its_optimizer_copied_together_stay_together(code):
    model = torch.nn.Linear(400, 300)
    optimizer = qadam.PagedAdamW8bit(model.parameters(), state_code=code)
    train(1, optimizer)
    other_model, other = copy.deepcopy((model, optimizer))
    mine, theirs = parameters(other), list(other_model.parameters())
    assert [id(p) for p in mine] == [id(p) for p in theirs]
    assert list(other.state) == mine
    assert all_paged(other)
    before = frozen(optimizer)
    train(1, other, first=1)
    assert frozen(optimizer) == before
    train(1, optimizer, first=1)
    assert all(map(same_bits, model.parameters(), other_model.parameters()))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_what_state_shares_with_the_rest_of_a_copied_object_it_still_shares(how):
    optimizer = both((100_000,), (300,))[1]
    train(1, optimizer)
    shared = [1, 2]
    for p in parameters(optimizer):
        optimizer.state[p]["shared"] = shared
    copied_list, other = COPIES[how]((shared, optimizer))
    assert all(other.state[p]["shared"] is copied_list for p in parameters(other))


def test_a_reference_to_a_state_tensor_follows_the_copy():
    optimizer = both((100_000,), (300,))[1]
    train(1, optimizer)
    moments = [optimizer.state[p]["exp_avg"] for p in parameters(optimizer)]
    other, copied = copy.deepcopy((optimizer, moments))
    assert [id(t) for t in copied] == [id(other.state[p]["exp_avg"]) for p in parameters(other)]


# Where the bytes are.

NOTHING = {
    tier: {"state": 0, "scales": 0, "work": 0} for tier in ("device", "managed", "host", "mapped")
}
ORDINARY = "host" if SOFTWARE is None else "device"
PAGE = 4096
HUGE = 2 << 20
"""A managed arena begins at a multiple of this, and may have so much more than it needs."""


def of_state(memory):
    """Bytes that hold state, by tier."""
    return {
        tier: {use: count for use, count in uses.items() if use != "work"}
        for tier, uses in memory.items()
    }


@pytest.mark.parametrize("is_paged", [False, True])
def test_memory_is_empty_before_the_first_step(is_paged):
    optimizer = qadam.AdamW(twins((100_000,))[0], is_paged=is_paged)
    assert optimizer.memory() == NOTHING
    assert "no state yet" in repr(optimizer)


LARGE, SMALL = 100_000, 5000
BLOCKS = -(-LARGE // 256), -(-SMALL // 256)
# moments at 4 or 1 bytes an element; "step" of 4 bytes; "memory_order" of 8 a dimension; scales of
# 4 bytes, two of them a range
EXACT = {
    ("32", False): ({"state": 8 * (LARGE + SMALL) + 8, "scales": 0}, {"state": 0, "scales": 0}),
    ("32", True): ({"state": 8 * SMALL + 8, "scales": 0}, {"state": 8 * LARGE, "scales": 0}),
}
for _code, _scales in (("dynamic", 8), ("ratio", 12)):
    EXACT[_code, False] = (
        {"state": 2 * (LARGE + SMALL) + 2 * (4 + 8), "scales": _scales * sum(BLOCKS)},
        {"state": 0, "scales": 0},
    )
    EXACT[_code, True] = (
        {"state": 2 * SMALL + 2 * (4 + 8), "scales": _scales * BLOCKS[1]},
        {"state": 2 * LARGE, "scales": _scales * BLOCKS[0]},
    )


@pytest.mark.parametrize(("width", "is_paged"), EXACT)
def test_memory_counts_every_byte_of_state_once(width, is_paged):
    params = twins((LARGE,), (SMALL,), (7,))[0][:2]
    optimizer = qadam.AdamW(params, is_paged=is_paged, **WIDTHS[width])
    train(1, optimizer)
    memory = optimizer.memory()
    ordinary, paged = EXACT[width, is_paged]
    assert of_state(memory) == of_state(NOTHING) | {ORDINARY: ordinary, TIER: paged}
    extra = memory[TIER]["work"]
    if is_paged:
        gaps = 4 * 64  # each of the four tensors begins at a multiple
        assert 0 <= extra < PAGE + gaps + (HUGE if TIER == "managed" else 0)
        assert (extra + sum(paged.values())) % PAGE == 0
    else:
        assert extra == 0
    if SOFTWARE is None:
        assert memory["device"]["work"] == memory["host"]["work"] == 0
    else:
        assert memory["device"]["work"] > 0
        assert memory["host"]["work"] > 0


def test_memory_of_an_optimizer_of_both_widths_adds_up():
    params = twins((LARGE,), (LARGE + 1000,))[0]
    options = {"optim_bits": 8, "min_8bit_size": LARGE + 1, "state_code": "dynamic"}
    optimizer = qadam.PagedAdam(params, **options)
    train(1, optimizer)
    scales = 8 * -(-(LARGE + 1000) // 256)
    memory = optimizer.memory()[TIER]
    assert (memory["state"], memory["scales"]) == (8 * LARGE + 2 * (LARGE + 1000), scales)
    assert f"{TIER} (state 978.5 KiB, scales 3.1 KiB" in repr(optimizer)
    assert "paged for tensors of at least 100000 elements" in repr(optimizer)


def test_repr_of_what_is_not_paged_does_not_speak_of_paging():
    optimizer = qadam.Adam(twins((LARGE,))[0])
    train(1, optimizer)
    assert "paged" not in repr(optimizer)
    assert f"{ORDINARY} (state 781.3 KiB" in repr(optimizer)


# Failures leave everything as it was.


def spoil_nan(params):
    params[-1].grad[3] = float("nan")


def spoil_kind(params):
    params[-1].grad = torch.ones_like(params[-1]).to_sparse()


def spoil_size(params):
    params[-1].grad.resize_(100)


@pytest.mark.parametrize("spoil", [spoil_nan, spoil_kind, spoil_size])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("code", CODES)
def test_a_step_that_fails_changes_nothing(code, spoil, steps):
    options = {"optim_bits": 8, "state_code": code, "nonfinite": "raise"}
    plain, paged = both((100_000,), (101_000,), **options)
    train(steps, plain, paged)
    before = frozen(paged)
    good = parameters(paged)
    give_grads(good, seed=50)
    spoil(good)
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        paged.step()
    assert frozen(paged) == before
    for p in good:
        p.grad = None
    train(1, plain, paged, first=steps)
    assert values(plain) == values(paged)


# A single scale, and the history of norms: below the optimizers.


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("code", CODES)
def test_one_scale_is_paged_with_its_codes_and_the_history_is_not(code, amsgrad):
    stored = qstate.Format(8, amsgrad=amsgrad, block_wise=False, history=True, code=code)
    moments = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if amsgrad else [])]
    p, small = Parameter(torch.ones(350, 300)), Parameter(torch.ones(300))
    pages, none = paging.allocate([(p, stored), (small, stored)])
    assert none is None
    sizes = {f"{m}_code": 105_000 for m in moments}
    of = CODES_BY_NAME[code]
    sizes |= {of.scale_key(m): 4 * of.scale_count(m, p.shape, False) for m in moments}
    assert {name: len(of) for name, of in pages.items()} == sizes
    fresh = qstate.zeros(p, stored, pages)
    plain = qstate.zeros(p, stored)
    assert frozen_entry(fresh) == frozen_entry(plain)
    tiers = {key: _core.memory_tier(value)[0] == TIER for key, value in fresh.items()}
    assert tiers == {key: key in sizes for key in fresh}
    assert paging.is_paged(fresh)

    generator = torch.Generator().manual_seed(0)
    values = {name: torch.rand(350, 300, generator=generator) for name in ("exp_avg", "exp_avg_sq")}
    values |= {"step": 3, "gnorm_vec": torch.rand(100, generator=generator)}
    (pages,) = paging.allocate([(p, stored)])
    entry = qstate.fit(values, p, stored, "p", pages)
    assert frozen_entry(entry) == frozen_entry(qstate.fit(values, p, stored, "p"))
    assert paging.is_paged(entry)

    for memo in (None, {}):
        (pages,) = paging.allocate([(p, qstate.format_of(entry))])
        twin = qstate.copy_into(pages, entry, p, memo)
        assert frozen_entry(twin) == frozen_entry(entry)
        for name in sizes:
            assert twin[name].data_ptr() == pages[name].data_ptr() != entry[name].data_ptr()
        assert (twin["gnorm_vec"] is entry["gnorm_vec"]) == (memo is None)


def frozen_entry(entry):
    return {key: fingerprint(value) for key, value in entry.items()}
