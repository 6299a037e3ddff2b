"""Parameters and gradients of any layout, what is refused, and what users replace between steps."""

import itertools
import warnings

import pytest
import torch
from conftest import CODES, WIDTHS, fingerprint, frozen, give_grads, same_bits, train
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import Parameter

import qadam

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
EACH_WIDTH = pytest.mark.parametrize("width", WIDTHS)


def optimizer_of(params, width, **options):
    return qadam.AdamW(params, lr=0.01, min_8bit_size=0, **WIDTHS[width], **options)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# Layouts: each function cuts a view out of a big tensor; elements that it leaves out are gaps.

LAYOUTS = {
    "contiguous": ((20, 30), lambda big: big),
    "transposed": ((20, 30), lambda big: big.t()),
    "columns": ((20, 40), lambda big: big[:, :30]),
    "middle columns": ((20, 40), lambda big: big[:, 5:33]),
    "every other row": ((40, 17), lambda big: big[::2]),
    "every third column": ((20, 90), lambda big: big[:, ::3]),
    "strided both ways": ((40, 60), lambda big: big[1::2, 2::3]),
    "transposed columns": ((20, 40), lambda big: big[:, :30].t()),
    "channels_last": ((4, 6, 7, 5), lambda big: big.permute(0, 3, 1, 2)),
    "channels_last_3d": ((2, 4, 6, 7, 5), lambda big: big.permute(0, 4, 1, 2, 3)),
    "permuted 4-D": ((4, 6, 7, 5), lambda big: big.permute(2, 0, 3, 1)),
    "permuted and sliced 4-D": ((4, 6, 14, 5), lambda big: big[:, 1:5, ::2].permute(2, 3, 0, 1)),
    "one column": ((300, 3), lambda big: big[:, 1]),
    "one column kept": ((300, 3), lambda big: big[:, 1:2]),
    "one row kept": ((3, 300), lambda big: big[1:2]),
    "size-1 dims": ((1, 20, 1, 30, 1), lambda big: big),
    "size-1 dims transposed": ((1, 20, 1, 30, 1), lambda big: big.transpose(1, 3)),
    "size-1 dims of odd strides": (
        (700,),
        lambda big: big.as_strided((1, 20, 1, 30), (7, 31, 0, 1)),
    ),
    "scalar": ((), lambda big: big),
    "scalar of a vector": ((5,), lambda big: big[3]),
    "empty": ((0,), lambda big: big),
    "empty slice": ((5, 7), lambda big: big[:, 3:3]),
    "big": ((200, 240), lambda big: big[:, 7:220].t()),
}


def order_of(view):
    """The dimensions from the outermost in memory to the innermost; those of size 1 first."""
    ones = [d for d in range(view.dim()) if view.shape[d] == 1]
    rest = [d for d in range(view.dim()) if view.shape[d] != 1]
    return ones + sorted(rest, key=lambda d: -view.stride(d))


GRADS = {
    "contiguous": lambda g, like: g.contiguous(),
    "like the parameter": lambda g, like: torch.empty_like(like).copy_(g),
    "transposed": lambda g, like: turned(turned(g).contiguous()),
    "sliced": lambda g, like: sliced(g),
    "expanded": lambda g, like: g.mean().expand(g.shape),
    "partly expanded": lambda g, like: (g if g.dim() == 0 else g.mean(0, keepdim=True)).expand(
        g.shape
    ),
}


def turned(g):
    return g.permute(tuple(reversed(range(g.dim()))))


def sliced(g):
    big = torch.full([2 * n + 1 for n in g.shape], float("nan"))
    view = big[tuple(slice(1, 1 + 2 * n, 2) for n in g.shape)]
    return view.copy_(g)


