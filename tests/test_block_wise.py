"""``block_wise=False`` and percentile clipping in the classes: what is saved, loaded and copied.

What the formats are made of, below the classes, is in test_state_dict.py.
"""

import copy
import io
import pickle

import pytest
import torch
from conftest import (
    CODES,
    code_step,
    fingerprint,
    frozen,
    same_bits,
    scale_key,
    state_values,
    train,
    twins,
)
from torch.nn import Parameter

import qadam
from qadam import _core, paging
from qadam.state import to_bitsandbytes, to_torch

CLASSES = [getattr(qadam.optim, name) for name in qadam.optim.__all__ if "Adam" in name]
NAMES = [cls.__name__ for cls in CLASSES]
SHAPES = [(110, 100), (100,), (256,), (70, 60), ()]
"""The first is paged, if anything is; the second, third and last differ in nothing but the key."""
MOMENTS = ("exp_avg", "exp_avg_sq")
EACH_CODE = pytest.mark.parametrize("code", CODES)


@pytest.fixture(autouse=True)
def page_small_tensors(monkeypatch):
    monkeypatch.setattr(paging, "LEAST", 10_000)


def stepped(cls, steps=3, **options):
    params = twins(*SHAPES, n=1)[0]
    optimizer = cls(params, **{"min_8bit_size": 0, **options})
    train(steps, optimizer)
    return optimizer, params


def states(optimizer):
    """All state of each parameter, bit by bit."""
    return frozen(optimizer)[1]


def scales(optimizer):
    """How many scales each parameter's moments have; None at 32 bits."""
    return [
        {
            len(e[scale_key(e, name)]) // (2 if scale_key(e, name).endswith("_range") else 1)
            for name in MOMENTS
        }
        if "exp_avg_code" in e
        else None
        for e in optimizer.state.values()
    ]


def norms(optimizer):
    return [entry.get("gnorm_vec") for entry in optimizer.state.values()]


def is_paged(optimizer):
    return [paging.is_paged(entry) for entry in optimizer.state.values()]


WHOLE = [{1}] * len(SHAPES)
BLOCKS = [{43}, {1}, {1}, {17}, {1}]


@pytest.mark.parametrize("new", [True, False], ids=["to blocks", "to one scale"])
@pytest.mark.parametrize("old", [True, False], ids=["of blocks", "of one scale"])
@pytest.mark.parametrize("cls", CLASSES, ids=NAMES)
@EACH_CODE
def test_state_loads_across_the_numbers_of_scales(code, cls, old, new):
    source, _ = stepped(qadam.AdamW8bit, block_wise=old, state_code=code)
    target, params = stepped(cls, steps=1, block_wise=new, state_code=code)
    saved = copy.deepcopy(source.state_dict())
    target.load_state_dict(source.state_dict())
    narrow = "8bit" in cls.__name__
    assert scales(source) == (BLOCKS if old else WHOLE)
    assert scales(target) == ((BLOCKS if new else WHOLE) if narrow else [None] * len(SHAPES))
    assert is_paged(target) == [cls.__name__.startswith("Paged"), *[False] * 4]
    for number, p in enumerate(params):
        entry, theirs = target.state[p], saved["state"][number]
        is_exact = not narrow or old == new or not old or p.numel() <= 256
        for name in MOMENTS:
            a, b = state_values(theirs, name), state_values(entry, name)
            if not is_exact:
                if scale_key(entry, name).endswith("_range"):
                    assert entry[scale_key(entry, name)][1].square() == a.max()
                elif code == "dynamic":
                    assert entry[f"{name}_scale"] == a.abs().max()
                assert ((a - b).abs().flatten() <= code_step(entry, name) * (1 + 1e-6)).all()
                continue
            assert same_bits(a, b)
            if narrow:
                assert same_bits(entry[f"{name}_code"], theirs[f"{name}_code"])
    train(2, target, first=3)
    assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("cls", [qadam.AdamW8bit, qadam.PagedAdamW8bit, qadam.PagedAdam])
