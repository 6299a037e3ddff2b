from collections.abc import Callable
from typing import Any, Literal, final

from torch import Tensor

__all__ = [
    "CudaError",
    "Engine",
    "check_hyper",
    "check_parameter",
    "cpu_backend",
    "cuda_availability",
    "decode_blocks",
    "dynamic_map",
    "encode_blocks",
    "use_software_device",
    "version",
]

def version() -> str: ...
def cpu_backend() -> Literal["scalar", "avx2", "avx512"]: ...
def cuda_availability() -> tuple[int, str | None]: ...
def use_software_device(adopt: int, unadopt: int) -> None: ...
def check_hyper(lr: float, beta1: float, beta2: float, eps: float, weight_decay: float) -> None: ...
def check_parameter(param: Tensor, subject: str) -> None: ...
def dynamic_map(signed: bool) -> list[float]: ...
def encode_blocks(values: Tensor, codes: Tensor, scales: Tensor, signed: bool) -> None: ...
def decode_blocks(codes: Tensor, scales: Tensor, values: Tensor, signed: bool) -> None: ...

class CudaError(RuntimeError):
    name: str
    code: int
    doing: str

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
    def poll(self) -> int: ...
