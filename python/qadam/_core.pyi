from collections.abc import Callable
from typing import Any, Literal, final

from torch import Tensor

__all__ = [
    "Engine",
    "check_hyper",
    "check_parameter",
    "cpu_backend",
    "decode_blocks",
    "dynamic_map",
    "encode_blocks",
    "version",
]

def version() -> str: ...
def cpu_backend() -> Literal["scalar", "avx2", "avx512"]: ...
def check_hyper(lr: float, beta1: float, beta2: float, eps: float, weight_decay: float) -> None: ...
def check_parameter(param: Tensor, subject: str) -> None: ...
def dynamic_map(signed: bool) -> list[float]: ...
def encode_blocks(values: Tensor, codes: Tensor, scales: Tensor, signed: bool) -> None: ...
def decode_blocks(codes: Tensor, scales: Tensor, values: Tensor, signed: bool) -> None: ...

@final
class Engine:
    def __new__(cls, decoupled: bool, nonfinite: str) -> Engine: ...
    def step(
        self,
        groups: list[dict[str, Any]],
        state: dict[Tensor, dict[str, Any]],
        make_state: Callable[[list[Tensor]], None],
        threads: int,
    ) -> int: ...