@EACH_CODE
def test_what_was_saved_goes_on_bit_for_bit(code, cls):
    options = {"block_wise": False, "percentile_clipping": 20, "optim_bits": 8, "state_code": code}
    a, mine = stepped(cls, 5, **options)
    buffer = io.BytesIO()
    torch.save(a.state_dict(), buffer)
    buffer.seek(0)
    theirs = [Parameter(p.detach().clone()) for p in mine]
    b = cls(theirs, min_8bit_size=0, **options)
    b.load_state_dict(torch.load(buffer, weights_only=True))
    assert states(a) == states(b)
    train(5, a, b, first=5)
    assert states(a) == states(b)
    assert all(same_bits(p, q) for p, q in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("cls", [qadam.Adam8bit, qadam.PagedAdamW8bit, qadam.PagedAdamW])
@EACH_CODE
def test_copies_keep_the_scale_and_the_norms(code, cls, amsgrad, duplicate):
    options = {"block_wise": False, "percentile_clipping": 30, "amsgrad": amsgrad}
    optimizer, _ = stepped(cls, state_code=code, **options)
    twin = duplicate(optimizer)
    assert states(twin) == states(optimizer)
    assert scales(twin) == scales(optimizer) == (WHOLE if "8bit" in cls.__name__ else [None] * 5)
    assert is_paged(twin) == is_paged(optimizer) == [cls is not qadam.Adam8bit, *[False] * 4]
    for mine, theirs in zip(norms(optimizer), norms(twin), strict=True):
        assert mine.any()
        assert mine.data_ptr() != theirs.data_ptr()
    train(2, optimizer, twin, first=3)
    assert states(twin) == states(optimizer)
    assert frozen(twin)[0][0][2] == frozen(optimizer)[0][0][2]


@pytest.mark.parametrize("cls", CLASSES, ids=NAMES)
def test_norms_are_loaded_by_those_that_clip_and_begin_anew_where_there_are_none(cls):
    clipping, _ = stepped(qadam.AdamW, percentile_clipping=50)
    plain, _ = stepped(qadam.AdamW)
    a, _ = stepped(cls, steps=0, percentile_clipping=10)
    a.load_state_dict(clipping.state_dict())
    for mine, theirs in zip(norms(a), norms(clipping), strict=True):
        assert fingerprint(mine) == fingerprint(theirs)
        assert mine.data_ptr() != theirs.data_ptr()
        assert _core.memory_tier(mine)[1] is None  # is not paged
    a.load_state_dict(plain.state_dict())
    assert [tuple(norm.shape) for norm in norms(a)] == [(100,)] * len(SHAPES)
    assert not any(norm.any() for norm in norms(a))
    b, _ = stepped(cls, steps=0)
    b.load_state_dict(clipping.state_dict())
    assert norms(b) == [None] * len(SHAPES)


@EACH_CODE
def test_damaged_norms_are_refused_and_the_optimizer_is_as_before(code):
    options = {"block_wise": False, "percentile_clipping": 50, "state_code": code}
    source, _ = stepped(qadam.AdamW8bit, **options)
    target, _ = stepped(qadam.AdamW8bit, steps=2, **options)
    before = frozen(target)
    for bad in (torch.full((100,), torch.nan), -torch.ones(100), torch.ones(99), 3, None):
        saved = copy.deepcopy(source.state_dict())
        saved["state"][4]["gnorm_vec"] = bad
        with pytest.raises(ValueError, match="parameter 4: 'gnorm_vec'"):
            target.load_state_dict(saved)
        assert frozen(target) == before


@EACH_CODE
def test_exports_of_state_with_one_scale_come_back(code):
    """To bitsandbytes only the dynamic code as it is."""
    options = {"block_wise": False, "percentile_clipping": 50, "state_code": code}
    optimizer, _ = stepped(qadam.AdamW8bit, **options)
    again, _ = stepped(qadam.AdamW8bit, steps=0, **options)
    saved = to_bitsandbytes(optimizer.state_dict())
    again.load_state_dict(saved)
    assert scales(again) == scales(optimizer) == WHOLE
    assert (states(again) == states(optimizer)) == (code == "dynamic")
    wide, _ = stepped(qadam.AdamW, steps=0)
    wide.load_state_dict(to_torch(optimizer.state_dict()))
    for entry, own in zip(wide.state.values(), optimizer.state.values(), strict=True):
        for name in MOMENTS:
            assert same_bits(entry[name], state_values(own, name))