@pytest.mark.parametrize("grad_layout", GRADS)
@pytest.mark.parametrize("layout", LAYOUTS)
@EACH_WIDTH
def test_any_layout_gives_the_bits_of_contiguous_parameters_in_the_same_memory_order(
    width, layout, grad_layout
):
    """In place: strides, aliases and the gaps of the big tensor stay as they are."""
    shape, cut = LAYOUTS[layout]
    big = randn(*shape)
    view = cut(big)
    p = Parameter(view)
    assert p.data_ptr() == view.data_ptr()
    order = order_of(view)
    inverse = [order.index(d) for d in range(len(order))]
    reference = Parameter(view.permute(order).clone(memory_format=torch.contiguous_format))
    pointer, strides, start = p.data_ptr(), p.stride(), p.detach().clone()
    mask = torch.ones(shape, dtype=torch.bool)
    cut(mask).fill_(False)
    gaps = big[mask].clone()
    ours, theirs = optimizer_of([p], width), optimizer_of([reference], width)
    for step in range(3):
        logical = randn(*p.shape, seed=10 + step)
        p.grad = GRADS[grad_layout](logical, p)
        reference.grad = p.grad.permute(order).clone(memory_format=torch.contiguous_format)
        before = fingerprint(p.grad)
        ours.step()
        theirs.step()
        assert fingerprint(p.grad) == before
    assert same_bits(p, reference.permute(inverse))
    assert p.numel() == 0 or not same_bits(p, start)
    assert (p.data_ptr(), p.stride()) == (pointer, strides)
    assert same_bits(cut(big), p), "the alias sees the update"
    assert same_bits(big[mask], gaps)
    mine, expected = ours.state[p], theirs.state[reference]
    for key in mine.keys() - {"memory_order"}:
        value = mine[key]
        if value.shape == p.shape:
            value = value.permute(order)
        assert same_bits(value, expected[key])


@st.composite
def views(draw):
    """A shape and a function that cuts a view with any gaps and order of dimensions out of it."""
    rank = draw(st.integers(0, 4))
    sizes = [draw(st.integers(0, 9)) for _ in range(rank)]
    cuts = []
    for size in sizes:
        start, step = draw(st.integers(0, max(size - 1, 0))), draw(st.integers(1, 3))
        cuts.append(slice(start, draw(st.integers(start, size)), step))
    order = draw(st.permutations(range(rank)))
    return tuple(sizes), lambda big: big[tuple(cuts)].permute(order)


@given(
    parameter=views(),
    seed=st.integers(0, 99),
    width=st.sampled_from(sorted(WIDTHS)),
    data=st.data(),
)
@settings(deadline=None, max_examples=150)
def test_any_view_gives_the_bits_of_a_contiguous_copy_in_its_memory_order(
    parameter, seed, width, data
):
    shape, cut = parameter
    big = randn(*shape, seed=seed)
    p = Parameter(cut(big))
    order = order_of(p)
    inverse = [order.index(d) for d in range(len(order))]
    reference = Parameter(p.detach().permute(order).clone(memory_format=torch.contiguous_format))
    mask = torch.ones(shape, dtype=torch.bool)
    cut(mask).fill_(False)
    gaps = big[mask].clone()
    ours, theirs = optimizer_of([p], width), optimizer_of([reference], width)
    for step in range(2):
        grad_order = data.draw(st.permutations(range(p.dim())))
        logical = randn(*p.shape, seed=seed + step + 1)
        back = [grad_order.index(d) for d in range(len(grad_order))]
        p.grad = logical.permute(grad_order).contiguous().permute(back)
        reference.grad = logical.permute(order).contiguous()
        ours.step()
        theirs.step()
    assert same_bits(p, reference.permute(inverse))
    assert same_bits(big[mask], gaps)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_follows_torch(layout):
    shape, cut = LAYOUTS[layout]
    p, q = (Parameter(cut(randn(*shape))) for _ in range(2))
    a, b = qadam.AdamW([p], lr=0.01), torch.optim.AdamW([q], lr=0.01, foreach=False)
    for step in range(3):
        for x in (p, q):
            x.grad = randn(*p.shape, seed=step)
        a.step()
        b.step()
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert p.stride() == q.stride()


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((4,), (0,)),
        ((4, 3), (0, 1)),
        ((4, 3), (3, 0)),
        ((4, 3), (2, 1)),
        ((4, 3), (1, 1)),
        ((3, 3), (1, 2)),
        ((2, 2, 2), (3, 2, 1)),
    ],
)
def test_expanded_and_overlapping_parameters_are_refused_at_construction(shape, strides):
    p = Parameter(torch.zeros(50).as_strided(shape, strides))
    with pytest.raises(ValueError, match=r"parameter 1 \(group 0, position 1.*float32.*overlaps"):
        qadam.AdamW([Parameter(torch.ones(1)), p])


