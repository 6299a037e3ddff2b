"""What the twelve optimizers share: torch's interface on one side, the Rust engine on the other."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable
from copy import deepcopy
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from qadam import _core, interop, layout, overrides, paging
from qadam import state as qstate
from qadam.codes import DYNAMIC
from qadam.options import DEFAULTS, check_options

Group = dict[str, Any]


class QAdam(Optimizer):
    """Base of the Adam family; use one of its subclasses."""

    _decoupled: ClassVar[bool]
    """Whether weight decay is AdamW's."""
    _class_bits: ClassVar[int | None] = None
    """The state's width, where the class's name says it."""
    _class_paged: ClassVar[bool] = False
    """Whether the class's name says that state is paged."""

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float | Tensor,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        amsgrad: bool,
        optim_bits: int,
        args: object,
        min_8bit_size: int,
        percentile_clipping: int,
        block_wise: bool,
        is_paged: bool,
        state_code: str,
        nonfinite: str,
        max_grad_norm: float | None,
        maximize: bool,
        foreach: bool | None,
        capturable: bool,
        differentiable: bool,
        fused: bool | None,
        decoupled_weight_decay: bool = False,
    ) -> None:
        own: Group = {"optim_bits": optim_bits, "min_8bit_size": min_8bit_size}
        own |= {"percentile_clipping": percentile_clipping, "block_wise": block_wise}
        own |= {"state_code": state_code}
        # as bitsandbytes has it: what `args` has replaces the keywords
        own |= {name: getattr(args, name) for name in DEFAULTS if hasattr(args, name)}
        own["optim_bits"] = self._resolve_bits(own["optim_bits"])
        check_options(own)
        self._own = {**DEFAULTS, **own}
        self._paged = bool(is_paged) or self._class_paged
        if nonfinite not in ("skip", "propagate", "raise"):
            msg = f'nonfinite must be "skip", "propagate" or "raise", got {nonfinite!r}'
            raise ValueError(msg)
        self._nonfinite = nonfinite
        self.max_grad_norm = max_grad_norm
        self._read_max_grad_norm()
        self.grad_norm: Tensor | None = None
        self._base_lrs: list[float] = []
        self._engine = self._new_engine()
        self._nonfinite_count = 0
        defaults: Group = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"amsgrad": bool(amsgrad), "maximize": bool(maximize), "foreach": foreach}
        defaults |= {"capturable": capturable, "differentiable": differentiable, "fused": fused}
        # as torch has it: a saved AdamW is not taken for an Adam
        defaults["decoupled_weight_decay"] = self._decoupled or bool(decoupled_weight_decay)
        super().__init__(params, defaults)

    def _new_engine(self) -> _core.Engine:
        own = self._own
        return _core.Engine(
            self._decoupled,
            self._nonfinite,
            own["percentile_clipping"],
            own["max_unorm"],
            bool(own["skip_zeros"]),
        )

    def _resolve_bits(self, optim_bits: int) -> int:
        if optim_bits not in (8, 32):
            msg = f"optim_bits must be 32 or 8, got {optim_bits!r}"
            raise ValueError(msg)
        if self._class_bits is None:
            return optim_bits
        # 32 is the signature's default, which every class shares: it contradicts no name
        if optim_bits not in (32, self._class_bits):
            name = type(self).__name__
            msg = f"{name} keeps {self._class_bits}-bit state, got optim_bits={optim_bits}"
            raise ValueError(msg)
        return self._class_bits

    # Parameter groups.

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group, as ``torch.optim.Optimizer`` does, after checking all of it.

        Raises:
            ValueError: for a hyperparameter out of range, a parameter given twice, or a parameter
                whose elements share addresses (expanded, overlapping).
            TypeError: for a parameter that is not a dense float32, bfloat16 or float16 tensor.
            OSError: if state is paged and ``QADAM_PAGE_DIR`` is no directory for it.
            RuntimeError: if state is paged and the device has no managed memory.
        """
        if isinstance(param_group, dict) and not isinstance(param_group["params"], (Tensor, set)):
            param_group["params"] = list(param_group["params"])
            first: dict[int, int] = {}
            for position, item in enumerate(param_group["params"]):
                param = item[1] if isinstance(item, tuple) else item
                if first.setdefault(id(param), position) != position:
                    msg = f"the parameter at position {position} is the one at {first[id(param)]}"
                    raise ValueError(msg + ": give it once")
        super().add_param_group(param_group)
        group, number = self.param_groups[-1], len(self.param_groups) - 1
        try:
            self._check_group(group)
            before = sum(len(g["params"]) for g in self.param_groups[:-1])
            for position, param in enumerate(group["params"]):
                place = f"group {number}, position {position}"
                looks = f"shape {tuple(param.shape)}, dtype {param.dtype}"
                subject = f"parameter {before + position} ({place}, {looks})"
                _core.check_parameter(param, subject)
            if group.get("is_paged", self._paged):
                paging.check(group["params"])
        except BaseException:
            self.param_groups.pop()
            raise
        self._base_lrs.append(float(group["lr"]))

    def _check_group(self, group: Group) -> None:
        """Checks the hyperparameters of a group, its own or from a state dict."""
        layout.check_group(group)
        # What else torch's groups hold (foreach, fused, capturable) says how to compute the update,
        # which is for this package to decide.
        if group.get("differentiable"):
            msg = "differentiable must be False, got True: steps run outside autograd"
            raise ValueError(msg)
        check_options(group)
        for name in ("args", "nonfinite", "max_grad_norm"):
            if name in group:
                msg = f"{name} is for all parameters of an optimizer: give it to the constructor"
                raise ValueError(msg)

    # The step.

    @overload
    def step(self, closure: None = None) -> Any: ...  # noqa: ANN401 - None, or the norm
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Updates every parameter that has a gradient.

        Args:
            closure: reevaluates the model with gradients enabled and returns the loss.

        Returns:
            What the closure returned. Without a closure the norm that all gradients together had
            before they were cut, where ``max_grad_norm`` is set, else None. The norm is a float32
            tensor of no dimensions on their device, also kept as ``optimizer.grad_norm``; nothing
            waits for it.

        Raises:
            TypeError: for a gradient that is not a dense float32, bfloat16 or float16 tensor.
            ValueError: for a gradient of another shape or device than its parameter's, or for
                gradients on several devices with ``max_grad_norm``.
            RuntimeError: for a gradient that is not finite, with ``nonfinite="raise"``.

            OSError: for paged state that cannot have a file, or was not written to it in an earlier
                step.
            CudaError: for a call of the CUDA driver that failed.

            All are raised before any parameter or state is written. Only where a step takes several
            launches (several devices, parameters that share memory, paged state) and a later one
            fails, the launches before it stand.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        threads = torch.get_num_threads()
        own = overrides.overridden(self.param_groups, self._base_lrs)
        try:
            clip = self._clip()
            count = self._engine.step(
                self.param_groups, own, self.state, self._make_state, threads, self._amp(), clip
            )
        except BaseException:
            # GradScaler takes its word back only after a step that succeeds
            for name in ("grad_scale", "found_inf"):
                self.__dict__.pop(name, None)
            raise
        self.grad_norm = clip[1] if clip else None
        if count:
            self._report_nonfinite(count)
        return self.grad_norm if closure is None else loss

    def _clip(self) -> tuple[float, Tensor] | None:
        """The norm that all gradients are cut to, and where to put the one that they had."""
        max_norm = self._read_max_grad_norm()
        if max_norm is None:
            return None
        params = (param for group in self.param_groups for param in group["params"])
        devices = (param.grad.device for param in params if param.grad is not None)
        # others are no gradients' devices, as the engine will say
        device = next((device for device in devices if device.type in ("cpu", "cuda")), "cpu")
        return max_norm, torch.zeros((), dtype=torch.float32, device=device)

    def _read_max_grad_norm(self) -> float | None:
        if self.max_grad_norm is None:
            return None
        max_norm = layout.number("max_grad_norm", self.max_grad_norm)
        _core.check_max_grad_norm(max_norm)
        return max_norm

    _step_supports_amp_scaling = True
    """For torch.amp.GradScaler: it leaves the scale of gradients, and whether they overflowed, to
    the step, as ``grad_scale`` and ``found_inf``."""

    def _amp(self) -> list[tuple[Tensor | None, Tensor | None]]:
        """The gradient scaler's word, for each device of the parameters."""
        scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if scale is None and found is None:
            return []
        devices = {param.device for group in self.param_groups for param in group["params"]}
        return [
            (_to_device(scale, device), _to_device(found, device))
            for device in sorted(devices, key=str)
        ]

    @property
    def nonfinite_count(self) -> int:
        """How many elements had a NaN or infinite gradient, in all steps so far.

        A CUDA device counts as it runs, and no step waits for it: synchronise first if the last
        steps are to be in the count.
        """
        self._nonfinite_count += self._engine.poll()
        return self._nonfinite_count

    @nonfinite_count.setter
    def nonfinite_count(self, count: int) -> None:
        self._engine.poll()
        self._nonfinite_count = count

    def _report_nonfinite(self, count: int) -> None:
        first = self._nonfinite_count == 0
        self._nonfinite_count += count
        if first and self._nonfinite == "skip":
            warnings.warn(
                f"{count} gradient elements are NaN or infinite; their parameters and state are "
                'left as they are (nonfinite="skip"). Further ones are counted in '
                "optimizer.nonfinite_count without a warning.",
                RuntimeWarning,
                stacklevel=5,
            )

    def _make_state(self, params: list[Tensor]) -> None:
        """Gives each of ``params`` state that fits it; called by the engine."""
        wanted = []
        for param, options in zip(params, self._options(params), strict=True):
            entry = self.state.get(param)
            stored = self._format_for(param, options)
            if entry:  # its width and its code stay, and whether it has a scale a block
                old = qstate.format_of(entry)
                stored = stored._replace(bits=old.bits, block_wise=old.block_wise, code=old.code)
            wanted.append((param, stored, options))
        made = {}
        for (param, stored, _), pages in zip(wanted, self._allocate(wanted), strict=True):
            entry = self.state.get(param)
            if entry:
                where = f"a parameter of shape {tuple(param.shape)}"
                made[param] = qstate.fit(entry, param, stored, where, pages)
            else:
                made[param] = qstate.zeros(param, stored, pages)
        self.state.update(made)

    def _options(self, params: list[Tensor]) -> list[Group]:
        """The group of each parameter, with what is overridden for the parameter."""
        groups = {id(param): group for group in self.param_groups for param in group["params"]}
        own = overrides.overridden(self.param_groups, self._base_lrs)
        return [own.get(param, groups[id(param)]) for param in params]

    def _format_for(self, param: Tensor, options: Group) -> qstate.Format:
        own = {name: options.get(name, default) for name, default in self._own.items()}
        is_8bit = own["optim_bits"] == 8 and param.numel() >= own["min_8bit_size"]
        return qstate.Format(
            8 if is_8bit else 32,
            amsgrad=bool(options.get("amsgrad")),
            block_wise=bool(own["block_wise"]) or not is_8bit,
            history=own["percentile_clipping"] < 100,
            code=own["state_code"] if is_8bit else DYNAMIC.name,
        )

    def _allocate(
        self, wanted: list[tuple[Tensor, qstate.Format, Group]]
    ) -> list[qstate.Pages | None]:
        """Memory for the state of parameters, stored so; None for ordinary memory."""
        is_paged = [options.get("is_paged", self._paged) for _, _, options in wanted]
        paged = [item[:2] for item, paged in zip(wanted, is_paged, strict=True) if paged]
        memory = iter(paging.allocate(paged))
        return [next(memory) if paged else None for paged in is_paged]

    # Saving and loading.

    def state_dict(self) -> dict[str, Any]:
        """What ``torch.optim.Optimizer.state_dict`` returns, with the format's version.

        The version is in each group, as ``"qadam_format"``: torch's tools keep what groups have.
        """
        state_dict = super().state_dict()
        for group in state_dict.get("param_groups", ()):  # a hook may have put it elsewhere
            group[layout.FORMAT_KEY] = layout.FORMAT
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what any Adam or AdamW of qadam, ``torch.optim`` or bitsandbytes has saved.

        State is converted to this optimizer's width; at the same width it is taken over bit for
        bit. Hyperparameters are those of ``state_dict``. docs/state-format.md has the details.

        Args:
            state_dict: the saved state; it is not changed, and shares nothing with the optimizer.

        Raises:
            KeyError, TypeError, ValueError: for another number of groups or parameters, or for
                state that is damaged or does not fit; the message names the parameter and the key.

            The optimizer is then as it was.
        """
        if isinstance(state_dict, dict):
            state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = hook(self, state_dict)
            if replaced is not None:
                state_dict = replaced

        saved = interop.read(state_dict, [len(group["params"]) for group in self.param_groups])
        params = []
        for group, own in zip(saved.groups, self.param_groups, strict=True):
            group["params"] = own["params"]
            params += own["params"]
            if self._decoupled:  # torch's AdamW decouples whatever it loads, too
                group["decoupled_weight_decay"] = True
            if "param_names" in own:
                group.setdefault("param_names", own["param_names"])
            self._check_group(group)

        state: defaultdict[Any, Any] = defaultdict(dict, deepcopy(saved.others))
        overridden = overrides.overridden(saved.groups, self._base_lrs)
        groups = [group for group in saved.groups for _ in group["params"]]
        found, wanted = [], []
        for number, entry in saved.entries.values():
            param = params[number]
            options = overridden.get(param, groups[number])
            found.append((f"parameter {number}", entry))
            wanted.append((param, self._format_for(param, options), options))
        memory = zip(found, wanted, self._allocate(wanted), strict=True)
        for (where, entry), (param, stored, _), pages in memory:
            own_entry = interop.read_entry(entry, param.shape, where)
            state[param] = qstate.fit(own_entry, param, stored, where, pages)
        self.__setstate__({"state": state, "param_groups": saved.groups})

        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        own = ["_own", "_nonfinite", "_nonfinite_count", "_paged", "_base_lrs"]
        own += ["max_grad_norm", "grad_norm"]
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.state.update(self._paged_copies(dict(self.state)))
        # the engine holds addresses: it never travels
        self._engine = self._new_engine()

    def __deepcopy__(self, memo: dict[int, Any]) -> QAdam:
        copy = type(self).__new__(type(self))
        memo[id(self)] = copy
        state = self.__getstate__()
        entries = state.pop("state")
        copy.__dict__.update(deepcopy(state, memo))
        # straight from pages to pages: there may be no ordinary memory for so much
        of_copies = {deepcopy(key, memo): entry for key, entry in entries.items()}
        paged = copy._paged_copies(of_copies, memo)
        rest = {k: deepcopy(v, memo) for k, v in of_copies.items() if k not in paged}
        copied = {key: paged.get(key, rest.get(key)) for key in of_copies}
        copy.__setstate__({"state": defaultdict(dict, copied)})
        return copy

    def _paged_copies(
        self, entries: dict[Any, Any], memo: dict[int, Any] | None = None
    ) -> dict[Tensor, Any]:
        """Paged copies of those entries that ought to be paged and are not.

        With the ``memo`` of a deepcopy they are deep copies, and all that ought to be paged.
        """
        own = {id(param) for group in self.param_groups for param in group["params"]}
        moved = {
            param: entry
            for param, entry in entries.items()
            if id(param) in own and entry and (memo is not None or not paging.is_paged(entry))
        }
        options = self._options(list(moved))
        wanted = [
            (param, qstate.format_of(entry), of_param)
            for (param, entry), of_param in zip(moved.items(), options, strict=True)
        ]
        return {
            param: qstate.copy_into(pages, entry, param, memo)
            for (param, entry), pages in zip(moved.items(), self._allocate(wanted), strict=True)
            if pages is not None
        }

    def memory(self) -> paging.Memory:
        """How many bytes the optimizer takes, by tier and use.

        Returns:
            For each tier (``"device"`` memory, ``"managed"`` memory, which the CUDA driver moves
            between host and device, ``"host"`` memory, and files that are ``"mapped"``) the bytes
            of ``"state"`` (moments, counts), ``"scales"`` (of 8-bit codes) and ``"work"`` (tables
            of CUDA launches; what paged memory has besides the state).
        """
        entries = [entry for entry in self.state.values() if isinstance(entry, dict)]
        return paging.memory(entries, *self._engine.work())

    def __repr__(self) -> str:
        width = "32-bit"
        if self._own["optim_bits"] == 8:
            least = self._own["min_8bit_size"]
            code = self._own["state_code"]
            width = f"8-bit ({code}), 32-bit for tensors of less than {least} elements"
        paged = f", paged for tensors of at least {paging.LEAST} elements" if self._paged else ""
        memory = paging.describe(self.memory())
        options = {**self._own, "max_grad_norm": self.max_grad_norm}
        unusual = [f"{k}={v!r}" for k, v in options.items() if v != _USUAL.get(k, v)]
        own = f'State: {width}{paged}\nMemory: {memory}\nnonfinite: "{self._nonfinite}"\n'
        own += f"Options: {', '.join(unusual)}\n" if unusual else ""
        return f"{super().__repr__()[:-1]}{own})"


def _to_device(value: Tensor | None, device: torch.device) -> Tensor | None:
    if value is None:
        return None
    # what comes to the CPU is read at once
    return value.detach().to(device, torch.float32, non_blocking=device.type != "cpu")


_USUAL = {"max_grad_norm": None} | {
    name: DEFAULTS[name]
    for name in ("percentile_clipping", "block_wise", "max_unorm", "skip_zeros")
}
"""Options that an optimizer's text names if they are not these."""
