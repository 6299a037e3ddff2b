"""What a state dict holds, who can load it, and what is refused when it is damaged."""

import copy

import pytest
import torch
from conftest import (
    ADAMS,
    BLOCK,
    CODES,
    WIDTHS,
    code_step,
    fingerprint,
    frozen,
    give_grads,
    same_bits,
    scale_key,
    state_values,
    train,
    twins,
)
from torch.nn import Parameter

import qadam
from qadam import state as qstate
from qadam.codes import DYNAMIC

TORCH = {qadam.Adam: torch.optim.Adam, qadam.AdamW: torch.optim.AdamW}
NAMES_8BIT = [
    "step",
    "memory_order",
    "exp_avg_code",
    "exp_avg_scale",
    "exp_avg_sq_code",
    "exp_avg_sq_scale",
]
NAMES_RATIO = [*NAMES_8BIT[:-1], "exp_avg_sq_range"]


def stepped(cls, *shapes, steps=1, **options):
    params = twins(*shapes, n=1)[0]
    optimizer = cls(params, **options)
    train(steps, optimizer)
    return optimizer, params


def copied(params):
    """Parameters of the same values that share nothing with these."""
    return [Parameter(p.detach().clone()) for p in params]


# Names, dtypes, shapes.


@pytest.mark.parametrize("cls", ADAMS)
def test_32_bit_state_has_torchs_names_dtypes_and_shapes(cls):
    mine, theirs = twins((3, 5), (), (0, 2))
    a, b = cls(mine), TORCH[cls](theirs)
    train(2, a, b)
    for p, q in zip(mine, theirs, strict=True):
        ours, reference = a.state[p], b.state[q]
        assert list(ours) == list(reference) == ["step", "exp_avg", "exp_avg_sq"]
        for key in ours:
            assert ours[key].dtype == reference[key].dtype == torch.float32
            assert ours[key].shape == reference[key].shape
            assert ours[key].device == reference[key].device


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_32_bit_state_is_float32_whatever_the_parameter(dtype):
    p = Parameter(torch.ones(5, dtype=dtype))
    optimizer = qadam.AdamW([p])
    train(1, optimizer)
    assert {value.dtype for value in optimizer.state[p].values()} == {torch.float32}


@pytest.mark.parametrize("shape", [(), (1,), (255,), (256,), (257,), (3, 171), (0,), (2, 0)])
@pytest.mark.parametrize("code", CODES)
def test_8_bit_state_has_names_that_no_other_optimizer_takes_for_values(code, shape):
    optimizer, (p,) = stepped(qadam.AdamW8bit, shape, min_8bit_size=0, state_code=code)
    entry = optimizer.state[p]
    names = NAMES_8BIT if code == "dynamic" else NAMES_RATIO
    assert sorted(entry) == sorted(names)
    assert not {"exp_avg", "exp_avg_sq", "state1", "state2"} & entry.keys()
    blocks = -(-p.numel() // BLOCK)
    assert entry["step"].dtype == torch.float32
    assert entry["step"].shape == ()
    assert entry["memory_order"].dtype == torch.int64
    for moment in ("exp_avg", "exp_avg_sq"):
        assert entry[f"{moment}_code"].dtype == torch.uint8
        assert entry[f"{moment}_code"].shape == p.shape
        scales = entry[scale_key(entry, moment)]
        assert scales.dtype == torch.float32
        assert scales.shape == ((2 if scale_key(entry, moment).endswith("_range") else 1) * blocks,)


def test_min_8bit_size_decides_by_the_parameters_elements():
    for least, shapes in ((None, [(4095,), (4096,), (64, 64)]), (10, [(9,), (10,), (5, 2)])):
        options = {} if least is None else {"min_8bit_size": least}
        optimizer, params = stepped(qadam.Adam8bit, *shapes, **options)
        wide = ["exp_avg" in optimizer.state[p] for p in params]
        narrow = ["exp_avg_code" in optimizer.state[p] for p in params]
        assert (wide, narrow) == ([True, False, False], [False, True, True])


def test_state_takes_8_bytes_and_at_most_2_04_or_2_07_bytes_an_element():
    for width, least, most in (("32", 8.0, 8.001), ("dynamic", 2.0, 2.04), ("ratio", 2.0, 2.07)):
        optimizer, (p,) = stepped(qadam.AdamW, (1000, 100), **WIDTHS[width])
        tensors = [v for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)]
        held = sum(t.untyped_storage().nbytes() for t in tensors)
        assert least <= held / p.numel() <= most