def test_strides_that_interleave_without_sharing_an_address_are_accepted_or_refused_loudly():
    """All addresses are distinct, though no dimension encloses another."""
    shape, strides = (3, 4), (4, 3)
    flat = randn(40)
    p, q = (Parameter(flat.clone().as_strided(shape, strides)) for _ in range(2))
    assert len({4 * i + 3 * j for i in range(3) for j in range(4)}) == 12
    try:
        a = qadam.AdamW([p])
    except ValueError as error:
        assert "overlaps" in str(error)  # noqa: PT017 - either is fine, silence is not
        return
    b = torch.optim.AdamW([q], foreach=False)
    for x, optimizer in ((p, a), (q, b)):
        x.grad = torch.ones(shape)
        optimizer.step()
    torch.testing.assert_close(p, q)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("cls", [qadam.Adam, qadam.AdamW8bit])
def test_parameter_dtypes_without_support_are_refused_at_construction(cls, dtype):
    p = Parameter(torch.zeros(3, dtype=dtype))
    with pytest.raises(TypeError) as caught:
        cls([Parameter(torch.ones(2)), p])
    for word in (
        r"parameter 1 \(group 0, position 1, shape \(3,\)",
        str(dtype),
        "float32.*float16",
    ):
        assert caught.match(word)


def test_integer_sparse_and_meta_parameters_are_refused_at_construction():
    good = Parameter(torch.ones(2))
    with pytest.raises(TypeError, match=r"parameter 1 .*torch.int64.*are accepted"):
        qadam.AdamW([good, Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)])
    with pytest.raises(TypeError, match=r"parameter 1 .*sparse_coo.*strided is accepted"):
        qadam.AdamW([good, Parameter(torch.zeros(3, 3).to_sparse())])
    with pytest.raises(ValueError, match=r"parameter 1 .*meta.*accepted"):
        qadam.AdamW([good, Parameter(torch.zeros(3, device="meta"))])


# Gradients that do not fit.


class Given(Parameter):
    """A parameter whose gradient is whatever it was given: torch refuses some assignments."""

    grad = None


def assign(p, grad):
    p.grad_dtype = None  # any
    p.grad = grad


def quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(4, 3), 0.1, 0, torch.qint8)


def sparse_csr():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.eye(4, 3).to_sparse_csr()


WRONG = {
    "float64": (lambda: torch.ones(4, 3, dtype=torch.float64), TypeError, "dtype torch.float64"),
    "complex": (lambda: torch.ones(4, 3, dtype=torch.complex64), TypeError, "torch.complex64"),
    "int": (lambda: torch.ones(4, 3, dtype=torch.int32), TypeError, "dtype torch.int32"),
    "bool": (lambda: torch.ones(4, 3, dtype=torch.bool), TypeError, "dtype torch.bool"),
    "float8": (
        lambda: torch.ones(4, 3).to(torch.float8_e5m2),
        TypeError,
        "dtype torch.float8_e5m2",
    ),
    "sparse": (lambda: torch.eye(4, 3).to_sparse(), TypeError, "sparse_coo.*strided is accepted"),
    "csr": (sparse_csr, TypeError, "sparse_csr.*strided is accepted"),
    "mkldnn": (lambda: torch.ones(4, 3).to_mkldnn(), TypeError, "mkldnn.*strided is accepted"),
    "meta": (lambda: torch.ones(4, 3, device="meta"), ValueError, "meta.*accepted"),
    "shape": (lambda: torch.ones(3, 4), ValueError, r"shape torch.Size\(\[3, 4\]\)"),
    "rank": (lambda: torch.ones(1, 4, 3), ValueError, r"shape torch.Size\(\[1, 4, 3\]\)"),
    "broadcastable": (lambda: torch.ones(3), ValueError, r"shape torch.Size\(\[3\]\)"),
    "scalar": (lambda: torch.ones(()), ValueError, r"shape torch.Size\(\[\]\)"),
}
if hasattr(torch, "quantize_per_tensor"):
    WRONG["quantized"] = (quantized, TypeError, "dtype torch.qint8")


