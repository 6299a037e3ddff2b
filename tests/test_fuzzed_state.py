"""State dicts damaged at random: each loads whole or not at all, and none crashes."""

import contextlib
import copy
import pickle
import warnings

import pytest
import torch
from conftest import WIDTHS, fingerprint, frozen, give_grads, scale_key, train
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import Parameter

import qadam
from qadam import interop, layout
from qadam import state as qstate
from qadam.codes import CODES
from qadam.state import to_bitsandbytes, to_torch

pytestmark = pytest.mark.cpu_only

REFUSALS = (ValueError, TypeError, KeyError)
WRAPPED = "__bnb_optimizer_quant_state__"
SHAPES = ((), (3, 2, 4), (20, 15))


def parameters():
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    params[1].data = params[1].data.transpose(0, 2)
    return [{"params": params[:2]}, {"params": params[2:], "lr": 0.5}]


def optimizer(width):
    return qadam.AdamW(parameters(), min_8bit_size=10, weight_decay=0.0, **WIDTHS[width])


def sources():
    """State dicts of every format."""
    made = {}
    for bits, width in ((8, "dynamic"), (32, "32"), ("ratio", "ratio")):
        own = optimizer(width)
        train(3, own)
        made[f"qadam {bits}"] = own.state_dict()
        if bits != "ratio":
            made[f"bitsandbytes {bits}"] = to_bitsandbytes(own.state_dict())
    made["torch"] = to_torch(made["qadam 32"])
    for bits in (8, 32):
        wrapped = copy.deepcopy(made[f"bitsandbytes {bits}"])
        for entry in wrapped["state"].values():
            entry[WRAPPED] = {key: entry.pop(key) for key in list(entry) if key != "step"}
        made[f"bitsandbytes {bits} wrapped"] = wrapped
    old = copy.deepcopy(made["bitsandbytes 8"])
    for entry in old["state"].values():
        for i in "12":
            if f"absmax{i}" in entry:
                entry[f"absmax{i}"] = entry[f"absmax{i}"].max().reshape(1)
    made["bitsandbytes 8 of 2048"] = old
    whole = copy.deepcopy(old)
    for entry in whole["state"].values():
        for i in "12":
            if f"absmax{i}" in entry:
                entry[f"max{i}"] = entry.pop(f"absmax{i}")
        entry["gnorm_vec"] = torch.rand(100)
    made["bitsandbytes 8 of all"] = whole
    for bits in (8, 32, "ratio"):
        saved = copy.deepcopy(made[f"qadam {bits}"])
        params = [p for group in parameters() for p in group["params"]]
        for number, p in enumerate(params):
            entry = {**saved["state"][number], "gnorm_vec": torch.rand(100)}
            old = qstate.format_of(entry)
            stored = old._replace(block_wise=False, history=True, amsgrad=bits == "ratio")
            saved["state"][number] = qstate.fit(entry, p, stored, "p")
        made[f"qadam {bits} of all"] = saved
    return made


def copied(node):
    """A deep copy, faster than ``copy.deepcopy``."""
    if isinstance(node, torch.Tensor):
        return node.clone()
    if isinstance(node, dict):
        return {key: copied(value) for key, value in node.items()}
    return [copied(value) for value in node] if isinstance(node, list) else node


SOURCES = sources()
TARGETS = {width: optimizer(width) for width in WIDTHS}
for _target in TARGETS.values():
    train(2, _target, first=5)
TARGETS = {width: pickle.dumps(target) for width, target in TARGETS.items()}

AGAIN = {width: pickle.loads(target) for width, target in TARGETS.items()}

UNCHANGED = {}
"""By width: an optimizer that has refused all it was given so far, and what it holds."""


def fresh(width):
    target = pickle.loads(TARGETS[width])
    return target, frozen(target)


