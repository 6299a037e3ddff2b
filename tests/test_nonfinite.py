"""NaN and infinite gradients: skipped and counted, let through, or refused."""

import math
import warnings

import pytest
import torch
from conftest import (
    ADAMS,
    CODES,
    WIDTHS,
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

NAN, INF = math.nan, math.inf
BAD = pytest.mark.parametrize("bad", [NAN, INF, -INF], ids=str)
RULES = pytest.mark.parametrize("cls", ADAMS)
EACH_WIDTH = pytest.mark.parametrize("width", WIDTHS)
EACH_CODE = pytest.mark.parametrize("code", CODES)
SIZE = 1000
WHERE = [0, 3, 255, 256, 300, 999]
"""Ends of blocks, of vectors and of the tail."""


def gradient(seed, size=SIZE, scale=0.1):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale


def pair(cls, width, steps=3, **options):
    """Two equal parameters with optimizers that have made the same steps."""
    (p,), (q,) = twins((SIZE,))
    made = [
        cls([x], lr=0.01, weight_decay=0.1, **WIDTHS[width], min_8bit_size=0, **options)
        for x in (p, q)
    ]
    train(steps, *made)
    return p, q, *made


@RULES
@BAD
def test_skip_leaves_parameter_and_32_bit_state_of_the_element_and_updates_the_others(cls, bad):
    p, q, a, b = pair(cls, "32")
    kept = p.detach().clone(), *(a.state[p][k].clone() for k in ("exp_avg", "exp_avg_sq"))
    p.grad, q.grad = gradient(7), gradient(7)
    p.grad[WHERE] = bad
    with pytest.warns(RuntimeWarning, match=f"{len(WHERE)} gradient elements"):
        a.step()
    b.step()
    now = (p, a.state[p]["exp_avg"], a.state[p]["exp_avg_sq"])
    reference = (q, b.state[q]["exp_avg"], b.state[q]["exp_avg_sq"])
    others = [i for i in range(SIZE) if i not in WHERE]
    for before, after, without in zip(kept, now, reference, strict=True):
        assert same_bits(before[WHERE], after[WHERE])
        assert same_bits(after[others], without[others])
    assert a.state[p]["step"] == b.state[q]["step"] == 4


@RULES
@BAD
@EACH_CODE
def test_skip_at_8_bits_leaves_the_parameter_and_the_state_within_one_code_step(code, cls, bad):
    p, q, a, b = pair(cls, code)
    names = ("exp_avg", "exp_avg_sq")
    before = {k: state_values(a.state[p], k).clone() for k in names}
    kept = p.detach().clone()
    p.grad, q.grad = gradient(7), gradient(7)
    p.grad[WHERE] = bad
    with pytest.warns(RuntimeWarning, match="NaN or infinite"):
        a.step()
    b.step()
    others = [i for i in range(SIZE) if i not in WHERE]
    assert same_bits(p[WHERE], kept[WHERE])
    if code == "dynamic":
        assert same_bits(p[others], q[others])
    else:  # kept elements widen scales, and so change what parameters make up for: half a cell each
        cells = [o.state[x]["exp_avg_scale"].max() / 63 for o, x in ((a, p), (b, q))]
        carry = 0.01 * 9 * (1 - 0.999**4) ** 0.5
        assert ((p - q)[others].abs() <= carry * sum(cells) / 2 + 2.5e-7).all()
    for name in names:
        after, step = state_values(a.state[p], name), code_step(a.state[p], name)
        assert after.isfinite().all()
        assert ((after - before[name]).abs() <= step)[WHERE].all()
        without = state_values(b.state[q], name)
        either = torch.maximum(step, code_step(b.state[q], name))
        assert ((after - without).abs() <= 2 * either)[others].all(), "no block is poisoned"
        assert (after != before[name])[others].any()


@RULES
@EACH_CODE
def test_skip_keeps_a_block_without_a_finite_gradient_bit_identical(code, cls):
    p, _, a, _ = pair(cls, code)
    before = {k: v.clone() for k, v in a.state[p].items() if torch.is_tensor(v)}
    kept = p.detach().clone()
    p.grad = gradient(7)
    p.grad[256:512] = NAN
    p.grad[768:] = INF
    with pytest.warns(RuntimeWarning, match="488 gradient elements"):
        a.step()
    now = a.state[p]
    for part, blocks in ((slice(256, 512), [1]), (slice(768, None), [3])):
        assert same_bits(p[part], kept[part])
        for moment in ("exp_avg", "exp_avg_sq"):
            assert same_bits(now[f"{moment}_code"][part], before[f"{moment}_code"][part])
            key = scale_key(now, moment)
            mine, old = (of[key].view(4, -1)[blocks] for of in (now, before))
            assert same_bits(mine, old)
    assert not same_bits(p[:256], kept[:256])


@EACH_WIDTH
@BAD
def test_skip_of_a_first_step_leaves_everything_zero(width, bad):
    p = Parameter(torch.ones(SIZE))
    a = qadam.AdamW([p], **WIDTHS[width], min_8bit_size=0)
    p.grad = torch.full((SIZE,), bad)
    with pytest.warns(RuntimeWarning):
        a.step()
    assert same_bits(p, torch.ones(SIZE))
    assert not state_values(a.state[p], "exp_avg").any()
    assert not state_values(a.state[p], "exp_avg_sq").any()
    assert a.nonfinite_count == SIZE


@EACH_WIDTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@BAD
def test_skip_works_for_every_gradient_dtype(width, dtype, bad):
    p = Parameter(torch.ones(300, dtype=dtype))
    a = qadam.AdamW([p], lr=0.1, **WIDTHS[width], min_8bit_size=0)
    p.grad = torch.ones(300, dtype=dtype)
    p.grad[[5, 299]] = bad
    with pytest.warns(RuntimeWarning, match="2 gradient elements"):
        a.step()
    assert p.isfinite().all()
    assert (p == 1).nonzero().flatten().tolist() == [5, 299]


@EACH_WIDTH
def test_skip_works_for_strided_parameters_and_gradients(width):
    big = torch.ones(40, 30)
    p = Parameter(big[:, ::2].t())
    a = qadam.AdamW([p], **WIDTHS[width], min_8bit_size=0)
    p.grad = torch.ones(40, 15).t()
    p.grad[3, 7] = NAN
    with pytest.warns(RuntimeWarning, match="1 gradient elements"):
        a.step()
    assert (p == 1).nonzero().tolist() == [[3, 7]]
    assert (big[:, 1::2] == 1).all()


@EACH_WIDTH
def test_training_goes_on_after_a_skipped_step(width):
    p, _, a, _ = pair(qadam.AdamW, width)
    p.grad = torch.full((SIZE,), NAN)
    with pytest.warns(RuntimeWarning):
        a.step()
    kept = p.detach().clone()
    train(5, a, first=4)
    assert p.isfinite().all()
    assert (p != kept).all()


def test_it_counts_all_elements_and_warns_exactly_once():
    params = twins((SIZE,), (3,), n=1)[0]
    a = qadam.AdamW(params)
    assert a.nonfinite_count == 0
    for p in params:
        p.grad = torch.ones_like(p)
        p.grad[:2] = NAN
    with pytest.warns(RuntimeWarning) as caught:
        a.step()
    assert len(caught) == 1
    assert caught[0].filename == __file__, "it points at the line that stepped"
    assert a.nonfinite_count == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        a.step()
        a.step()
    assert a.nonfinite_count == 12
    train(1, a)
    assert a.nonfinite_count == 12


def test_each_optimizer_warns_for_itself():
    for _ in range(2):
        p = Parameter(torch.ones(1))
        a = qadam.AdamW([p])
        p.grad = torch.full((1,), NAN)
        with pytest.warns(RuntimeWarning, match="1 gradient"):
            a.step()


def test_a_warning_turned_into_an_error_comes_after_the_step_and_is_counted():
    p = Parameter(torch.ones(2))
    a = qadam.AdamW([p], lr=0.5)
    p.grad = torch.tensor([NAN, 1.0])
    with pytest.raises(RuntimeWarning, match="1 gradient"):
        a.step()
    assert a.state[p]["step"] == 1
    assert p[0] == 1
    assert p[1] < 1
    assert a.nonfinite_count == 1


# Propagate.


@RULES
@BAD
def test_propagate_makes_the_parameter_nan_as_torch_does(cls, bad):
    (p,), (q,) = twins((SIZE,))
    a = cls([p], lr=0.01, nonfinite="propagate")
    b = getattr(torch.optim, cls.__name__)([q], lr=0.01)
    train(3, a, b)
    p.grad, q.grad = gradient(7), gradient(7)
    p.grad[WHERE] = q.grad[WHERE] = bad
    a.step()
    b.step()
    for mine, theirs in (
        (p, q),
        (a.state[p]["exp_avg"], b.state[q]["exp_avg"]),
        (a.state[p]["exp_avg_sq"], b.state[q]["exp_avg_sq"]),
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert p.isnan().nonzero().flatten().tolist() == WHERE
    assert a.nonfinite_count == len(WHERE)
    train(2, a, b, first=8)
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, equal_nan=True)


@RULES
@BAD
@EACH_CODE
def test_propagate_at_8_bits_poisons_the_element_and_not_its_block(code, cls, bad):
    p, q, a, b = pair(cls, code, nonfinite="propagate")
    p.grad, q.grad = gradient(7), gradient(7)
    p.grad[WHERE] = bad
    a.step()
    b.step()
    others = [i for i in range(SIZE) if i not in WHERE]
    assert p[WHERE].isnan().all()
    assert same_bits(p[others], q[others])
    for name in ("exp_avg", "exp_avg_sq"):
        assert a.state[p][scale_key(a.state[p], name)].isfinite().all()
    train(3, a, first=8)
    assert p.isnan().nonzero().flatten().tolist() == WHERE


# Raise.


@RULES
@EACH_WIDTH
@BAD
@pytest.mark.parametrize("fresh", [True, False], ids=["first step", "later step"])
def test_raise_names_the_parameter_and_writes_nothing(cls, width, bad, fresh):
    good, p = twins((300,), (SIZE,), n=1)[0]
    reference = twins((300,), (SIZE,), n=1)[0]
    a = cls([good, p], **WIDTHS[width], min_8bit_size=0, nonfinite="raise")
    b = cls(reference, **WIDTHS[width], min_8bit_size=0)
    if not fresh:
        train(2, a, b)
    good.grad, p.grad = torch.ones(300), gradient(7)
    p.grad[WHERE] = bad
    before, values = frozen(a), [fingerprint(x) for x in (good, p)]
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"parameter 1 has 6 non-finite gradient elements"):
            a.step()
        assert [fingerprint(x) for x in (good, p)] == values
        if not fresh:
            assert frozen(a) == before
    assert a.nonfinite_count == 0
    train(2, a, b, first=2)
    assert frozen(a)[1] == frozen(b)[1]
    assert same_bits(good, reference[0])
    assert same_bits(p, reference[1])