@pytest.mark.parametrize(("make", "kind", "words"), list(WRONG.values()), ids=list(WRONG.keys()))
@pytest.mark.parametrize("fresh", [True, False], ids=["first step", "later step"])
@EACH_WIDTH
def test_a_gradient_that_does_not_fit_is_refused_before_anything_is_written(
    width, fresh, make, kind, words
):
    """The good parameter before it, the one after it and all state stay bit-identical."""
    good, bad, last = Parameter(randn(300)), Given(randn(4, 3)), Parameter(randn(5))
    optimizer = optimizer_of([{"params": [good]}, {"params": [last, bad]}], width)
    for p in (good, bad, last):
        p.grad = torch.ones_like(p)
    if not fresh:
        optimizer.step()
    bad.grad = make()
    before = frozen(optimizer)
    with pytest.raises(kind) as caught:
        optimizer.step()
    for word in (
        r"parameter 2 \(group 1, position 1",
        r"shape (torch\.Size\(\[4, 3\]\)|\(4, 3\))",
        "dtype torch.float32",
        "gradient",
        words,
        "accepted|accepts",
    ):
        assert caught.match(word)
    assert frozen(optimizer) == before
    assert len(optimizer.state) == (0 if fresh else 3)
    bad.grad = torch.ones(4, 3)
    optimizer.step()
    assert all(optimizer.state[p]["step"] == 2 - fresh for p in (good, bad, last))


def test_real_gradients_that_torch_assigns_but_that_do_not_fit_are_refused():
    """Without the stand-in class: through grad_dtype and sparse embeddings."""
    p = Parameter(torch.ones(4, 3))
    assign(p, torch.ones(4, 3, dtype=torch.float64))
    with pytest.raises(TypeError, match="float64"):
        qadam.AdamW([p]).step()
    embedding = nn.Embedding(10, 4, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    before = fingerprint(embedding.weight)
    with pytest.raises(TypeError, match=r"parameter 0 .*gradient.*sparse_coo"):
        qadam.AdamW(embedding.parameters()).step()
    assert fingerprint(embedding.weight) == before


def test_gradients_at_an_address_that_is_no_multiple_of_their_size_are_refused_before_any_write():
    good, p = Parameter(randn(5)), Parameter(randn(3))
    optimizer = qadam.AdamW([good, p])
    train(1, optimizer)
    p.grad = torch.frombuffer(bytearray(13), dtype=torch.float32, offset=1, count=3)
    before = frozen(optimizer)
    with pytest.raises(ValueError, match=r"parameter 1 .*gradient.*aligned"):
        optimizer.step()
    assert frozen(optimizer) == before


@EACH_WIDTH
def test_a_gradient_of_the_shape_before_a_data_swap_is_refused(width):
    good, p = Parameter(randn(300)), Parameter(randn(4))
    optimizer = optimizer_of([good, p], width)
    train(1, optimizer)
    give_grads([good, p], seed=5)
    p.data = torch.ones(3)
    before = frozen(optimizer)
    with pytest.raises(ValueError, match=r"parameter 1 .*\[3\].*gradient has shape.*\[4\]"):
        optimizer.step()
    assert frozen(optimizer) == before


# Gradient dtypes.


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "columns"])
@pytest.mark.parametrize(
    ("param_dtype", "grad_dtype"), list(itertools.product(FLOATS, FLOATS)), ids=str
)
@EACH_WIDTH
def test_every_pairing_of_parameter_and_gradient_dtype(width, param_dtype, grad_dtype, layout):
    """The gradient's values count, not their dtype: as if it had been widened to float32."""
    shape, cut = LAYOUTS[layout]
    p, q = (Parameter(cut(randn(*shape, dtype=param_dtype))) for _ in range(2))
    p.grad_dtype, q.grad_dtype = grad_dtype, torch.float32
    a, b = optimizer_of([p], width), optimizer_of([q], width)
    for step in range(3):
        grad = randn(*p.shape, seed=step, dtype=grad_dtype)
        p.grad, q.grad = grad, grad.float()
        assert p.grad.dtype == grad_dtype
        a.step()
        b.step()
    assert p.dtype == param_dtype
    assert same_bits(p, q)
    for key, value in a.state[p].items():
        assert fingerprint(value) == fingerprint(b.state[q][key])


