"""AdamW, at 32 and at 8 bits, paged and not."""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT

from qadam.optim.base import QAdam


class AdamW(QAdam):
    """AdamW: Adam with decoupled weight decay.

    For each parameter ``p`` with gradient ``g``, in f32 and element by element (Loshchilov
    and Hutter, *Decoupled Weight Decay Regularization*, 2019; ``torch.optim.AdamW``)::

        t   = t + 1
        p   = p - lr * weight_decay * p
        m   = beta1 * m + (1 - beta1) * g
        v   = beta2 * v + (1 - beta2) * g * g
        p   = p - lr / (1 - beta1**t) * m / (sqrt(v / (1 - beta2**t)) + eps)

    The state of a parameter takes 8 bytes an element at 32 bits and 2.03 at 8 bits, where ``m`` and
    ``v`` are codes with scales for each 256 elements (2.05 in the ratio code). Parameters and
    gradients are float32, bfloat16 or float16, in any pairing, of any shape and strides; the
    arithmetic and the moments are float32 whatever they are.

    Args:
        params: parameters, or groups of them with their own ``lr``, ``betas``, ``eps`` and
            ``weight_decay``, as for any ``torch.optim.Optimizer``; also ``percentile_clipping``,
            ``max_unorm`` and ``skip_zeros``, and ``optim_bits``, ``min_8bit_size``, ``block_wise``,
            ``state_code`` and ``is_paged``, which count when state is made. For single parameters
            there is :class:`qadam.GlobalOptimManager`.
        lr: learning rate, at least 0.
        betas: decay rates of the two moments, each at least 0 and less than 1.
        eps: added to the denominator, at least 0.
        weight_decay: decoupled weight decay, at least 0 (as ``torch.optim.AdamW``).
        amsgrad: whether to divide by the largest second moment so far (Reddi, Kale and Kumar, *On
            the Convergence of Adam and Beyond*, 2018), which is a third moment in the state: half
            as many bytes more.
        optim_bits: 32 or 8, the width of the state. Where the class's name says it, the default
            stands for that width and any other contradiction is an error.
        args: an object whose attributes ``optim_bits``, ``min_8bit_size``, ``percentile_clipping``
            and ``block_wise`` replace the keywords, where it has them. Two more options come from
            here (or a group) alone, as in bitsandbytes: ``max_unorm``, the largest norm of a
            parameter's update before ``lr`` as a multiple of the parameter's norm (0: no limit;
            a parameter that is zero everywhere has none); and ``skip_zeros``, whether elements
            with a gradient of zero are left as they are, decay and state included.
        min_8bit_size: parameters of fewer elements keep 32-bit state.
        percentile_clipping: a whole number from 1 to 100. Each gradient is cut to this percentile
            of its parameter's last 100 gradient norms (``gnorm_vec`` in the state, which the first
            norm fills); 100 is no clipping. Norms that are zero or not finite are not remembered.
        block_wise: whether 8-bit state has a scale for each 256 elements; else each moment has one
            for the whole parameter, as far as its largest value reaches down.
        is_paged: whether the state of parameters of at least 100,000 elements lives one tier below
            them, so that it need not fit beside the model: for CUDA parameters in managed memory
            that the driver moves, for CPU parameters in a file of ``QADAM_PAGE_DIR``. The bits are
            the same (docs/paging.md).
        state_code: the 8-bit code, ``"dynamic"`` (bitsandbytes' map) or ``"ratio"``, which follows
            32 bits several times more closely for 0.02 bytes an element more: the second moment's
            root on a logarithmic grid, rounded at random (by element and step: the same on every
            device), and the first as its ratio to that root, for whose rounding the parameter makes
            up (docs/numerics.md). Not for a second beta below 0.5. Also a group's key; counts
            when state is made.
        nonfinite: what happens where a gradient is NaN or infinite. ``"skip"`` leaves that element
            of the parameter and of the state as it is, counts it in ``nonfinite_count`` and warns
            the first time. ``"propagate"`` does as torch: the parameter becomes NaN. ``"raise"``
            raises a ``RuntimeError`` before anything is written.
        max_grad_norm: the norm that all gradients together are cut to before anything else, as
            ``torch.nn.utils.clip_grad_norm_`` cuts them, but on the way into the step: gradients
            stay as they are. None: no limit; infinity: only measured. Also an attribute, to be
            changed at will. Elements that are not finite count as 0 (unless ``nonfinite`` is
            ``"propagate"``), and so does everything if the step is not taken. The norm is that of
            this process's parameters: where each process has a shard (FSDP), use FSDP's own
            ``clip_grad_norm_``, and note that ``percentile_clipping``, ``max_unorm`` and
            ``block_wise=False`` look at shards.
        maximize: whether to go up the gradient.
        foreach, fused, capturable: accepted, as torch has them, and of no effect: a step is always
            fused, and always capturable.
        differentiable: False; steps run outside autograd.

    Raises:
        ValueError: for a value out of range, naming the argument, the value and what is accepted.
        OSError: if paged state cannot have a file in ``QADAM_PAGE_DIR``.
        RuntimeError: if paged state is wanted on a CUDA device without managed memory.
    """

    _decoupled = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: object = None,
        min_8bit_size: int = 4096,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        is_paged: bool = False,
        *,
        state_code: str = "dynamic",
        nonfinite: str = "skip",
        max_grad_norm: float | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            optim_bits=optim_bits,
            args=args,
            min_8bit_size=min_8bit_size,
            percentile_clipping=percentile_clipping,
            block_wise=block_wise,
            is_paged=is_paged,
            state_code=state_code,
            nonfinite=nonfinite,
            max_grad_norm=max_grad_norm,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )


class AdamW8bit(AdamW):
    """:class:`AdamW` with 8-bit state."""

    _class_bits = 8


class AdamW32bit(AdamW):
    """:class:`AdamW` with 32-bit state."""

    _class_bits = 32


class PagedAdamW(AdamW):
    """:class:`AdamW` with paged state: ``is_paged=True``."""

    _class_paged = True


class PagedAdamW8bit(AdamW8bit):
    """:class:`AdamW8bit` with paged state: ``is_paged=True``."""

    _class_paged = True


class PagedAdamW32bit(AdamW32bit):
    """:class:`AdamW32bit` with paged state: ``is_paged=True``."""

    _class_paged = True