def test_raise_at_the_first_step_makes_no_state():
    p = Parameter(torch.ones(3))
    a = qadam.AdamW([p], nonfinite="raise")
    p.grad = torch.full((3,), NAN)
    with pytest.raises(RuntimeError, match="parameter 0"):
        a.step()
    assert len(a.state) == 0


def test_raise_counts_parameters_through_groups_and_past_those_without_gradient():
    params = twins((3,), (4,), (5,), (6,), n=1)[0]
    a = qadam.AdamW([{"params": params[:2]}, {"params": params[2:]}], nonfinite="raise")
    params[0].grad = torch.ones(3)
    params[3].grad = torch.tensor([1.0, NAN, 1.0, INF, 1.0, 1.0])
    with pytest.raises(RuntimeError, match="parameter 3 has 2 non-finite"):
        a.step()


def test_raise_sees_strided_gradients_and_parameters_that_share_memory():
    big = torch.ones(40, 30)
    p, q = Parameter(big), Parameter(big[:, ::2])
    a = qadam.AdamW([p, q], nonfinite="raise")
    p.grad = torch.ones(30, 40).t()
    q.grad = torch.ones(15, 40).t()
    q.grad[7, 3] = INF
    with pytest.raises(RuntimeError, match="parameter 1 has 1 non-finite"):
        a.step()
    assert (big == 1).all()
    q.grad[7, 3] = 1
    a.step()
    assert (big < 1).all()