def test_gradient_dtype_may_change_between_steps():
    p, q = (Parameter(randn(300)) for _ in range(2))
    a, b = qadam.AdamW([p]), qadam.AdamW([q])
    for step, dtype in enumerate([*FLOATS, *FLOATS]):
        grad = randn(300, seed=step, dtype=dtype)
        assign(p, grad)
        q.grad = grad.float()
        a.step()
        b.step()
    assert same_bits(p, q)


@EACH_WIDTH
def test_lazily_negated_gradients_count_with_their_sign(width):
    p, q = (Parameter(randn(300)) for _ in range(2))
    a, b = optimizer_of([p], width), optimizer_of([q], width)
    for step in range(2):
        grad = randn(300, seed=step)
        p.grad, q.grad = torch._neg_view(grad), -grad
        assert p.grad.is_neg()
        a.step()
        b.step()
    assert same_bits(p, q)


@EACH_WIDTH
def test_a_lazily_negated_parameter_is_updated_or_refused_never_a_copy_of_it(width):
    values = randn(300)
    p, q = Parameter(torch._neg_view(values)), Parameter(-values)
    assert p.is_neg()
    try:
        a, b = optimizer_of([p], width), optimizer_of([q], width)
    except (TypeError, ValueError) as error:
        assert "parameter 0" in str(error)  # noqa: PT017 - either is fine, silence is not
        return
    for step in range(2):
        p.grad, q.grad = randn(300, seed=step), randn(300, seed=step)
        a.step()
        b.step()
    assert torch.equal(p, q)
    assert list(a.state) == [p]


@EACH_WIDTH
def test_a_parameter_whose_data_becomes_a_negated_view_is_updated_or_refused(width):
    p = Parameter(randn(300))
    optimizer = optimizer_of([p], width)
    train(1, optimizer)
    values = randn(300)
    p.data = torch._neg_view(values)
    assert p.is_neg()
    before = p.detach().clone()
    p.grad = torch.ones(300)
    try:
        optimizer.step()
    except (TypeError, ValueError) as error:
        assert "parameter 0" in str(error)  # noqa: PT017 - either is fine, silence is not
        assert torch.equal(p, before)
    else:
        assert (p < before).float().mean() > 0.9
    assert list(optimizer.state) == [p]


# What users replace between steps.


def pair(width, *shape):
    """Two equal parameters with optimizers that have made two equal steps."""
    p, q = (Parameter(randn(*shape)) for _ in range(2))
    a, b = optimizer_of([p], width), optimizer_of([q], width)
    train(2, a, b)
    return p, q, a, b


def after(p, q, a, b, first=2):
    train(2, a, b, first=first)
    assert same_bits(p, q)
    for key, value in a.state[p].items():
        other = b.state[q][key]
        assert same_bits(value, other) if torch.is_tensor(value) else value == other


@EACH_WIDTH
def test_data_swapped_for_an_equal_tensor_is_updated_and_the_old_one_left_alone(width):
    p, q, a, b = pair(width, 20, 30)
    old = p.data
    held = fingerprint(old)
    p.data = old.clone()
    after(p, q, a, b)
    assert fingerprint(old) == held


