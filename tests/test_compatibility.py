"""What docs/compatibility.md says of torch and bitsandbytes, tried."""

import bitsandbytes
import pytest
import torch
from torch.nn import Parameter

pytestmark = pytest.mark.cpu_only

TORCH = torch.optim.AdamW
WIDE, NARROW = bitsandbytes.optim.AdamW32bit, bitsandbytes.optim.AdamW8bit


def trained(cls, in_args=None, **options):
    """A parameter after three steps, a fifth of whose gradients are zeros."""
    generator = torch.Generator().manual_seed(0)
    param = Parameter(torch.randn(5000, generator=generator))
    optimizer = cls([param], **options)
    if in_args:
        vars(optimizer.args).update(in_args)
    for _ in range(3):
        param.grad = torch.randn(5000, generator=generator)
        param.grad[:1000] = 0
        optimizer.step()
    return param.detach()


@pytest.mark.parametrize(
    ("cls", "option"),
    [
        *((TORCH, o) for o in ("optim_bits", "args", "min_8bit_size", "is_paged", "nonfinite")),
        *(
            (cls, o)
            for cls in (TORCH, WIDE, NARROW)
            for o in ("percentile_clipping", "block_wise", "max_grad_norm", "skip_zeros")
        ),
        *(
            (cls, o)
            for cls in (WIDE, NARROW)
            for o in ("nonfinite", "maximize", "decoupled_weight_decay", "foreach", "fused")
        ),
        *((cls, o) for cls in (WIDE, NARROW) for o in ("capturable", "differentiable")),
    ],
)
def test_arguments_that_are_not_there(cls, option):
    with pytest.raises(TypeError, match=option):
        trained(cls, **{option: 1})


@pytest.mark.parametrize(
    ("cls", "in_args", "is_ignored"),
    [
        (WIDE, {"max_unorm": 1e-3}, False),
        (NARROW, {"max_unorm": 1e-3}, True),
        (WIDE, {"skip_zeros": True}, True),
        (NARROW, {"skip_zeros": True}, True),
        (WIDE, {"percentile_clipping": 5}, True),
        (NARROW, {"percentile_clipping": 5}, True),
        (NARROW, {"block_wise": False}, True),
    ],
    ids=str,
)
def test_what_bitsandbytes_takes_from_args(cls, in_args, is_ignored):
    assert torch.equal(trained(cls), trained(cls, in_args)) == is_ignored


def test_what_bitsandbytes_makes_of_its_arguments():
    assert torch.equal(trained(WIDE), trained(WIDE, amsgrad=True))
    with pytest.raises(ValueError, match="amsgrad"):
        trained(NARROW, amsgrad=True)
    assert torch.equal(trained(WIDE), trained(WIDE, optim_bits=8))
    with pytest.raises(ValueError, match="optim_bits"):
        trained(NARROW, optim_bits=8)
    assert not torch.equal(trained(NARROW), trained(NARROW, min_8bit_size=10_000))
    with pytest.warns(UserWarning, match="Paged optimizers are not supported on CPU"):
        assert torch.equal(trained(NARROW), trained(NARROW, is_paged=True))
    adam, adamw = bitsandbytes.optim.Adam32bit, bitsandbytes.optim.AdamW32bit
    assert torch.equal(trained(adam, weight_decay=0.1), trained(adamw, weight_decay=0.1))
    param = Parameter(torch.ones(5000))
    param.grad = torch.ones(5000)
    group = {"params": [param], "optim_bits": 8}
    optimizer = bitsandbytes.optim.AdamW([group])
    optimizer.step()
    assert optimizer.state[param]["state1"].dtype == torch.float32


def test_what_torch_makes_of_its_arguments():
    with pytest.raises(AssertionError, match="capturable"):
        trained(TORCH, capturable=True)
    with pytest.raises(RuntimeError, match="leaf"):
        trained(TORCH, differentiable=True)
    assert not torch.equal(trained(TORCH), trained(TORCH, amsgrad=True))
    assert not torch.equal(trained(TORCH), trained(TORCH, maximize=True))


@pytest.mark.parametrize("cls", [TORCH, WIDE, NARROW])
def test_nan_stays_in_its_element(cls):
    param = Parameter(torch.ones(5000))
    param.grad = torch.ones(5000)
    param.grad[3] = torch.nan
    cls([param]).step()
    assert param.isnan().nonzero().flatten().tolist() == [3]