def test_state_dict_refers_to_the_live_tensors_as_torchs_does():
    optimizer, (p,) = stepped(qadam.AdamW, (3,))
    assert optimizer.state_dict()["state"][0]["exp_avg"] is optimizer.state[p]["exp_avg"]


# torch.optim.


@pytest.mark.parametrize("cls", ADAMS)
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_torch_loads_our_32_bit_state_as_it_is_and_continues_like_us(cls, options):
    a, mine = stepped(cls, (7,), (3, 5), (), steps=5, lr=0.03, weight_decay=0.1)
    theirs = copied(mine)
    b = TORCH[cls](theirs, **options)
    b.load_state_dict(copy.deepcopy(a.state_dict()))  # torch keeps the very tensors it is given
    assert b.param_groups[0]["lr"] == 0.03
    for p, q in zip(mine, theirs, strict=True):
        for key, value in a.state[p].items():
            assert same_bits(value, b.state[q][key])
    train(5, a, b, first=5)
    for p, q in zip(mine, theirs, strict=True):
        assert b.state[q]["step"] == 10
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cls", ADAMS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_we_load_torchs_state_and_continue_like_it(cls, width, options):
    theirs = twins((300,), (3, 5), (), n=1)[0]
    b = TORCH[cls](theirs, lr=0.03, weight_decay=0.1, **options)
    train(5, b)
    mine = copied(theirs)
    a = cls(mine, min_8bit_size=256, **WIDTHS[width])
    a.load_state_dict(b.state_dict())
    assert a.param_groups[0]["lr"] == 0.03
    assert "exp_avg" in a.state[mine[1]]
    assert ("exp_avg" in a.state[mine[0]]) == (width == "32")
    train(5 if width == "32" else 1, a, b, first=5)
    tolerance = 1e-6 if width == "32" else 3e-3
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=tolerance)
    assert a.state[mine[0]]["step"] == b.state[theirs[0]]["step"]


def test_state_that_torch_keeps_in_the_parameters_dtype_becomes_float32():
    theirs = twins((300,), n=1, dtype=torch.bfloat16)[0]
    b = torch.optim.AdamW(theirs)
    train(2, b)
    mine = copied(theirs)
    a = qadam.AdamW(mine)
    a.load_state_dict(b.state_dict())
    assert a.state[mine[0]]["exp_avg"].dtype == torch.float32
    assert same_bits(a.state[mine[0]]["exp_avg"].bfloat16(), b.state[theirs[0]]["exp_avg"])


@pytest.mark.parametrize("cls", ADAMS)
@pytest.mark.parametrize("code", CODES)
def test_8_bit_state_in_torchs_optimizer_fails_at_the_first_step_before_writing(code, cls):
    """torch's load takes any keys; its first step misses the moments and names the first."""
    a, mine = stepped(cls, (300,), optim_bits=8, min_8bit_size=0, state_code=code)
    theirs = copied(mine)
    b = TORCH[cls](theirs)
    b.load_state_dict(a.state_dict())
    give_grads(theirs, seed=1)
    with pytest.raises(KeyError, match="exp_avg"):
        b.step()
    assert same_bits(mine[0], theirs[0])


def test_a_differentiable_optimizers_state_dict_is_refused():
    theirs = twins((5,), n=1)[0]
    b = torch.optim.AdamW(theirs, differentiable=True)
    saved = b.state_dict()
    a, _ = stepped(qadam.AdamW, (5,))
    before = frozen(a)
    with pytest.raises(ValueError, match="differentiable"):
        a.load_state_dict(saved)
    assert frozen(a) == before


def test_state_of_parameters_without_gradients_may_be_missing():
    """As in torch: only parameters that had a gradient have state."""
    mine, theirs = twins((5,), (6,))
    a = qadam.AdamW(mine)
    mine[0].grad = torch.ones(5)
    a.step()
    b = qadam.AdamW(theirs)
    b.load_state_dict(a.state_dict())
    assert list(b.state) == [theirs[0]]
    train(1, b)
    assert [b.state[p]["step"].item() for p in theirs] == [2, 1]