@EACH_WIDTH
def test_data_freed_and_allocated_anew_is_updated_where_it_is_now(width):
    """As sharding does: the storage goes to nothing and comes back."""
    p, q, a, b = pair(width, 20, 30)
    values = p.detach().clone()
    p.untyped_storage().resize_(0)
    give_grads([p], seed=0)
    state = frozen(b)[1]
    with pytest.raises((ValueError, TypeError), match="parameter 0"):
        a.step()
    assert {k: fingerprint(v) for k, v in a.state[p].items()} == state[0]
    p.untyped_storage().resize_(values.untyped_storage().nbytes())
    with torch.no_grad():
        p.copy_(values)
    after(p, q, a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@EACH_WIDTH
def test_a_model_cast_between_steps_goes_on_in_its_new_dtype(width, dtype):
    model = nn.Linear(40, 30)
    optimizer = optimizer_of(model.parameters(), width)
    train(2, optimizer)
    model.to(dtype)
    p = model.weight
    q = Parameter(p.detach().clone())
    other = optimizer_of([q], width)
    saved = optimizer.state_dict()
    group = {**saved["param_groups"][0], "params": [0]}
    other.load_state_dict({"state": {0: saved["state"][0]}, "param_groups": [group]})
    for step in range(3):
        give_grads([p], [q], seed=step)
        optimizer.step()
        other.step()
    assert p.dtype == q.dtype == dtype
    assert same_bits(p, q)
    assert optimizer.state[p]["step"] == 5


@EACH_WIDTH
def test_a_model_made_channels_last_between_steps_keeps_its_state_by_logical_index(width):
    model = nn.Conv2d(8, 6, 3)
    optimizer = optimizer_of(model.parameters(), width)
    train(2, optimizer)
    p = model.weight
    q = Parameter(p.detach().clone())
    other = optimizer_of([q], width)
    saved = optimizer.state_dict()
    group = {**saved["param_groups"][0], "params": [0]}
    other.load_state_dict({"state": {0: saved["state"][0]}, "param_groups": [group]})
    model.to(memory_format=torch.channels_last)
    assert p.is_contiguous(memory_format=torch.channels_last)
    for step in range(3):
        give_grads([p], [q], seed=step)
        optimizer.step()
        other.step()
        if width == "32":
            assert same_bits(p, q)
        else:
            assert (p - q).abs().max() < 2e-3
    assert p.is_contiguous(memory_format=torch.channels_last)
    assert optimizer.state[p]["step"] == 5


@EACH_WIDTH
def test_data_of_another_shape_needs_new_state(width):
    """Old state would be out of bounds; it is refused by key, and cleared it is made anew."""
    p, good = Parameter(randn(300)), Parameter(randn(5))
    optimizer = optimizer_of([good, p], width)
    train(2, optimizer)
    p.grad = None
    p.data = torch.ones(2000)
    p.grad = torch.ones(2000)
    before = frozen(optimizer)
    with pytest.raises(ValueError, match=r"exp_avg.*300.*2000"):
        optimizer.step()
    assert frozen(optimizer) == before
    del optimizer.state[p]
    optimizer.step()
    assert optimizer.state[p]["step"] == 1
    assert optimizer.state[good]["step"] == 3
    assert (p < 1).all()


def test_data_that_becomes_expanded_is_refused_before_anything_is_written():
    p, good = Parameter(randn(4, 3)), Parameter(randn(5))
    optimizer = qadam.AdamW([good, p])
    train(2, optimizer)
    p.data = torch.ones(3).expand(4, 3)
    p.grad = torch.ones(4, 3)
    before = frozen(optimizer)
    with pytest.raises(ValueError, match=r"parameter 1 .*overlaps"):
        optimizer.step()
    assert frozen(optimizer) == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64], ids=str)
def test_data_of_an_unsupported_dtype_is_refused_before_anything_is_written(dtype):
    p, good = Parameter(randn(4)), Parameter(randn(5))
    optimizer = qadam.AdamW([good, p])
    train(2, optimizer)
    p.grad = None
    p.data = torch.ones(4, dtype=dtype)
    assign(p, torch.ones(4))
    before = frozen(optimizer)
    with pytest.raises(TypeError, match=f"parameter 1 .*{dtype}"):
        optimizer.step()
    assert frozen(optimizer) == before


CHANGES = {
    "entry replaced by a copy": lambda state, p: state.__setitem__(
        p, {k: v.clone() if torch.is_tensor(v) else v for k, v in state[p].items()}
    ),
    "tensors replaced": lambda state, p: state[p].update(
        {k: v.clone() for k, v in state[p].items() if torch.is_tensor(v)}
    ),
    "data of tensors swapped": lambda state, p: [
        setattr(v, "data", v.data.clone()) for v in state[p].values() if torch.is_tensor(v)
    ],
    "tensors made non-contiguous": lambda state, p: state[p].update(
        {k: scattered(v) for k, v in state[p].items() if torch.is_tensor(v) and v.dim()}
    ),
    "step replaced by a number": lambda state, p: state[p].update(step=int(state[p]["step"])),
    "step of float64": lambda state, p: state[p].update(step=state[p]["step"].double()),
}


def scattered(value):
    """The same values with gaps between them."""
    return value.repeat_interleave(2, dim=-1)[..., ::2]