# Huge, tiny, and NaN parameters.


@RULES
@EACH_WIDTH
@pytest.mark.parametrize("huge", [1e30, 3.4028234663852886e38, -3.4028234663852886e38], ids=str)
def test_huge_finite_gradients_keep_everything_finite(cls, width, huge):
    p, _, a, _ = pair(cls, width)
    kept = p.detach().clone()
    p.grad = gradient(7)
    p.grad[WHERE] = huge
    a.step()
    assert a.nonfinite_count == 0
    moved = (p - kept)[WHERE]
    assert (moved.sign() == -math.copysign(1, huge)).all()
    assert (moved.abs() < 4 * 0.01).all(), "Adam's bound for a single large gradient"
    for _ in range(2):
        assert p.isfinite().all()
        for name in ("exp_avg", "exp_avg_sq"):
            assert state_values(a.state[p], name).isfinite().all()
        train(20, a, first=8)
    assert (p - kept).abs().max() < 1


@RULES
@EACH_WIDTH
def test_a_gradient_of_float32s_maximum_everywhere_moves_by_about_lr(cls, width):
    p = Parameter(torch.zeros(300))
    a = cls([p], lr=0.01, **WIDTHS[width], min_8bit_size=0)
    p.grad = torch.full((300,), torch.finfo(torch.float32).max)
    a.step()
    torch.testing.assert_close(p, torch.full((300,), -0.01), rtol=1e-4, atol=0)