NAN, INF = float("nan"), float("inf")
KEYS = ["step", "memory_order", "qadam_format", "lr", "betas", "params", "state", "param_groups"]
KEYS += [f"exp_avg{a}{b}" for a in ("", "_sq") for b in ("", "_code", "_scale", "_range")]
KEYS += [f"{name}{i}" for i in "12" for name in ("state", "qmap", "absmax", "max", "new_max")]
KEYS += [WRAPPED, "gnorm_vec", "max_exp_avg_sq", "amsgrad", "alpha", "extra", 0, 1, 2, 3, None, "0"]
GARBAGE = [
    None,
    "x",
    b"",
    0,
    1,
    -1,
    3,
    2.5,
    NAN,
    INF,
    -INF,
    True,
    2**62,
    2**64,
    10**30,
    10**400,
    1e300,
    1j,
]
GARBAGE += [[], {}, (), [1, 2], (0.9,), {"a": 1}, [0], (2, 1, 0), range(3)]
TENSORS = {
    "none": lambda: torch.empty(0),
    "number": lambda: torch.tensor(3.0),
    "nan": lambda: torch.tensor(NAN),
    "negative": lambda: torch.tensor(-2),
    "huge": lambda: torch.tensor(2**62),
    "bytes": lambda: torch.arange(24, dtype=torch.uint8).reshape(3, 2, 4),
    "floats": lambda: torch.linspace(0, 1, 300).reshape(20, 15),
    "scale": lambda: torch.tensor([0.5]),
    "scales": lambda: torch.tensor([0.5, 0.25]),
    "norms": lambda: torch.linspace(0, 1, 100),
    "map": lambda: torch.linspace(-1, 1, 256),
    "order": lambda: torch.tensor([1, 0]),
    "orders": lambda: torch.tensor([0, 1, 2]),
    "order of none": lambda: torch.tensor([0, 0, 7]),
    "meta": lambda: torch.empty(20, 15, device="meta"),
    "sparse": lambda: torch.eye(20)[:, :15].to_sparse(),
    "complex": lambda: torch.ones(20, 15).cfloat(),
    "truth": lambda: torch.ones(20, 15, dtype=torch.bool),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e5m2]
DTYPES += [torch.uint8, torch.int8, torch.int64, torch.bool, torch.complex64]


def poke(value):
    def change(t):
        t = t.detach().clone(memory_format=torch.contiguous_format)
        if t.numel():
            t.view(-1)[-1] = value if t.is_floating_point() else 200
        return t

    return change


CHANGES = {
    **{str(dtype): lambda t, dtype=dtype: t.to(dtype) for dtype in DTYPES},
    **{f"poke {value}": poke(value) for value in (NAN, INF, -INF, -1.0, 0.0, 1e30, 1e-45)},
    "shorter": lambda t: t[:-1],
    "longer": lambda t: torch.cat([t, t]),
    "flat": lambda t: t.flatten(),
    "turned": lambda t: t.permute(*range(t.dim())[::-1]),
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "deeper": lambda t: t[None],
    "expanded": lambda t: t.flatten()[:1].expand(t.numel()).reshape(t.shape),
    "grad": lambda t: t.clone().requires_grad_() if t.is_floating_point() else t,
    "list": lambda t: t.tolist(),
    "item": lambda t: t.flatten()[0].item(),
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
    "negated": lambda t: torch._neg_view(t),
}


def places(node):
    """Every place in a state dict that holds something."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
        yield node, key
        if isinstance(value, (dict, list)):
            yield from places(value)


def place(draw, saved):
    found = list(places(saved))
    return found[draw(st.integers(0, len(found) - 1))]


def value(draw, saved):
    kind = draw(st.sampled_from(["garbage", "tensor", "elsewhere"]))
    if kind == "garbage":
        return copy.copy(draw(st.sampled_from(GARBAGE)))
    if kind == "tensor":
        return TENSORS[draw(st.sampled_from(sorted(TENSORS)))]()
    node, key = place(draw, saved)
    return copy.deepcopy(node[key])


class Case:
    """A damaged state dict and, for reports, what was done to it."""

    def __init__(self, source, saved, damage):
        self.saved = saved
        self.story = [source, *damage]

    def __repr__(self):
        return " / ".join(self.story)


@st.composite
def damaged(draw):
    source = draw(st.sampled_from(sorted(SOURCES)))
    saved = copied(SOURCES[source])
    done = []
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        if not saved:
            break
        node, key = place(draw, saved)
        kind = draw(st.sampled_from(["drop", "rename", "put", "change", "change", "add", "swap"]))
        done.append(f"{kind} {key!r}")
        if kind == "drop":
            del node[key]
        elif kind == "rename" and isinstance(node, dict):
            node[draw(st.sampled_from(KEYS))] = node.pop(key)
        elif kind == "put":
            node[key] = value(draw, saved)
        elif kind == "add" and isinstance(node, dict):
            node[draw(st.sampled_from(KEYS))] = value(draw, saved)
        elif kind == "add":
            node.append(value(draw, saved))
        elif kind == "swap":
            other, its = place(draw, saved)
            node[key], other[its] = other[its], node[key]
        elif isinstance(node[key], torch.Tensor):
            change = draw(st.sampled_from(sorted(CHANGES)))
            done.append(change)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # some warn once
                # where torch cannot change it so, it stays
                with contextlib.suppress(RuntimeError, IndexError, ValueError, TypeError):
                    node[key] = CHANGES[change](node[key])
    return Case(source, saved, done)


def finite(value):
    return not isinstance(value, torch.Tensor) or bool(value.isfinite().all())


def check_loaded(target, width):
    """All state is qadam's own, finite, and survives a step and another load."""
    params = [p for group in target.param_groups for p in group["params"]]
    again = AGAIN[width]
    again.load_state_dict(target.state_dict())
    copies = [p for group in again.param_groups for p in group["params"]]
    for p, twin in zip(params, copies, strict=True):
        entry = target.state.get(p)
        if entry:
            names = ("exp_avg", "exp_avg_sq")
            needed = list(names)
            if "exp_avg_code" in entry:
                needed = [f"{m}_code" for m in names] + [scale_key(entry, m) for m in names]
            for key in ("step", *needed):
                assert isinstance(entry[key], torch.Tensor), key
                assert entry[key].isfinite().all(), key
                assert fingerprint(entry[key]) == fingerprint(again.state[twin][key])
            assert not {"state1", "absmax1", "max1", "qmap1", WRAPPED} & entry.keys()
    hyper = ("lr", "eps", "weight_decay")
    tame = all(float(group[name]) <= 10 for group in target.param_groups for name in hyper)
    give_grads(params, seed=1)
    target.step()
    repr(target)
    for p in params:
        assert all(finite(v) for k, v in target.state[p].items() if str(k).startswith("exp_avg"))
        entry = target.state[p]
        small = "exp_avg" not in entry or entry["exp_avg"].abs().max() < 1e10
        small = small and ("exp_avg_scale" not in entry or entry["exp_avg_scale"].max() < 1e10)
        # of roots as large first moments are, too
        root = entry.get("exp_avg_sq_range")
        small = small and (root is None or root.max() < 1e10)
        assert not (tame and small) or p.isfinite().all()