def test_loading_takes_group_options_and_keeps_the_parameters_of_the_optimizer():
    mine, theirs = twins((5,), (6,))
    a = qadam.AdamW([{"params": mine[:1], "lr": 0.5, "name": "x"}, {"params": mine[1:]}], eps=0.1)
    b = qadam.AdamW([{"params": theirs[:1]}, {"params": theirs[1:]}])
    b.load_state_dict(a.state_dict())
    assert b.param_groups[0]["name"] == "x"
    assert [(g["lr"], g["eps"]) for g in b.param_groups] == [(0.5, 0.1), (1e-3, 0.1)]
    assert [g["params"][0] is p for g, p in zip(b.param_groups, theirs, strict=True)] == [True] * 2


@pytest.mark.parametrize("width", WIDTHS)
def test_numbers_and_lists_of_a_plain_serializer_are_accepted(width):
    """A step as a number, betas and memory order as lists, as JSON makes them."""
    a, mine = stepped(qadam.AdamW, (300,), min_8bit_size=0, **WIDTHS[width])
    saved = copy.deepcopy(a.state_dict())
    entry = saved["state"][0]
    entry["step"] = int(entry["step"])
    if width != "32":
        entry["memory_order"] = entry["memory_order"].tolist()
    saved["param_groups"][0]["betas"] = list(saved["param_groups"][0]["betas"])
    theirs = copied(mine)
    b = qadam.AdamW(theirs, min_8bit_size=0, **WIDTHS[width])
    b.load_state_dict(saved)
    train(3, a, b, first=1)
    assert same_bits(mine[0], theirs[0])


# Damaged dicts.


def set_entry(key, value):
    def damage(saved):
        entry = saved["state"][1]
        entry[key] = value(entry[key]) if callable(value) else value

    return damage


def drop(key):
    return lambda saved: saved["state"][1].pop(key)


def poke(key, value):
    def change(tensor):
        tensor = tensor.clone()
        tensor[-1] = value
        return tensor

    return set_entry(key, change)


def group(key, value):
    def damage(saved):
        saved["param_groups"][0][key] = value

    return damage


def amsgrad(saved, moment):
    """Makes the state that of AMSGrad, with this third moment for parameter 1."""
    for group in saved["param_groups"]:
        group["amsgrad"] = True
    saved["state"][1]["max_exp_avg_sq"] = moment