@pytest.mark.parametrize("change", list(CHANGES.values()), ids=list(CHANGES.keys()))
@EACH_WIDTH
def test_state_replaced_by_equal_state_is_used_and_the_old_left_alone(width, change):
    p, q, a, b = pair(width, 20, 30)
    old = {k: v.detach() for k, v in a.state[p].items() if torch.is_tensor(v)}
    held = {k: (v, fingerprint(v)) for k, v in old.items()}
    change(a.state, p)
    now = {v.data_ptr() for v in a.state[p].values() if torch.is_tensor(v)}
    after(p, q, a, b)
    for tensor, bits_before in held.values():
        if tensor.data_ptr() not in now:
            assert fingerprint(tensor) == bits_before
    assert a.state[p]["step"] == 4


@EACH_WIDTH
def test_the_whole_state_may_be_replaced_by_another_dictionary(width):
    p, q, a, b = pair(width, 20, 30)
    a.state = {p: {k: v.clone() if torch.is_tensor(v) else v for k, v in a.state[p].items()}}
    after(p, q, a, b)


FORGET = {
    "entry emptied": lambda state, p: state[p].clear(),
    "entry deleted": lambda state, p: state.pop(p),
    "entry replaced by an empty one": lambda state, p: state.__setitem__(p, {}),
    "all cleared": lambda state, p: state.clear(),
}


@pytest.mark.parametrize("forget", list(FORGET.values()), ids=list(FORGET.keys()))
@EACH_WIDTH
def test_state_that_was_cleared_begins_anew(width, forget):
    p, _, a, _ = pair(width, 20, 30)
    q = Parameter(p.detach().clone())
    b = optimizer_of([q], width)
    forget(a.state, p)
    after(p, q, a, b)
    assert a.state[p]["step"] == 2


@EACH_WIDTH
def test_state_filled_in_place_is_used(width):
    p, q, a, b = pair(width, 20, 30)
    for entry in (a.state[p], b.state[q]):
        entry["step"].fill_(40)
        entry["exp_avg" if width == "32" else "exp_avg_code"].zero_()
    after(p, q, a, b)
    assert a.state[p]["step"] == 42


@pytest.mark.parametrize("code", CODES)
def test_state_made_of_the_other_width_in_place_of_the_old_is_used(code):
    p, q, a, b = pair("32", 20, 30)
    _, _, eight, _ = pair(code, 20, 30)
    (entry,) = eight.state.values()
    for state, x in ((a.state, p), (b.state, q)):
        state[x].clear()
        state[x].update({k: v.clone() if torch.is_tensor(v) else v for k, v in entry.items()})
    after(p, q, a, b)
    assert "exp_avg_code" in a.state[p]


WRONG_STATE = {
    "missing": lambda entry: entry.pop("exp_avg_sq"),
    "other shape": lambda entry: entry.update(exp_avg=torch.zeros(7)),
    "integers": lambda entry: entry.update(exp_avg=torch.zeros(20, 30, dtype=torch.int32)),
    "no tensor": lambda entry: entry.update(exp_avg=3.0),
    "negative step": lambda entry: entry.update(step=torch.tensor(-3.0)),
    "NaN step": lambda entry: entry["step"].fill_(float("nan")),
    "data of another shape": lambda entry: setattr(entry["exp_avg"], "data", torch.zeros(7)),
}


# a device counts its steps itself, and is not waited for
ON_THE_HOST = ("negative step", "NaN step")


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(damage, id=name, marks=[pytest.mark.cpu_only] * (name in ON_THE_HOST))
        for name, damage in WRONG_STATE.items()
    ],
)
def test_state_that_does_not_fit_is_refused_at_every_step_before_anything_is_written(damage):
    good, p = Parameter(randn(5)), Parameter(randn(20, 30))
    optimizer = qadam.AdamW([good, p])
    train(2, optimizer)
    damage(optimizer.state[p])
    before = frozen(optimizer)
    for _ in range(3):
        with pytest.raises((ValueError, KeyError, TypeError)):
            optimizer.step()
        assert frozen(optimizer) == before


