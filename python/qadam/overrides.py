"""Options of single parameters, whatever optimizer they end up in."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from qadam import layout
from qadam.options import check_options

Config = dict[str, Any]
"""Options by name, as in a parameter group."""

OPTIONS = frozenset(
    (
        *("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize"),
        *("optim_bits", "min_8bit_size", "is_paged"),
        *("percentile_clipping", "block_wise", "state_code", "max_unorm", "skip_zeros"),
    )
)
"""What can be overridden."""


class GlobalOptimManager:
    """Overrides options of single parameters.

    The interface is that of ``bitsandbytes.optim.GlobalOptimManager``::

        manager = qadam.GlobalOptimManager.get_instance()
        manager.override_config(model.embedding.weight, "optim_bits", 32)

    Options of hyperparameters (``lr``, ``betas``, ``eps``, ``weight_decay``, ``amsgrad``,
    ``maximize``, ``percentile_clipping``, ``max_unorm``, ``skip_zeros``) count from the next step
    on. Those of the state (``optim_bits``, ``min_8bit_size``, ``block_wise``, ``state_code``,
    ``is_paged``) count
    when state is made: set them before the first step, or load a state dict. An overridden ``lr``
    follows schedulers, and changes by hand: it is multiplied by the group's ``lr`` now, over what
    that was when the group was added (``initial_lr``, where a scheduler says so).

    Parameters are held weakly and by identity: an override ends with its parameter, and survives
    ``model.cuda()``, which keeps parameters and replaces their data.
    """

    _instance: ClassVar[GlobalOptimManager | None] = None
    _by_parameter: MutableMapping[Tensor, Config]
    _by_module: list[tuple[weakref.ref[nn.Module], str, Config]]

    def __init__(self) -> None:
        msg = "there is one GlobalOptimManager: call GlobalOptimManager.get_instance()"
        raise RuntimeError(msg)

    @classmethod
    def get_instance(cls) -> GlobalOptimManager:
        """The one manager."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.initialize()
        return cls._instance

    def initialize(self) -> None:
        """Forgets all overrides."""
        self._by_parameter = WeakIdKeyDictionary()
        self._by_module = []

    def register_parameters(self, params: Iterable[Tensor] | Iterable[dict[str, Any]]) -> None:
        """Checks that ``params`` are parameters or groups of them; nothing else is needed here.

        bitsandbytes has to be told of parameters before they move to a device. Here an override
        finds its parameter wherever that has moved.

        Raises:
            TypeError: for anything else.
        """
        for item in params:
            for param in _tensors(item["params"]) if isinstance(item, dict) else [item]:
                _check_tensor(param)

    def override_config(
        self,
        parameters: Tensor | Iterable[Tensor],
        key: str | None = None,
        value: Any = None,  # noqa: ANN401 - any option's
        key_value_dict: Mapping[str, Any] | None = None,
    ) -> None:
        """Overrides options of one or several parameters, on top of earlier overrides.

        Args:
            parameters: a parameter, or several.
            key: the option's name.
            value: its value.
            key_value_dict: several options at once.

        Raises:
            TypeError: for what is not a tensor.
            ValueError: for an option that does not exist, or a value out of range.
        """
        config = dict(key_value_dict or {})
        if key is not None:
            config[key] = value
        _check_config(config)
        tensors = _tensors(parameters)
        for param in tensors:
            _check_tensor(param)
        for param in tensors:
            self._by_parameter[param] = {**self._by_parameter.get(param, {}), **config}

    def register_module_override(
        self, module: nn.Module, param_name: str, config: Mapping[str, Any]
    ) -> None:
        """Overrides options of whatever parameter ``module`` has under ``param_name``.

        Args:
            module: the module, held weakly.
            param_name: the parameter's name in it.
            config: options by name.

        Raises:
            ValueError: for an option that does not exist.
        """
        _check_config(config)
        self._by_module.append((weakref.ref(module), param_name, dict(config)))

    def configs(self) -> dict[int, Config]:
        """The overrides that are in force, by the parameter's ``id``; for the optimizers."""
        self._by_module = [item for item in self._by_module if item[0]() is not None]
        found: dict[int, Config] = {}
        for reference, name, config in self._by_module:
            param = getattr(reference(), name, None)
            if isinstance(param, Tensor):
                found[id(param)] = {**found.get(id(param), {}), **config}
        for param, config in self._by_parameter.items():
            found[id(param)] = {**found.get(id(param), {}), **config}
        return found


def overridden(groups: list[dict[str, Any]], base_lrs: list[float]) -> dict[Tensor, Config]:
    """For each parameter with overrides, its group with them in place.

    Args:
        groups: an optimizer's groups.
        base_lrs: what the learning rate of each group was before any schedule.
    """
    configs = GlobalOptimManager.get_instance().configs()
    if not configs:
        return {}
    found = {}
    for group, base_lr in zip(groups, base_lrs, strict=True):
        for param in group["params"]:
            config = configs.get(id(param))
            if config is not None:
                found[param] = {**group, **config}
                if "lr" in config:
                    found[param]["lr"] = _scheduled(group, base_lr, config["lr"])
    return found


def _scheduled(group: dict[str, Any], base_lr: float, lr: float) -> float:
    """An overridden learning rate after what has become of its group's."""
    if isinstance(group["lr"], Tensor) and not group["lr"].is_cpu:
        msg = f"lr is a tensor on {group['lr'].device} and overridden: make it a number"
        raise ValueError(msg)
    base = float(group.get("initial_lr", base_lr))  # the former is a scheduler's word
    return float(lr) * (float(group["lr"]) / base) if base != 0 else float(lr)


def _tensors(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [parameters] if isinstance(parameters, Tensor) else list(parameters)


def _check_tensor(param: object) -> None:
    if not isinstance(param, Tensor):
        msg = f"parameters must be tensors, got {type(param).__name__}"
        raise TypeError(msg)


def _check_config(config: Mapping[str, Any]) -> None:
    for key in config:
        if key not in OPTIONS:
            msg = f"{key!r} cannot be overridden; {', '.join(sorted(OPTIONS))} can"
            raise ValueError(msg)
    usual = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    layout.check_group({**usual, **config})
    if isinstance(config.get("lr"), Tensor) and not config["lr"].is_cpu:
        msg = f"lr is a tensor on {config['lr'].device}; a number is accepted in an override"
        raise ValueError(msg)
    check_options(config)