NAN, INF = float("nan"), float("inf")
DAMAGE_32 = {
    "no step": (drop("step"), ["step", "parameter 1"]),
    "no exp_avg": (drop("exp_avg"), ["exp_avg", "parameter 1"]),
    "no exp_avg_sq": (drop("exp_avg_sq"), ["exp_avg_sq", "parameter 1"]),
    "shape": (set_entry("exp_avg", lambda t: t[:-1]), ["exp_avg", r"\(299,\)", r"\(300,\)"]),
    "rank": (set_entry("exp_avg_sq", lambda t: t[None]), ["exp_avg_sq", r"\(1, 300\)"]),
    "int": (set_entry("exp_avg", lambda t: t.long()), ["exp_avg", "int64", "floating"]),
    "complex": (set_entry("exp_avg", lambda t: t.cfloat()), ["exp_avg", "complex64"]),
    "no tensor": (set_entry("exp_avg_sq", 3.0), ["exp_avg_sq", "float"]),
    "none": (set_entry("exp_avg", None), ["exp_avg", "NoneType"]),
    "negative step": (set_entry("step", torch.tensor(-1.0)), ["step", "-1"]),
    "nan step": (set_entry("step", torch.tensor(NAN)), ["step", "nan"]),
    "inf step": (set_entry("step", INF), ["step", "inf"]),
    "two steps": (set_entry("step", torch.ones(2)), ["step"]),
    "step text": (set_entry("step", "three"), ["step", "three"]),
    "amsgrad": (lambda saved: amsgrad(saved, -torch.ones(300)), ["max_exp_avg_sq", "-1"]),
    "amsgrad of another shape": (
        lambda saved: amsgrad(saved, torch.ones(299)),
        ["max_exp_avg_sq", "parameter 1"],
    ),
    "bare": (lambda saved: saved["state"].update({1: torch.ones(300)}), ["parameter 1"]),
}
DAMAGE_8 = {
    **{f"no {key}": (drop(key), [key, "parameter 1"]) for key in NAMES_8BIT},
    "shape": (set_entry("exp_avg_code", lambda t: t[1:]), ["exp_avg_code", r"\(299,\)"]),
    "blocks": (set_entry("exp_avg_scale", lambda t: t[:-1]), ["exp_avg_scale", r"\(1,\)"]),
    "code dtype": (set_entry("exp_avg_code", lambda t: t.float()), ["exp_avg_code", "float32"]),
    "scale dtype": (set_entry("exp_avg_sq_scale", lambda t: t.half()), ["exp_avg_sq_scale"]),
    "nan scale": (poke("exp_avg_scale", NAN), ["exp_avg_scale", "nan"]),
    "inf scale": (poke("exp_avg_sq_scale", INF), ["exp_avg_sq_scale", "inf"]),
    "negative scale": (poke("exp_avg_sq_scale", -1.0), ["exp_avg_sq_scale", "-1"]),
    "order unknown": (set_entry("memory_order", (5,)), ["memory_order", r"\(5,\)"]),
    "order twice": (set_entry("memory_order", (0, 0)), ["memory_order", r"\(0, 0\)"]),
    "order short": (set_entry("memory_order", ()), ["memory_order", r"\(\)"]),
    "order text": (set_entry("memory_order", "NHWC"), ["memory_order", "NHWC"]),
    "order none": (set_entry("memory_order", None), ["memory_order", "None"]),
    "nan step": (set_entry("step", torch.tensor(NAN)), ["step", "nan"]),
}
DAMAGE_GROUPS = {
    "fewer groups": (lambda saved: saved["param_groups"].pop(), ["1 parameter group", "2"]),
    "fewer params": (lambda saved: saved["param_groups"][0]["params"].pop(), ["group 0", "1", "2"]),
    "more params": (
        lambda saved: saved["param_groups"][1]["params"].append(9),
        ["group 1", "2", "1"],
    ),
    "no lr": (lambda saved: saved["param_groups"][0].pop("lr"), ["lr"]),
    "no betas": (lambda saved: saved["param_groups"][1].pop("betas"), ["betas"]),
    "bad lr": (group("lr", -1), ["lr", "-1"]),
    "bad betas": (group("betas", (0.9, 1.0)), ["betas"]),
    "amsgrad": (group("amsgrad", "yes"), ["amsgrad"]),
    "optim_bits": (group("optim_bits", 16), ["optim_bits"]),
    "no state": (lambda saved: saved.pop("state"), ["state"]),
    "no groups": (lambda saved: saved.pop("param_groups"), ["param_groups"]),
}
CASES = [
    (bits, name, *case)
    for bits, cases in ((32, DAMAGE_32), (8, DAMAGE_8), (32, DAMAGE_GROUPS), (8, DAMAGE_GROUPS))
    for name, case in cases.items()
]


@pytest.mark.parametrize("into", [32, 8])
@pytest.mark.parametrize(
    ("bits", "damage", "words"),
    [(bits, damage, words) for bits, _, damage, words in CASES],
    ids=[f"{bits}-{name}" for bits, name, _, _ in CASES],
)
def test_a_damaged_dict_is_refused_by_key_and_the_optimizer_is_as_before(bits, damage, words, into):
    def make(bits):
        params = twins((400,), (300,), (5,), n=1)[0]
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.5}]
        # of the dynamic code; test_ratio.py damages the other
        return qadam.AdamW(groups, optim_bits=bits, min_8bit_size=256, state_code="dynamic")

    source, target = make(bits), make(into)
    train(2, source)
    train(3, target, first=7)
    saved = copy.deepcopy(source.state_dict())
    damage(saved)
    before = frozen(target)
    with pytest.raises((ValueError, KeyError, TypeError)) as caught:
        target.load_state_dict(saved)
    for word in words:
        assert caught.match(word)
    assert frozen(target) == before
    reference = make(into)
    train(3, reference, first=7)
    train(1, target, reference)
    assert frozen(target)[1:] == frozen(reference)[1:]


# Memory order.