@EACH_WIDTH
def test_state_tensors_that_share_memory_are_refused_at_every_step(width):
    p, q = Parameter(randn(300)), Parameter(randn(300))
    optimizer = optimizer_of([p, q], width)
    train(2, optimizer)
    for key, value in optimizer.state[p].items():
        optimizer.state[q][key] = value
    before = frozen(optimizer)
    for _ in range(3):
        with pytest.raises(ValueError, match=r"parameters 0 and 1 share memory"):
            optimizer.step()
        assert frozen(optimizer) == before


@EACH_WIDTH
def test_state_that_shares_memory_with_a_parameter_is_refused(width):
    """Both would be written at once."""
    p, q = Parameter(randn(300)), Parameter(randn(300))
    optimizer = optimizer_of([p, q], width)
    train(2, optimizer)
    name = "exp_avg" if width == "32" else "exp_avg_code"
    dtype = optimizer.state[q][name].dtype
    optimizer.state[q][name] = p.detach().view(dtype)[:300]
    before = frozen(optimizer)
    for _ in range(2):
        with pytest.raises(ValueError, match="share memory"):
            optimizer.step()
        assert frozen(optimizer) == before


def test_buffers_that_changed_hands_while_one_parameter_had_no_gradient_are_no_conflict():
    p, q, x, y = (Parameter(randn(300)) for _ in range(4))
    a, b = qadam.AdamW([p, q]), qadam.AdamW([x, y])
    train(2, a, b)
    for name in ("exp_avg", "exp_avg_sq"):
        mine, other = a.state[p][name], a.state[q][name]
        mine.data, other.data = mine.data.clone(), mine.data.copy_(other.data)
    p.grad = x.grad = None
    a.step()
    b.step()
    assert same_bits(q, y)
    train(2, a, b, first=5)
    assert same_bits(p, x)
    assert same_bits(q, y)


# Parameters that share memory.


def sharing(kind):
    big = randn(40, 30)
    cuts = {
        "the same data": [big, big],
        "three times": [big, big, big],
        "transposed": [big, big.t()],
        "overlapping rows": [big[:25], big[15:]],
        "rows in a chain": [big[:20], big[10:30], big[20:]],
        "interleaved, disjoint": [big[::2], big[1::2]],
        "columns, disjoint": [big[:, :10], big[:, 10:]],
        "one within the other": [big, big[3:5, 4:9]],
    }
    return big, [Parameter(view) for view in cuts[kind]]


SHARED = [
    "the same data",
    "three times",
    "transposed",
    "overlapping rows",
    "rows in a chain",
    "interleaved, disjoint",
    "columns, disjoint",
    "one within the other",
]


@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.parametrize("backwards", [False, True], ids=["", "backwards"])
def test_parameters_that_share_memory_take_turns_as_in_torch(kind, backwards):
    (big, mine), (other, theirs) = sharing(kind), sharing(kind)
    if backwards:
        mine, theirs = mine[::-1], theirs[::-1]
    a = qadam.AdamW(mine, lr=0.1, weight_decay=0.5)
    b = torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.5, foreach=False)
    train(3, a, b)
    torch.testing.assert_close(big, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", SHARED)
@EACH_WIDTH
def test_parameters_that_share_memory_give_the_bits_of_separate_optimizers_in_turn(kind, width):
    (big, mine), (other, theirs) = sharing(kind), sharing(kind)
    together = optimizer_of(mine, width)
    apart = [optimizer_of([p], width) for p in theirs]
    for step in range(3):
        give_grads(mine, theirs, seed=step)
        together.step()
        for optimizer in apart:
            optimizer.step()
    assert same_bits(big, other)


def test_parameters_tied_between_steps_take_turns_from_then_on():
    (p, q), (x, y) = ([Parameter(randn(300)) for _ in range(2)] for _ in range(2))
    a, b = qadam.AdamW([p, q]), torch.optim.AdamW([x, y], foreach=False)
    train(2, a, b)
    q.data, y.data = p.data, x.data
    train(2, a, b, first=2)
    assert same_bits(p, q)
    torch.testing.assert_close(p, x, rtol=1e-5, atol=1e-6)


def test_a_gradient_that_is_the_parameters_own_memory_is_read_before_it_is_written():
    p, q = (Parameter(randn(300)) for _ in range(2))
    p.grad, q.grad = p.data, q.detach().clone()
    a, b = qadam.AdamW([p]), qadam.AdamW([q])
    a.step()
    b.step()
    assert same_bits(p, q)