@EACH_WIDTH
@pytest.mark.parametrize("tiny", [1e-30, 1e-38, 1e-45], ids=str)
def test_tiny_gradients_stay_finite_and_follow_torch(width, tiny):
    p, q = (Parameter(torch.ones(300)) for _ in range(2))
    a = qadam.AdamW([p], lr=0.01, **WIDTHS[width], min_8bit_size=0)
    b = torch.optim.AdamW([q], lr=0.01)
    for _ in range(3):
        p.grad, q.grad = torch.full((300,), tiny), torch.full((300,), tiny)
        a.step()
        b.step()
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert a.nonfinite_count == 0


@RULES
@EACH_WIDTH
@BAD
def test_a_parameter_that_is_not_finite_does_not_touch_its_neighbours(cls, width, bad):
    p, q, a, b = pair(cls, width, steps=0)
    with torch.no_grad():
        p[WHERE] = bad
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # coupled decay makes the gradient NaN
        for step in range(3):
            p.grad, q.grad = gradient(step), gradient(step)
            a.step()
            b.step()
            if step == 0 or width == "32":
                others = [i for i in range(SIZE) if i not in WHERE]
                assert same_bits(p[others], q[others])
    assert not p[WHERE].isfinite().any()
    assert p[others].isfinite().all()
    for name in ("exp_avg", "exp_avg_sq"):
        assert state_values(a.state[p], name).isfinite().all()


def test_coupled_decay_of_a_nan_parameter_counts_as_a_nan_gradient():
    p = Parameter(torch.tensor([NAN, 1.0]))
    a = qadam.Adam([p], weight_decay=0.1)
    p.grad = torch.ones(2)
    with pytest.warns(RuntimeWarning, match="1 gradient"):
        a.step()
    assert a.nonfinite_count == 1
    assert a.state[p]["exp_avg"][0] == 0