SHAPE = (4, 3, 5, 6)


def turned(t):
    return t.permute(3, 2, 1, 0)


def padded(t):
    return torch.zeros(*t.shape[:-1], 2 * t.shape[-1] + 1)[..., 1::2].copy_(t)


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: turned(turned(t).contiguous()),
    "gaps": lambda t: turned(padded(turned(t))),
    "rolled": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}


def laid_out(layout, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Parameter(LAYOUTS[layout](torch.randn(SHAPE, generator=generator)))


def logical_values(p, entry, name):
    """The moment ``name`` of a parameter of any memory order, by the entry's own account."""
    if name in entry:
        return entry[name]
    order = entry["memory_order"].tolist()
    inverse = [order.index(d) for d in range(len(order))]
    ordered = {
        key: value.permute(order) if key.endswith("_code") else value
        for key, value in entry.items()
        if key.endswith(("_code", "_scale", "_range"))
    }
    return state_values(ordered, name).permute(inverse)


def one_code_step(entry, name, shape):
    order = entry["memory_order"].tolist()
    inverse = [order.index(d) for d in range(len(order))]
    ordered = {k: v.permute(order) if k.endswith("_code") else v for k, v in entry.items()}
    step = code_step(ordered, name)
    return step.reshape(ordered[f"{name}_code"].shape).permute(inverse)


@pytest.mark.parametrize("serializer", ["strides kept", "made contiguous"])
@pytest.mark.parametrize("new", LAYOUTS)
@pytest.mark.parametrize("old", LAYOUTS)
@pytest.mark.parametrize("width", WIDTHS)
def test_state_moves_to_another_memory_order_by_logical_index(width, old, new, serializer):
    p, q = laid_out(old), laid_out(new)
    a, b = (qadam.AdamW([x], min_8bit_size=0, **WIDTHS[width]) for x in (p, q))
    train(4, a)
    with torch.no_grad():
        q.copy_(p)
    saved = copy.deepcopy(a.state_dict())
    if serializer == "made contiguous":
        entry = saved["state"][0]
        for key, value in entry.items():
            if isinstance(value, torch.Tensor):
                entry[key] = value.contiguous()
    b.load_state_dict(saved)
    for name in ("exp_avg", "exp_avg_sq"):
        x, y = logical_values(p, a.state[p], name), logical_values(q, b.state[q], name)
        if width == "32" or old == new:
            assert same_bits(x, y)
        else:
            assert ((x - y).abs() <= one_code_step(b.state[q], name, SHAPE)).all()
            assert x.abs().max() > 0
    if old == new:
        for key, value in a.state[p].items():
            assert fingerprint(value) == fingerprint(b.state[q][key])
    give_grads([p], [q], seed=9)
    a.step()
    b.step()
    if width == "32" or old == new:
        assert same_bits(p, q)
    else:
        assert (p - q).abs().max() < 1e-3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_8_bit_blocks_follow_the_memory_order_that_the_state_names(layout):
    """Wherever the bits of a scale differ, so does the block of 256 elements in memory."""
    p = laid_out(layout)
    options = {"min_8bit_size": 0, "betas": (0.0, 0.0), "state_code": "dynamic"}
    optimizer = qadam.AdamW8bit([p], **options)
    give_grads([p], seed=3)
    optimizer.step()
    entry = optimizer.state[p]
    in_memory = p.grad.permute(entry["memory_order"].tolist()).contiguous().flatten()
    largest = [block.abs().max() for block in in_memory.split(BLOCK)]
    assert same_bits(entry["exp_avg_scale"], torch.stack(largest))


@pytest.mark.parametrize(
    ("old", "new"), [(old, new) for old in WIDTHS for new in WIDTHS if old != new]
)
@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
def test_width_and_memory_order_may_change_together(old, new, layout):
    p, q = laid_out("contiguous"), laid_out(layout)
    a = qadam.AdamW([p], min_8bit_size=0, **WIDTHS[old])
    b = qadam.AdamW([q], min_8bit_size=0, **WIDTHS[new])
    train(4, a)
    b.load_state_dict(a.state_dict())
    for name in ("exp_avg", "exp_avg_sq"):
        x, y = logical_values(p, a.state[p], name), logical_values(q, b.state[q], name)
        if new == "32":
            torch.testing.assert_close(x, y, rtol=2e-7, atol=0)
        else:
            assert ((x - y).abs() <= one_code_step(b.state[q], name, SHAPE)).all()


# The number of scales, and the history of norms: below the optimizers.

BLOCKS, WHOLE = qstate.Format(8), qstate.Format(8, block_wise=False)
FORMATS = {
    "32": qstate.Format(32),
    "blocks": BLOCKS,
    "whole": WHOLE,
    "32 all": qstate.Format(32, amsgrad=True, history=True),
    "blocks all": qstate.Format(8, amsgrad=True, history=True),
    "whole all": qstate.Format(8, amsgrad=True, block_wise=False, history=True),
    "ratio blocks": qstate.Format(8, code="ratio"),
    "ratio whole": qstate.Format(8, block_wise=False, code="ratio"),
    "ratio blocks all": qstate.Format(8, amsgrad=True, history=True, code="ratio"),
    "ratio whole all": qstate.Format(8, True, False, True, "ratio"),
}
MOMENTS = ("exp_avg", "exp_avg_sq")


def moments_of(stored):
    return (*MOMENTS, "max_exp_avg_sq") if stored.amsgrad else MOMENTS


def random_entry(p, stored, seed=0):
    """State of ``p``, stored so: values of eight decades, some of them zero."""
    generator = torch.Generator().manual_seed(seed)

    def values(there):
        decades = 10 ** (-8 * torch.rand(p.shape, generator=generator))
        return torch.randn(p.shape, generator=generator) * decades * there

    # as in training: no first moment without a second one, no second one above the third
    there = torch.rand(p.shape, generator=generator) > 0.1
    entry = {"step": torch.tensor(7.0), "exp_avg": values(there), "exp_avg_sq": values(there).abs()}
    largest = torch.maximum(values(there).abs(), entry["exp_avg_sq"])
    entry |= {"max_exp_avg_sq": largest, "mine": "kept"}
    entry["gnorm_vec"] = torch.rand(100, generator=generator)
    return qstate.fit(entry, p, stored, "p")


def bits_of(entry):
    return {key: fingerprint(value) for key, value in entry.items()}


def logical(entry, name):
    """A moment by index, decoded here: the number of its scales says what they belong to."""
    return logical_values(None, entry, name)


def steps_of(entry, name):
    """One code step of each element, by index."""
    return one_code_step(entry, name, SHAPE)


@pytest.mark.parametrize("stored", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("shape", [(), (255,), (256,), (257,), (3, 171), (0,)])
def test_state_has_a_scale_a_block_or_one_and_a_history_if_asked(shape, stored):
    p = Parameter(torch.ones(shape, dtype=torch.bfloat16))
    n = p.numel()
    count = -(-n // BLOCK) if stored.block_wise else min(n, 1)
    for entry in (qstate.zeros(p, stored), random_entry(p, stored)):
        names = {"step"} | ({"mine"} & entry.keys())
        names |= {"gnorm_vec"} if stored.history else set()
        if stored.bits == 32:
            names |= set(moments_of(stored))
        else:
            names |= {f"{m}_code" for m in moments_of(stored)}
            names |= {"memory_order"}
            for moment in moments_of(stored):
                is_range = stored.code == "ratio" and moment != "exp_avg"
                key = f"{moment}_range" if is_range else f"{moment}_scale"
                names.add(key)
                assert entry[key].shape == (count * (2 if is_range else 1),)
                assert entry[key].dtype == torch.float32
        assert entry.keys() == names
        assert qstate.format_of(entry) == stored._replace(
            block_wise=stored.block_wise or stored.bits == 32 or n <= BLOCK
        )
        if stored.history:
            assert (entry["gnorm_vec"].dtype, entry["gnorm_vec"].shape) == (torch.float32, (100,))
    if stored.history:
        assert not qstate.zeros(p, stored)["gnorm_vec"].any()


@pytest.mark.parametrize("layout_of", LAYOUTS)
def test_one_scale_is_the_largest_magnitude_in_whatever_memory_order(layout_of):
    exact = random_entry(laid_out("contiguous"), FORMATS["32"])
    q = laid_out(layout_of)
    entry = qstate.fit(exact, q, WHOLE, "q")
    for name in MOMENTS:
        assert same_bits(entry[f"{name}_scale"], exact[name].abs().max().reshape(1))
        error = (logical(entry, name) - exact[name]).abs()
        assert (error <= steps_of(entry, name) * (1 + 1e-6)).all()
        codes, scales = DYNAMIC.encode({name: exact[name]}, (0, 1, 2, 3), False)[name]
        assert same_bits(entry[f"{name}_code"], codes)
        assert same_bits(entry[f"{name}_scale"], scales)
        assert entry[f"{name}_code"].stride() == torch.empty_like(q).stride()


@pytest.mark.parametrize("new_layout", ["contiguous", "channels_last", "gaps"])
@pytest.mark.parametrize("old_layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("new", FORMATS)
@pytest.mark.parametrize("old", FORMATS)
def test_every_format_becomes_every_other(old, new, old_layout, new_layout):
    p, q = laid_out(old_layout), laid_out(new_layout)
    old, new = FORMATS[old], FORMATS[new]
    entry = random_entry(p, old)
    before = bits_of(entry)
    fitted = qstate.fit(entry, q, new, "q")
    assert bits_of(entry) == before
    assert qstate.format_of(fitted) == new
    assert (fitted["step"], fitted["mine"]) == (7, "kept")
    same_place = old_layout == new_layout or not old.block_wise
    ratio = "ratio" in (old.code, new.code)
    is_exact = new.bits == 32 or (
        old.bits == 8
        and old.code == new.code
        and not (ratio and old.amsgrad != new.amsgrad)
        and same_place
        and (old.block_wise == new.block_wise or not old.block_wise)
    )
    for name in moments_of(new):
        if name not in moments_of(old):
            if new.code == "ratio":  # begins as the second
                off = (logical(fitted, name) - logical(entry, "exp_avg_sq")).abs()
                assert (off <= steps_of(fitted, name)).all()
            else:
                assert not logical(fitted, name).any()
            continue
        x, y = logical(entry, name), logical(fitted, name)
        if is_exact:
            assert same_bits(x, y)
        else:
            assert ((x - y).abs() <= steps_of(fitted, name) * (1 + 1e-6)).all()
        if new.bits == 8 and is_exact:
            assert same_bits(entry[f"{name}_code"], fitted[f"{name}_code"])
        if new.bits == 8 and not new.block_wise and not is_exact and new.code == "dynamic":
            assert fitted[f"{name}_scale"] == x.abs().max()
    if new.history and old.history:
        assert same_bits(fitted["gnorm_vec"], entry["gnorm_vec"])
    elif new.history:
        assert not fitted["gnorm_vec"].any()
    own = {t.data_ptr() for t in entry.values() if isinstance(t, torch.Tensor)}
    assert not own & {t.data_ptr() for t in fitted.values() if isinstance(t, torch.Tensor)}


@pytest.mark.parametrize("layout_of", ["contiguous", "channels_last"])
def test_a_scale_that_was_repeated_becomes_one_again(layout_of):
    """The single scale of another package's codes need not be the largest magnitude."""
    p, q = laid_out("contiguous"), laid_out(layout_of)
    entry = random_entry(p, WHOLE)
    entry["exp_avg_scale"] *= 3.0
    there = qstate.fit(entry, q, BLOCKS, "q")
    assert there["exp_avg_scale"].shape == (2,)
    again = qstate.fit(there, p, WHOLE, "p")
    assert bits_of(again) == bits_of(entry)


def test_a_history_is_converted_to_float32_and_copied():
    p = Parameter(torch.ones(5))
    entry = random_entry(p, FORMATS["32 all"])
    for dtype in (torch.float64, torch.bfloat16):
        entry["gnorm_vec"] = torch.rand(200).to(dtype)[::2].requires_grad_()
        fitted = qstate.fit(entry, p, qstate.Format(8, history=True), "p")
        assert same_bits(fitted["gnorm_vec"], entry["gnorm_vec"].detach().float())
        assert not fitted["gnorm_vec"].requires_grad


def changed(key, change):
    def damage(entry):
        entry[key] = change(entry[key])

    return damage


def poked(key, value):
    def damage(entry):
        entry[key].view(-1)[-1] = value

    return damage


BAD_ENTRIES = {
    "two of three": (changed("exp_avg_scale", lambda t: t[:2]), [r"\(3,\) or \(1,\) is accepted"]),
    "no dimensions": (
        changed("exp_avg_scale", lambda t: t[0]),
        [r"'exp_avg_scale' has shape \(\)"],
    ),
    "first of blocks": (
        changed("exp_avg_scale", lambda t: t[:1]),
        [r"'exp_avg_sq_scale' has shape \(3,\), 'exp_avg_scale' \(1,\)", "everywhere"],
    ),
    "second of blocks": (
        changed("exp_avg_sq_scale", lambda t: t[:1]),
        [r"'exp_avg_sq_scale' has shape \(1,\), 'exp_avg_scale' \(3,\)", "everywhere"],
    ),
    "short": (changed("gnorm_vec", lambda t: t[:99]), [r"'gnorm_vec' has shape \(99,\); \(100,\)"]),
    "row": (changed("gnorm_vec", lambda t: t[None]), [r"'gnorm_vec' has shape \(1, 100\)"]),
    "int": (changed("gnorm_vec", lambda t: t.int()), ["'gnorm_vec' is torch.int32"]),
    "list": (changed("gnorm_vec", lambda t: t.tolist()), ["'gnorm_vec' is list"]),
    "none": (changed("gnorm_vec", lambda t: None), ["'gnorm_vec' is NoneType"]),
    "meta": (changed("gnorm_vec", lambda t: t.to("meta")), ["'gnorm_vec' is a meta tensor"]),
    "nan": (poked("gnorm_vec", NAN), ["'gnorm_vec' holds nan"]),
    "inf": (poked("gnorm_vec", INF), ["'gnorm_vec' holds inf"]),
    "negative": (poked("gnorm_vec", -1.0), ["'gnorm_vec' holds -1"]),
    "beyond float32": (
        changed("gnorm_vec", lambda t: t.double() + 1e39),
        ["'gnorm_vec' holds inf"],
    ),
}


@pytest.mark.parametrize("into", ["32 all", "blocks all", "whole all", "ratio blocks all"])
@pytest.mark.parametrize("case", BAD_ENTRIES)
def test_damaged_scales_and_histories_are_refused_by_key(case, into):
    damage, words = BAD_ENTRIES[case]
    p = Parameter(torch.ones(600))
    entry = random_entry(p, FORMATS["blocks all"])
    damage(entry)
    with pytest.raises(ValueError, match="parameter 3: ") as caught:
        qstate.fit(entry, p, FORMATS[into], "parameter 3")
    for word in words:
        assert caught.match(word)


def test_one_scale_that_is_not_finite_is_refused():
    p = Parameter(torch.ones(600))
    for value, shown in ((NAN, "nan"), (INF, "inf"), (-1.0, "-1")):
        entry = random_entry(p, WHOLE)
        entry["exp_avg_sq_scale"].fill_(value)
        with pytest.raises(ValueError, match=f"'exp_avg_sq_scale' holds {shown}"):
            qstate.fit(entry, p, WHOLE, "p")


@pytest.mark.parametrize("new", ["32", "blocks", "whole", "ratio blocks"])
def test_lazily_negated_state_is_taken_for_what_it_means(new):
    p = Parameter(torch.ones(600))
    entry = random_entry(p, FORMATS["32"])
    lazy = {**entry, "exp_avg": torch._neg_view(-entry["exp_avg"])}
    want, got = (qstate.fit(x, p, FORMATS[new], "p") for x in (entry, lazy))
    assert bits_of(got) == bits_of(want)


@pytest.mark.parametrize("key", ["step", "exp_avg"])
def test_lazily_negated_float8_is_refused_by_name(key):
    """torch cannot read it: ``resolve_neg`` is not implemented for it."""
    (p,), (q,) = twins((300,))
    a, b = qadam.AdamW([p]), qadam.AdamW([q])
    train(1, a, b)
    saved = a.state_dict()
    saved["state"][0][key] = torch._neg_view(saved["state"][0][key].to(torch.float8_e5m2))
    before = frozen(b)
    with pytest.raises(ValueError, match=rf"{key}.*lazily negated"):
        b.load_state_dict(saved)
    assert frozen(b) == before
