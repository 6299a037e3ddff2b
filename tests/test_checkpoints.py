"""Checkpoints that torch, bitsandbytes and qadam write, each loaded by the others.

bitsandbytes is the real package, on the CPU; its old layouts are made from those it writes today.
"""

import copy
from pathlib import Path

import bitsandbytes
import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import (
    BLOCK,
    CODES,
    code_step,
    fingerprint,
    frozen,
    in_ratio,
    same_bits,
    state_values,
    train,
    twins,
)
from torch.distributed.checkpoint import state_dict as tools
from torch.nn import Parameter

import qadam
from qadam import _core, interop
from qadam import state as qstate
from qadam.state import to_bitsandbytes, to_torch

pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU"),
]

SHAPES = ((70, 60), (30,), (5000,), (), (4, 1100))
WRAPPED = "__bnb_optimizer_quant_state__"
MOMENTS = {"1": "exp_avg", "2": "exp_avg_sq"}
CLASSES = [getattr(qadam.optim, name) for name in qadam.optim.__all__ if "Adam" in name]
NAMES = [cls.__name__ for cls in CLASSES]
PARTIAL = 3.2e-5
"""Of a block's largest value: what the CPU quantizer of bitsandbytes does not tell from zero."""


def copied(params):
    return [Parameter(p.detach().clone()) for p in params]


def trained(cls, steps=20, shapes=SHAPES, **options):
    params = twins(*shapes, n=1)[0]
    optimizer = cls(params, **{"lr": 0.01, "weight_decay": 0.0, **options})
    train(steps, optimizer)
    return optimizer, params


def dynamic8(params, **options):
    """The class whose codes bitsandbytes' are."""
    return qadam.AdamW8bit(params, state_code="dynamic", **options)


def ratio8(params, **options):
    return qadam.AdamW8bit(params, state_code="ratio", **options)


def flat(entry):
    """An entry of bitsandbytes, unwrapped."""
    return {**{k: v for k, v in entry.items() if k != WRAPPED}, **entry.get(WRAPPED, {})}


def flattened(saved):
    """A state dict as bitsandbytes wrote it before it wrapped anything."""
    return {**saved, "state": {k: flat(v) for k, v in saved["state"].items()}}