@settings(
    max_examples=10_000,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(damaged(), st.sampled_from(sorted(WIDTHS)))
def test_a_damaged_state_dict_loads_whole_or_not_at_all(case, width):
    target, before = UNCHANGED.pop(width, None) or fresh(width)
    try:
        target.load_state_dict(case.saved)
    except REFUSALS:
        assert frozen(target) == before
        UNCHANGED[width] = target, before
    else:
        check_loaded(target, width)


@settings(
    max_examples=1_000,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(damaged())
def test_a_damaged_state_dict_is_exported_whole_or_not_at_all(case):
    for export in (to_torch, to_bitsandbytes):
        try:
            written = export(case.saved)
        except REFUSALS:
            pass
        else:
            for entry in written["state"].values():
                if isinstance(entry, dict):
                    known = [v for k, v in entry.items() if str(k).startswith(("exp", "state"))]
                    assert all(finite(v) for v in known)


FORMATS = [
    qstate.Format(bits, amsgrad, block_wise, history, code)
    for bits, code in ((8, "dynamic"), (8, "ratio"), (32, "dynamic"))
    for amsgrad in (False, True)
    for block_wise in (True, False)
    for history in (False, True)
]


def check_fitted(entry, param, stored):
    """All that is meant to be there is, and loads as it is once more."""
    moments = ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if stored.amsgrad else []))
    looks = {"step": (torch.float32, ())}
    if stored.history:
        looks["gnorm_vec"] = (torch.float32, (100,))
    code = CODES[stored.code]
    for moment in moments:
        if stored.bits == 32:
            looks[moment] = (torch.float32, param.shape)
        else:
            looks[f"{moment}_code"] = (torch.uint8, param.shape)
            count = code.scale_count(moment, param.shape, stored.block_wise)
            looks[code.scale_key(moment)] = (torch.float32, (count,))
    for key, look in looks.items():
        assert (entry[key].dtype, entry[key].shape) == look, key
        assert entry[key].isfinite().all(), key
        assert key.startswith("exp_avg") or (entry[key] >= 0).all(), key
    assert layout.KEYS & entry.keys() - {"memory_order"} == looks.keys()
    again = qstate.fit(entry, param, stored, "p")
    known = layout.KEYS & entry.keys()
    assert all(fingerprint(entry[key]) == fingerprint(again[key]) for key in known)


@settings(
    max_examples=3_000,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(damaged(), st.sampled_from(FORMATS))
def test_a_damaged_entry_fits_whole_or_not_at_all(case, stored):
    """Whether or not the classes store it so."""
    try:
        saved = interop.read(case.saved)
    except REFUSALS:
        return
    params = [p for group in parameters() for p in group["params"]]
    for number, entry in saved.entries.values():
        if number >= len(params):
            continue
        param, where = params[number], f"parameter {number}"
        try:
            own = interop.read_entry(entry, param.shape, where)
            fitted = qstate.fit(own, param, stored, where)
        except REFUSALS as error:
            refusal = str(error)
        else:
            check_fitted(fitted, param, stored)
            continue
        assert where in refusal