def numbers(entry, name):
    """A moment of an entry of any format, of a contiguous parameter, as float32."""
    if name in entry:
        return entry[name]
    if in_ratio(entry):
        return state_values(entry, name)
    if f"{name}_code" in entry:
        codes, scales = entry[f"{name}_code"], entry[f"{name}_scale"]
        table, block = torch.tensor(_core.dynamic_map(name == "exp_avg")), BLOCK
    else:
        entry, i = flat(entry), {v: k for k, v in MOMENTS.items()}[name]
        codes = entry[f"state{i}"]
        if codes.dtype != torch.uint8:
            return codes
        scales, table = entry.get(f"absmax{i}", entry.get(f"max{i}")), entry[f"qmap{i}"]
        block = next(b for b in (256, 2048, 1 << 30) if -(-codes.numel() // b) == len(scales))
    scales = scales.repeat_interleave(min(block, codes.numel()))[: codes.numel()]
    return (table[codes.long()].flatten() * scales).reshape(codes.shape)


def largest(values):
    """For each element the largest magnitude of its block."""
    blocks = values.abs().flatten().split(BLOCK)
    return torch.cat([block.max().expand(len(block)) for block in blocks]).reshape(values.shape)


# Real packages: what they save is loaded.

THEIRS = {
    "torch.Adam": (torch.optim.Adam, {}),
    "torch.AdamW": (torch.optim.AdamW, {}),
    "torch.AdamW foreach": (torch.optim.AdamW, {"foreach": True}),
    "torch.AdamW fused": (torch.optim.AdamW, {"fused": True}),
    "torch.AdamW tensor lr": (torch.optim.AdamW, {"lr": torch.tensor(0.01)}),
    **{f"bnb.{name}": (getattr(bitsandbytes.optim, name), {}) for name in NAMES},
    **{f"qadam.{name}": (getattr(qadam, name), {}) for name in NAMES},
    "bnb.AdamW at 8": (bitsandbytes.optim.AdamW, {"optim_bits": 8}),
    "qadam.AdamW8bit, ratio": (qadam.AdamW8bit, {"state_code": "ratio"}),
}


@pytest.fixture(scope="module")
def checkpoints():
    """By name: a state dict, the parameters' shapes are SHAPES."""
    made = {}

    def get(name):
        if name not in made:
            cls, options = THEIRS[name]
            made[name] = trained(cls, 5, **options)[0].state_dict()
        return copy.deepcopy(made[name])

    return get


@pytest.mark.parametrize(
    ("target", "code"),
    [*((cls, "dynamic") for cls in CLASSES), (qadam.AdamW8bit, "ratio")],
    ids=[*NAMES, "AdamW8bit, ratio"],
)
@pytest.mark.parametrize("source", THEIRS)
def test_every_class_loads_every_checkpoint(source, target, code, checkpoints):
    saved = checkpoints(source)
    params = twins(*SHAPES, n=1)[0]
    optimizer = target(params, state_code=code)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert not {"alpha", "t_alpha", "t_beta3", "qadam_format"} & optimizer.param_groups[0].keys()
    narrow = "8bit" in target.__name__
    for number, p in enumerate(params):
        entry = optimizer.state[p]
        assert entry["step"] == 5
        assert ("exp_avg_code" in entry) == (narrow and p.numel() >= 4096)
        assert not {WRAPPED, "state1", "qmap1"} & entry.keys()
        for name in MOMENTS.values():
            theirs, ours = numbers(saved["state"][number], name), numbers(entry, name)
            if name in entry:
                torch.testing.assert_close(ours, theirs, rtol=4e-7, atol=1e-44)
            else:
                error = (ours - theirs).abs().flatten()
                assert (error <= code_step(entry, name) * (1 + 1e-6)).all()
    train(1, optimizer)
    assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("name", ["torch.AdamW", "torch.AdamW fused", "bnb.AdamW32bit"])
def test_at_32_bits_the_next_20_steps_are_theirs_to_rounding(name):
    cls, options = THEIRS[name]
    theirs, old = trained(cls, **options, weight_decay=0.1)
    params = copied(old)
    ours = qadam.AdamW(params)
    ours.load_state_dict(theirs.state_dict())
    train(20, theirs, ours, first=20)
    for p, q in zip(old, params, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=4e-6)
        entry = theirs.state[p] if "torch" in name else theirs.state_dict()["state"]
        for key in MOMENTS.values():
            a = entry[key] if "torch" in name else numbers(theirs.state[p], key)
            b = ours.state[q][key]
            assert ((a - b).abs() <= 2e-6 * a.abs().max()).all()


@pytest.mark.parametrize("paged", ["", "Paged"])
def test_at_8_bits_each_of_the_next_20_steps_is_theirs_to_a_code_step(paged):
    theirs, old = trained(getattr(bitsandbytes.optim, f"{paged}AdamW8bit"), weight_decay=0.1)
    for number in range(20, 40):
        params = copied(old)
        ours = getattr(qadam, f"{paged}AdamW8bit")(params, state_code="dynamic")
        ours.load_state_dict(theirs.state_dict())
        train(1, theirs, ours, first=number)
        for p, q in zip(old, params, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
            for key in MOMENTS.values():
                a, b = numbers(theirs.state[p], key), numbers(ours.state[q], key)
                bound = 2e-6 * a.abs().max()
                if key not in ours.state[q]:
                    step = code_step(ours.state[q], key).reshape(a.shape) * 1.0001
                    bound = torch.maximum(step, PARTIAL * largest(b))
                assert ((a - b).abs() <= bound).all()


def test_at_8_bits_20_steps_on_their_own_part_less_than_either_from_exact_state():
    """Where two encoders round apart, errors stay; they do not add up."""
    theirs, old = trained(bitsandbytes.optim.AdamW8bit, weight_decay=0.1)
    ours, exact = dynamic8(copied(old)), qadam.AdamW32bit(copied(old))
    for optimizer in (ours, exact):
        optimizer.load_state_dict(theirs.state_dict())
    train(20, theirs, ours, exact, first=20)
    lists = [o.param_groups[0]["params"] for o in (theirs, ours, exact)]
    for p, q, r in zip(*lists, strict=True):
        if q.numel() < 4096:
            continue
        assert (p - q).abs().max() < 0.02 * 20 * 0.01  # of how far a parameter can go
        for key in MOMENTS.values():
            values = [numbers(o.state[x], key) for o, x in ((theirs, p), (ours, q), (exact, r))]
            a, b, c = (value / largest(values[2]) for value in values)
            assert (a - b).square().mean() < (a - c).square().mean() < 0.02**2
            assert (a - b).abs().max() < 0.06


@pytest.mark.parametrize("form", ["wrapped", "flat"])
@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdam8bit"])
def test_codes_of_bitsandbytes_are_taken_over_bit_for_bit(name, form, checkpoints):
    saved = checkpoints(f"bnb.{name}")
    given = saved if form == "wrapped" else flattened(saved)
    before = copy.deepcopy(given)
    params = twins(*SHAPES, n=1)[0]
    optimizer = dynamic8(params)
    optimizer.load_state_dict(given)
    for number in (0, 2, 4):
        entry, theirs = optimizer.state[params[number]], flat(saved["state"][number])
        for i, key in MOMENTS.items():
            assert same_bits(entry[f"{key}_code"], theirs[f"state{i}"])
            assert same_bits(entry[f"{key}_scale"], theirs[f"absmax{i}"])
    assert str(given) == str(before)
    for entry, own in zip(given["state"].values(), optimizer.state.values(), strict=True):
        theirs = {t.data_ptr() for t in flat(entry).values() if isinstance(t, torch.Tensor)}
        assert not theirs & {t.data_ptr() for t in own.values() if isinstance(t, torch.Tensor)}


# Layouts of older versions.


def old_blocks(entry):
    """Codes in blocks of 2048, of values that these can hold."""
    for i in MOMENTS:
        absmax = entry[f"absmax{i}"]
        entry[f"absmax{i}"] = torch.stack([part.max() for part in absmax.split(8)])


def one_block(entry):
    """``block_wise=False``."""
    for i in MOMENTS:
        entry[f"max{i}"] = entry.pop(f"absmax{i}").max().reshape(1)
        entry[f"new_max{i}"] = torch.zeros(1)
    entry["gnorm_vec"] = torch.zeros(100)


def no_map(entry):
    del entry["qmap1"], entry["qmap2"]


def linear_map(entry):
    entry["qmap1"], entry["qmap2"] = torch.linspace(-1, 1, 256), torch.linspace(0, 1, 256)


def rounded_map(entry):
    for i in MOMENTS:
        entry[f"qmap{i}"] *= 1 + 2**-23


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("old", [old_blocks, one_block, no_map, linear_map, rounded_map])
def test_older_layouts_of_bitsandbytes_mean_the_same(old, bits, checkpoints):
    saved = flattened(checkpoints("bnb.Adam8bit"))
    meant = copy.deepcopy(saved)
    for number in (0, 2, 4):
        old(saved["state"][number])
        meant["state"][number] = dict(saved["state"][number])
        if old is no_map:
            for i, key in MOMENTS.items():
                table = torch.tensor(_core.dynamic_map(key == "exp_avg"))
                meant["state"][number][f"qmap{i}"] = table
    params = twins(*SHAPES, n=1)[0]
    optimizer = qadam.Adam(params, optim_bits=bits)
    optimizer.load_state_dict(saved)
    for number in (0, 2, 4):
        entry = optimizer.state[params[number]]
        assert not {"gnorm_vec", "new_max1", "max1"} & entry.keys()
        for i, key in MOMENTS.items():
            a, b = numbers(meant["state"][number], key), numbers(entry, key)
            if bits == 32 or old is not linear_map:
                torch.testing.assert_close(a, b, rtol=8e-7, atol=0)
            else:
                assert ((a - b).abs().flatten() <= code_step(entry, key) * (1 + 1e-6)).all()
            if bits == 8 and old is not linear_map:
                assert same_bits(entry[f"{key}_code"], saved["state"][number][f"state{i}"])
    train(1, optimizer)


def with_norms(entry):
    entry["gnorm_vec"] = torch.rand(100, generator=torch.Generator().manual_seed(1))


def whole(saved):
    """A flat state dict of an old version with ``block_wise=False`` and percentile clipping."""
    for number in (0, 2, 4):
        one_block(saved["state"][number])
    for entry in saved["state"].values():
        with_norms(entry)
    return saved


WHOLE = qstate.Format(8, block_wise=False, history=True)


@pytest.mark.parametrize("wrap", [False, True], ids=["flat", "wrapped"])
def test_one_scale_and_norms_of_bitsandbytes_are_taken_over_as_they_are(wrap, checkpoints):
    saved = whole(flattened(checkpoints("bnb.AdamW8bit")))
    params = twins(*SHAPES, n=1)[0]
    for number, p in enumerate(params):
        theirs = saved["state"][number]
        given = dict(theirs)
        if wrap:
            given = {
                "step": theirs["step"],
                WRAPPED: {k: v for k, v in theirs.items() if k != "step"},
            }
        read = interop.read_entry(given, p.shape, "p")
        assert not {"max1", "new_max1", "state1", WRAPPED} & read.keys()
        assert read["gnorm_vec"] is theirs["gnorm_vec"]
        stored = WHOLE if number in (0, 2, 4) else qstate.Format(32, history=True)
        assert qstate.format_of(read) == stored
        entry = qstate.fit(read, p, stored, "p")
        assert same_bits(entry["gnorm_vec"], theirs["gnorm_vec"])
        for i, key in MOMENTS.items():
            if stored is WHOLE:
                assert same_bits(entry[f"{key}_code"], theirs[f"state{i}"])
                assert same_bits(entry[f"{key}_scale"], theirs[f"max{i}"])
            else:
                assert same_bits(entry[key], theirs[f"state{i}"])


def test_one_scale_beside_blocks_is_repeated(checkpoints):
    saved = flattened(checkpoints("bnb.AdamW8bit"))["state"][0]
    saved["max2"] = saved.pop("absmax2").max().reshape(1)
    entry = interop.read_entry(saved, torch.Size(SHAPES[0]), "p")
    assert qstate.format_of(entry).block_wise
    assert same_bits(entry["exp_avg_scale"], saved["absmax1"])
    assert same_bits(entry["exp_avg_sq_scale"], saved["max2"].repeat(17))


def test_one_scale_whose_codes_mean_something_else_is_decoded(checkpoints):
    saved = whole(flattened(checkpoints("bnb.AdamW8bit")))["state"][0]
    linear_map(saved)
    entry = interop.read_entry(saved, torch.Size(SHAPES[0]), "p")
    for i, key in MOMENTS.items():
        meant = saved[f"qmap{i}"][saved[f"state{i}"].long()] * saved[f"max{i}"]
        assert same_bits(entry[key], meant)


def test_one_scale_and_norms_go_to_bitsandbytes_which_goes_on(checkpoints):
    saved = whole(flattened(checkpoints("bnb.AdamW8bit")))
    params = [Parameter(torch.randn(shape)) for shape in SHAPES]
    state = {}
    for number, p in enumerate(params):
        stored = WHOLE if number in (0, 2, 4) else qstate.Format(32, history=True)
        state[number] = qstate.fit(
            interop.read_entry(saved["state"][number], p.shape, "p"), p, stored, "p"
        )
    group = {**saved["param_groups"][0], "percentile_clipping": 5, "block_wise": False}
    group |= {"max_unorm": 0.1, "skip_zeros": True}
    ours = {"state": state, "param_groups": [group]}
    written = to_bitsandbytes(ours)
    for key in ("percentile_clipping", "block_wise", "max_unorm", "skip_zeros"):
        assert written["param_groups"][0][key] == group[key]
        assert to_torch(ours)["param_groups"][0][key] == group[key]
    for number, p in enumerate(params):
        entry, old = written["state"][number], saved["state"][number]
        assert WRAPPED not in entry
        assert same_bits(entry["gnorm_vec"], old["gnorm_vec"])
        assert entry["gnorm_vec"].data_ptr() != state[number]["gnorm_vec"].data_ptr()
        for i in MOMENTS:
            assert same_bits(entry[f"state{i}"], old[f"state{i}"])
            if number in (0, 2, 4):
                assert f"max{i}" not in entry
                assert same_bits(entry[f"absmax{i}"], old[f"max{i}"].repeat(-(-p.numel() // BLOCK)))

    theirs = bitsandbytes.optim.AdamW8bit(params)
    theirs.load_state_dict(written)
    mine = copied(params)
    reference = dynamic8(mine)
    reference.load_state_dict(to_bitsandbytes(ours) | {"param_groups": [saved["param_groups"][0]]})
    train(1, theirs, reference)
    for p, q in zip(params, mine, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
    again = flat(theirs.state_dict()["state"][0])["gnorm_vec"]
    assert same_bits(again, saved["state"][0]["gnorm_vec"])  # bitsandbytes leaves it alone


def test_one_scale_of_another_memory_order_goes_to_bitsandbytes_code_for_code():
    p = Parameter(torch.randn(8, 6, 10, 12).contiguous(memory_format=torch.channels_last))
    moments = {"step": 1, "exp_avg": torch.randn(p.shape), "exp_avg_sq": torch.rand(p.shape)}
    entry = qstate.fit(moments, p, qstate.Format(8, block_wise=False), "p")
    group = dynamic8([p]).state_dict()["param_groups"]
    written = to_bitsandbytes({"state": {0: entry}, "param_groups": group})["state"][0]
    for i, key in MOMENTS.items():
        assert written[f"state{i}"].is_contiguous()
        assert same_bits(written[f"state{i}"], entry[f"{key}_code"])
        assert same_bits(written[f"absmax{i}"], entry[f"{key}_scale"].repeat(23))


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_torch_does_not_mind_the_norms_and_an_export_has_none(options):
    """They would be out of date once torch has stepped."""
    ours, params = trained(qadam.AdamW, 3)
    saved = ours.state_dict()
    plain, other = copied(params), copied(params)
    a, b = (torch.optim.AdamW(x, **options) for x in (plain, other))
    a.load_state_dict(copy.deepcopy(saved))
    for entry in saved["state"].values():
        with_norms(entry)
    b.load_state_dict(copy.deepcopy(saved))
    assert same_bits(b.state[other[0]]["gnorm_vec"], saved["state"][0]["gnorm_vec"])
    train(2, a, b)
    assert all(same_bits(p, q) for p, q in zip(plain, other, strict=True))
    for entry in to_torch(saved)["state"].values():
        assert entry.keys() == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("form", ["qadam", "bitsandbytes"])
def test_damaged_norms_stop_only_who_wants_them(form, checkpoints):
    saved = checkpoints(f"{form}.AdamW8bit".replace("bitsandbytes", "bnb"))
    saved = flattened(saved) if form == "bitsandbytes" else saved
    params = twins(*SHAPES, n=1)[0]
    for bad, words in (
        (torch.full((100,), NAN), "'gnorm_vec' holds nan"),
        (-torch.ones(100), "'gnorm_vec' holds -1"),
        (torch.ones(99), r"'gnorm_vec' has shape \(99,\); \(100,\)"),
        (torch.ones(100).int(), "'gnorm_vec' is torch.int32"),
        ("x", "'gnorm_vec' is str"),
    ):
        saved["state"][0]["gnorm_vec"] = bad
        entry = interop.read_entry(saved["state"][0], params[0].shape, "parameter 0")
        with pytest.raises(ValueError, match=f"parameter 0: {words}"):
            qstate.fit(entry, params[0], WHOLE, "parameter 0")
        with pytest.raises(ValueError, match=f"parameter 0: {words}"):
            to_bitsandbytes(saved)
        to_torch(saved)
        optimizer = dynamic8(params)
        optimizer.load_state_dict(saved)
        assert "gnorm_vec" not in optimizer.state[params[0]]


def test_codes_of_bitsandbytes_move_to_another_memory_order():
    theirs, (p,) = trained(bitsandbytes.optim.AdamW8bit, 5, [(8, 6, 10, 12)])
    q = Parameter(p.detach().clone().contiguous(memory_format=torch.channels_last))
    ours = dynamic8([q])
    ours.load_state_dict(theirs.state_dict())
    entry = ours.state[q]
    assert entry["memory_order"].tolist() == [0, 2, 3, 1]
    assert entry["exp_avg_code"].stride() == q.stride()
    order, inverse = [0, 2, 3, 1], [0, 3, 1, 2]
    for key in MOMENTS.values():
        ordered = {
            f"{key}_code": entry[f"{key}_code"].permute(order),
            f"{key}_scale": entry[f"{key}_scale"],
        }
        a = numbers(theirs.state[p], key)
        step = code_step(ordered, key).reshape(ordered[f"{key}_code"].shape).permute(inverse)
        assert ((a - numbers(ordered, key).permute(inverse)).abs() <= step * (1 + 1e-6)).all()
    back = to_bitsandbytes(ours.state_dict())["state"][0]
    assert back["state1"].is_contiguous()
    torch.testing.assert_close(
        numbers(back, "exp_avg"), numbers(theirs.state[p], "exp_avg"), rtol=0.1, atol=2e-3
    )


def test_state_of_bitsandbytes_whose_order_cannot_be_known_is_refused(checkpoints):
    """A first step makes such parameters contiguous, and leaves the state's strides."""
    theirs, (p,) = trained(bitsandbytes.optim.AdamW8bit, 0, [(8, 6, 10, 12)])
    p.data = p.data.contiguous(memory_format=torch.channels_last)
    train(1, theirs)
    assert p.is_contiguous()
    assert not theirs.state[p]["state1"].is_contiguous()
    ours = dynamic8(copied([p]))
    with pytest.raises(ValueError, match=r"parameter 0: 'state1' has strides .*contiguous"):
        ours.load_state_dict(theirs.state_dict())


def documented(name):
    """The Python that docs/state-format.md shows after the word ``name``."""
    text = (Path(__file__).parent.parent / "docs" / "state-format.md").read_text()
    return text.split(name)[1].split("```python\n")[1].split("```")[0]


def test_the_documented_way_to_say_which_order_works():
    """As CUDA leaves it: values in the parameter's row-major order, another order's strides."""
    theirs, (p,) = trained(bitsandbytes.optim.AdamW8bit, 3, [(8, 6, 10, 12)])
    saved = copy.deepcopy(theirs.state_dict())
    quant = saved["state"][0][WRAPPED]
    strides = torch.empty(p.shape).contiguous(memory_format=torch.channels_last).stride()
    for key in ("state1", "state2"):
        quant[key] = quant[key].as_strided(p.shape, strides)
    exec(documented("Say which"), {"torch": torch, "state_dict": saved})  # noqa: S102
    ours = dynamic8(copied([p]))
    ours.load_state_dict(saved)
    reference = dynamic8(copied([p]))
    reference.load_state_dict(theirs.state_dict())
    assert frozen(ours)[1] == frozen(reference)[1]


def test_the_documented_map_is_the_map():
    def rounded(x):
        return torch.tensor(x, dtype=torch.float32).item()

    def middle(k, least):
        e = k.bit_length() - 1
        decade = 10.0 ** (e - least)
        return (2 * (k - 2**e) + 1) * rounded(0.45 * decade / 2**e) + rounded(0.1 * decade)

    positive = [middle(k, 6) for k in range(1, 128)]
    signed = [*(-x for x in positive[::-1]), 0.0, *positive, 1.0]
    unsigned = [0.0, *(middle(k, 7) for k in range(2, 256)), 1.0]
    assert same_bits(torch.tensor(signed), torch.tensor(_core.dynamic_map(True)))
    assert same_bits(torch.tensor(unsigned), torch.tensor(_core.dynamic_map(False)))


def test_the_documented_order_of_blocks_is_the_order():
    p = Parameter(torch.randn(4, 3, 10, 7).contiguous(memory_format=torch.channels_last))
    ours = dynamic8([p], min_8bit_size=0, betas=(0.0, 0.0))
    train(1, ours)
    entry = ours.state[p]
    names = {"codes": entry["exp_avg_code"], "memory_order": entry["memory_order"].tolist()}
    exec(documented("### Blocks"), names)  # noqa: S102
    table = torch.tensor(_core.dynamic_map(True))
    scales = entry["exp_avg_scale"].repeat_interleave(BLOCK)[: p.numel()]
    values = table[names["in_blocks"].long()] * scales
    in_memory = p.grad.permute(0, 2, 3, 1).reshape(-1)
    assert ((values - in_memory).abs() <= 0.0071 * scales).all()


def test_paged_state_stays_paged_whoever_wrote_it():
    for cls in (bitsandbytes.optim.AdamW8bit, torch.optim.AdamW, qadam.AdamW8bit):
        theirs, old = trained(cls, 2, [(100_000,), (50,)])
        params = copied(old)
        ours = qadam.PagedAdamW8bit(params, state_code="dynamic")
        ours.load_state_dict(theirs.state_dict())
        mapped = ours.memory()["mapped"]
        assert (mapped["state"], mapped["scales"]) == (200_000, 2 * 4 * 391)
        assert ours.state[params[0]]["step"] == 2


# Weight decay: bitsandbytes decouples it, whatever the class is called.


@pytest.mark.parametrize("form", [lambda saved: saved, flattened], ids=["wrapped", "flat"])
def test_decay_that_was_decoupled_stays_so_in_an_adam(form):
    """As torch's Adam obeys ``decoupled_weight_decay``."""
    for cls in (bitsandbytes.optim.Adam, bitsandbytes.optim.AdamW8bit, torch.optim.AdamW):
        theirs, old = trained(cls, 1, weight_decay=0.1)
        saved = form(theirs.state_dict())
        for group in saved["param_groups"]:  # as old versions had them
            for key in ("alpha", "t_alpha", "t_beta3"):
                group.pop(key, None)
        ours, others = copied(old), copied(old)
        adam, adamw = qadam.Adam(ours), qadam.AdamW(others)
        for optimizer in (adam, adamw):
            optimizer.load_state_dict(saved)
        assert adam.param_groups[0]["decoupled_weight_decay"] is True
        train(2, adam, adamw)
        assert all(same_bits(p, q) for p, q in zip(ours, others, strict=True))


def test_coupled_decay_is_not_silently_decoupled_by_an_export():
    ours, _ = trained(qadam.Adam, 1, weight_decay=0.1)
    with pytest.raises(ValueError, match=r"group 0 has weight_decay=0\.1"):
        to_bitsandbytes(ours.state_dict())
    assert to_torch(ours.state_dict())["param_groups"][0]["decoupled_weight_decay"] is False


# Exports.

OURS = [qadam.AdamW, qadam.AdamW8bit, qadam.PagedAdamW8bit]


@pytest.mark.parametrize("cls", OURS)
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("code", CODES)
def test_torch_loads_our_export_and_continues(code, cls, options):
    ours, params = trained(cls, weight_decay=0.1, state_code=code)
    theirs_params = copied(params)
    theirs = torch.optim.AdamW(theirs_params, **options)
    saved = to_torch(ours.state_dict())
    assert saved["param_groups"][0].keys() == theirs.state_dict()["param_groups"][0].keys()
    theirs.load_state_dict(saved)
    wide = qadam.AdamW(copied(params))
    wide.load_state_dict(ours.state_dict())
    (wide_params,) = [g["params"] for g in wide.param_groups]
    for p, q in zip(wide_params, theirs_params, strict=True):
        for key, value in wide.state[p].items():
            assert same_bits(value, theirs.state[q][key])
    train(20, theirs, wide, first=20)
    for p, q in zip(wide_params, theirs_params, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=4e-6)


def test_an_export_has_the_memory_order_of_the_state():
    p = Parameter(torch.randn(8, 6, 10, 12).contiguous(memory_format=torch.channels_last))
    q = Parameter(p.detach().clone())
    ours, theirs = dynamic8([p]), torch.optim.AdamW([q], fused=True)
    train(3, ours)
    theirs.load_state_dict(to_torch(ours.state_dict()))
    assert theirs.state[q]["exp_avg"].stride() == q.stride()


@pytest.mark.parametrize("cls", OURS[:2])
@pytest.mark.parametrize("bits", [None, 8, 32])
def test_bitsandbytes_loads_our_export_and_continues(cls, bits):
    ours, params = trained(cls, weight_decay=0.1, state_code="dynamic")
    saved = to_bitsandbytes(ours.state_dict(), optim_bits=bits)
    narrow = bits == 8 or (bits is None and "8bit" in cls.__name__)
    old = copied(params)
    theirs = getattr(bitsandbytes.optim, "AdamW8bit" if narrow else "AdamW32bit")(old)
    assert saved["param_groups"][0].keys() == theirs.state_dict()["param_groups"][0].keys()
    theirs.load_state_dict(saved)
    fresh = copied(params)
    reference = getattr(qadam, "AdamW8bit" if narrow else "AdamW32bit")(fresh, state_code="dynamic")
    reference.load_state_dict(ours.state_dict())
    for number in range(20, 40):
        train(1, theirs, reference, first=number)
        for p, q in zip(old, fresh, strict=True):
            entry = reference.state[q]
            assert entry["step"] == theirs.state[p]["step"] == number + 1
            for key in MOMENTS.values():
                a, b = numbers(theirs.state[p], key), numbers(entry, key)
                bound = 3e-6 * a.abs().max()
                if key not in entry:
                    step = code_step(entry, key).reshape(a.shape) * 1.0001
                    bound = torch.maximum(step, PARTIAL * largest(b))
                assert ((a - b).abs() <= bound).all()
            torch.testing.assert_close(p, q, rtol=2e-6, atol=5e-6)
            if narrow:  # their next step starts where ours did
                with torch.no_grad():
                    q.copy_(p)
        if narrow:
            reference.load_state_dict(theirs.state_dict())


def test_codes_go_to_bitsandbytes_and_back_bit_for_bit():
    ours, params = trained(dynamic8)
    saved = to_bitsandbytes(ours.state_dict())
    assert saved["state"][0]["step"] == 20
    assert type(saved["state"][0]["step"]) is int
    own = bitsandbytes.functional.create_dynamic_map(signed=False)
    torch.testing.assert_close(saved["state"][0]["qmap2"], own, rtol=1.5e-7, atol=0)
    theirs = bitsandbytes.optim.AdamW8bit(copied(params))
    theirs.load_state_dict(saved)
    again = dynamic8(copied(params))
    again.load_state_dict(theirs.state_dict())
    assert frozen(again)[1] == frozen(ours)[1]


def test_exports_share_no_memory_with_the_optimizer_and_convert_foreign_dicts():
    ours, params = trained(qadam.AdamW, 3)
    before = frozen(ours)
    for export in (to_torch, to_bitsandbytes):
        for entry in export(ours.state_dict())["state"].values():
            for value in entry.values():
                if isinstance(value, torch.Tensor):
                    value.fill_(7)
    assert frozen(ours) == before
    there_and_back = to_torch(to_bitsandbytes(to_torch(ours.state_dict())))
    again = qadam.AdamW(params)
    again.load_state_dict(there_and_back)
    assert frozen(again)[1] == before[1]


def test_exports_keep_what_schedulers_put_into_groups_and_numbers_given_as_tensors():
    ours, params = trained(qadam.AdamW, 1, lr=torch.tensor(0.25))
    torch.optim.lr_scheduler.StepLR(ours, 5)
    group = to_bitsandbytes(ours.state_dict())["param_groups"][0]
    assert (group["lr"], group["initial_lr"]) == (0.25, 0.25)
    assert type(group["lr"]) is float
    theirs = bitsandbytes.optim.AdamW(copied(params))
    theirs.load_state_dict(to_bitsandbytes(ours.state_dict()))
    train(1, theirs)


def test_exports_refuse_what_the_other_package_cannot_do():
    ours, _ = trained(dynamic8, 1)
    saved = ours.state_dict()
    with pytest.raises(ValueError, match=r"optim_bits must be 32, 8 or None, got 4"):
        to_bitsandbytes(saved, optim_bits=4)
    for option in ("amsgrad", "maximize"):
        saved["param_groups"][0][option] = True
        with pytest.raises(ValueError, match=f"group 0 has {option}=True"):
            to_bitsandbytes(saved)
        del saved["param_groups"][0][option]
    del saved["state"][2]["exp_avg_sq_scale"]
    for export in (to_torch, to_bitsandbytes):
        with pytest.raises(ValueError, match=r"parameter 2.*'exp_avg_sq_scale'"):
            export(saved)


# The version.


def test_each_group_of_a_state_dict_has_the_version_and_the_optimizer_does_not():
    ours, params = trained(dynamic8, 1)
    assert [group["qadam_format"] for group in ours.state_dict()["param_groups"]] == [1]
    assert "qadam_format" not in ours.param_groups[0]
    theirs = torch.optim.AdamW(copied(params))
    theirs.load_state_dict(trained(qadam.AdamW, 1)[0].state_dict())
    again = qadam.AdamW(copied(params))
    again.load_state_dict(theirs.state_dict())
    assert "qadam_format" not in again.param_groups[0]


@pytest.mark.parametrize(
    ("version", "words"),
    [
        (2, "group 0.*'qadam_format' is 2.*newer qadam.*up to 1"),
        (0, "group 0.*'qadam_format' is 0"),
        ("1", "group 0.*'qadam_format' is '1'"),
        (True, "group 0.*'qadam_format' is True"),
        (None, "group 0.*'qadam_format' is None"),
    ],
)
def test_another_version_is_refused(version, words):
    ours, _ = trained(qadam.AdamW, 1)
    saved = copy.deepcopy(ours.state_dict())
    saved["param_groups"][0]["qadam_format"] = version
    before = frozen(ours)
    for load in (ours.load_state_dict, to_torch, to_bitsandbytes):
        with pytest.raises(ValueError, match=words):
            load(saved)
    assert frozen(ours) == before
    del saved["param_groups"][0]["qadam_format"]
    ours.load_state_dict(saved)


# Damage to foreign dicts; that to our own is in test_state_dict.py.


def drop(key):
    return lambda entry: entry.pop(key)


def put(key, value):
    def change(entry):
        entry[key] = value(entry[key]) if callable(value) else value

    return change


def freed(tensor):
    tensor = torch.as_tensor(tensor).clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def poke(key, value):
    def change(entry):
        entry[key] = entry[key].clone()
        entry[key].view(-1)[-1] = value

    return change


NAN, INF = float("nan"), float("inf")
DAMAGE_8 = {
    **{f"no {key}": (drop(key), [key]) for key in ("step", "state1", "state2", "absmax1")},
    "code shape": (put("state1", lambda t: t[1:]), [r"'state1' has shape \(69, 60\)"]),
    "code dtype": (put("state2", lambda t: t.float()), ["'state2' is torch.float32", "uint8"]),
    "code text": (put("state1", "x"), ["'state1' is str"]),
    "blocks": (put("absmax2", lambda t: t[:-1]), ["'absmax2'", r"\(17,\) or \(3,\)"]),
    "scale dtype": (put("absmax1", lambda t: t.half()), ["'absmax1' is torch.float16"]),
    "nan scale": (poke("absmax1", NAN), ["'absmax1' holds nan"]),
    "negative scale": (poke("absmax2", -1.0), ["'absmax2' holds -1"]),
    "inf scale": (poke("absmax2", INF), ["'absmax2' holds inf"]),
    "map size": (put("qmap1", lambda t: t[:16]), ["'qmap1'", r"\(16,\)", r"\(256,\)"]),
    "map none": (put("qmap2", None), ["'qmap2' is NoneType"]),
    "map nan": (poke("qmap1", NAN), ["'qmap1' holds nan"]),
    "map signed": (poke("qmap2", -1.0), ["'qmap2' holds -1"]),
    "mixed": (put("state2", torch.rand(70, 60)), ["'state2' is torch.float32"]),
    "ours too": (
        lambda entry: entry.update(exp_avg=torch.rand(70, 60)),
        ["'exp_avg' beside"],
    ),
    "wrapped twice": (
        lambda entry: entry.update({WRAPPED: {"state1": entry["state1"]}}),
        ["'state1' both in"],
    ),
    "wrapped none": (lambda entry: entry.update({WRAPPED: None}), [WRAPPED, "NoneType"]),
    "freed codes": (put("state1", freed), ["'state1' is .*freed"]),
    "freed scales": (put("absmax2", freed), ["'absmax2' is .*freed"]),
    "freed step": (put("step", freed), ["'step' is .*freed"]),
    "meta": (put("state2", lambda t: t.to("meta")), ["'state2' is a meta tensor"]),
    "sparse": (put("state2", lambda t: t.to_sparse()), ["'state2' is torch.sparse_coo"]),
    "step": (put("step", 10**400), ["'step' is a huge number"]),
    "step far": (put("step", 2**63), ["'step' is 9223372036854775808"]),
    "step nan": (put("step", NAN), ["'step' is nan"]),
}
DAMAGE_32 = {
    "no state2": (drop("state2"), ["state2"]),
    "shape": (put("state1", lambda t: t.T), [r"'state1' has shape \(60, 70\)"]),
    "nan": (poke("state1", NAN), ["'state1' holds nan"]),
    "negative": (poke("state2", -1.0), ["'state2' holds -1"]),
    "int": (put("state1", lambda t: t.int()), ["'state1' is torch.int32"]),
    "scales": (lambda entry: entry.update(absmax1=torch.ones(17)), ["'state1' is torch.float32"]),
    "ademamix": (put("state1", lambda t: torch.stack([t, t])), [r"\(2, 70, 60\)"]),
}


@pytest.mark.parametrize("wrap", [False, True], ids=["flat", "wrapped"])
@pytest.mark.parametrize("into", [8, 32])
@pytest.mark.parametrize(
    ("bits", "name"), [*((8, name) for name in DAMAGE_8), *((32, name) for name in DAMAGE_32)]
)
def test_a_damaged_dict_of_bitsandbytes_is_refused_by_key(bits, name, into, wrap, checkpoints):
    damage, words = (DAMAGE_8 if bits == 8 else DAMAGE_32)[name]
    saved = flattened(checkpoints(f"bnb.AdamW{bits}bit"))
    damage(saved["state"][0])
    if wrap and WRAPPED not in saved["state"][0]:
        for entry in saved["state"].values():
            inner = {key: entry.pop(key) for key in list(entry) if key != "step"}
            entry[WRAPPED] = inner
    optimizer, _ = trained(qadam.AdamW, 2, optim_bits=into, state_code="dynamic")
    before = frozen(optimizer)
    with pytest.raises(ValueError, match="parameter 0") as caught:
        optimizer.load_state_dict(saved)
    for word in words:
        assert caught.match(word)
    assert frozen(optimizer) == before


@pytest.mark.parametrize("source", ["torch.AdamW", "bnb.AdamW8bit"])
def test_state_of_a_parameter_that_no_group_lists_is_refused(source, checkpoints):
    for key in (7, "0"):
        saved = checkpoints(source)
        saved["state"][key] = saved["state"].pop(0)
        optimizer = qadam.AdamW(twins(*SHAPES, n=1)[0])
        with pytest.raises(ValueError, match=rf"'state' has an entry {key!r}, which is in no"):
            optimizer.load_state_dict(saved)
        assert not optimizer.state


def test_another_optimizer_of_bitsandbytes_is_refused():
    theirs, old = trained(bitsandbytes.optim.Lion8bit, 1)
    with pytest.raises(ValueError, match="parameter 0: the state has no 'state2'"):
        dynamic8(copied(old)).load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("cut", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_an_error_and_the_optimizer_is_as_before(cut, tmp_path):
    optimizer, _ = trained(qadam.AdamW8bit, 2, state_code="ratio")
    path = tmp_path / "state.pt"
    torch.save(optimizer.state_dict(), path)
    whole = path.read_bytes()
    train(1, optimizer)
    before = frozen(optimizer)
    path.write_bytes(whole[: int(len(whole) * cut)])
    with pytest.raises((RuntimeError, EOFError, OSError)):
        optimizer.load_state_dict(torch.load(path))
    assert frozen(optimizer) == before
    path.write_bytes(whole)
    optimizer.load_state_dict(torch.load(path, weights_only=True))


# torch's distributed checkpoints.


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("is_flat", [False, True])
@pytest.mark.parametrize(
    ("source", "target"),
    [*((cls, cls) for cls in (qadam.AdamW, dynamic8, ratio8)), (torch.optim.AdamW, qadam.AdamW)],
)
def test_distributed_checkpoints_keep_the_state(source, target, is_flat, tmp_path):
    options = tools.StateDictOptions(flatten_optimizer_state_dict=is_flat)

    def make(cls, lr):
        torch.manual_seed(0)
        model = torch.nn.Linear(80, 60)
        optimizer = cls(model.parameters(), lr=lr)
        train(2, optimizer)
        return model, optimizer

    model, optimizer = make(source, 0.5)
    saved = tools.get_optimizer_state_dict(model, optimizer, options=options)
    dcp.save({"optimizer": saved}, checkpoint_id=tmp_path, no_dist=True)
    other_model, other = make(target, 0.25)
    train(1, other, first=2)
    template = tools.get_optimizer_state_dict(other_model, other, options=options)
    # torch's own checkpoints have no version
    planner = dcp.DefaultLoadPlanner(allow_partial_load=source is not target)
    dcp.load({"optimizer": template}, checkpoint_id=tmp_path, no_dist=True, planner=planner)
    tools.set_optimizer_state_dict(other_model, other, template, options=options)
    assert other.param_groups[0]["lr"] == 0.5
    for p, q in zip(model.parameters(), other_model.parameters(), strict=True):
        mine = {key: fingerprint(value) for key, value in other.state[q].items()}
        assert mine == {key: fingerprint(value) for key, value in optimizer.state[p].items()}


@pytest.mark.parametrize(("first", "second"), [([0, 0, 1], []), ([0, 1], [1]), ([0, 1, 0], [])])
def test_a_key_given_twice_is_refused(first, second):
    """It would shift what comes after to other parameters."""
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
    groups = [{"params": params[: len(first)]}, {"params": params[len(first) :]}]
    optimizer = qadam.AdamW([group for group in groups if group["params"]])
    saved = optimizer.state_dict()
    for group, keys in zip(saved["param_groups"], [first, second], strict=False):
        group["params"] = keys
    before = frozen(optimizer)
    with pytest.raises(ValueError, match="'params' has"):
        optimizer.load_state_dict(saved)
    assert frozen(optimizer) == before
