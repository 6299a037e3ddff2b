from collections.abc import Callable
from typing import Any, Literal, final

from torch import Tensor

__all__ = [
    "CudaError",
    "Engine",
    "advise_huge_pages",
    "check_hyper",
    "check_max_grad_norm",
    "check_paging",
    "check_parameter",
    "cpu_backend",
    "cuda_availability",
    "decode_blocks",
    "decode_ratio",
    "dynamic_map",
    "encode_blocks",
    "encode_ratio",
    "encode_tensor",
    "initialise_pages",
    "memory_tier",
    "page_state",
    "settle_pages",
    "takes_impressions",
    "use_software_device",
    "version",
]

def version() -> str: ...
def cpu_backend() -> Literal["scalar", "avx2", "avx512", "avx512vbmi"]: ...
def takes_impressions() -> bool: ...
def advise_huge_pages(tensor: Tensor) -> None: ...
def cuda_availability() -> tuple[int, str | None]: ...
def use_software_device(adopt: int, unadopt: int) -> None: ...
def check_hyper(lr: float, beta1: float, beta2: float, eps: float, weight_decay: float) -> None: ...
def check_max_grad_norm(max_norm: float) -> None: ...
def check_parameter(param: Tensor, subject: str) -> None: ...
def dynamic_map(signed: bool) -> list[float]: ...
def encode_blocks(values: Tensor, codes: Tensor, scales: Tensor, signed: bool) -> None: ...
def encode_tensor(values: Tensor, codes: Tensor, scales: Tensor, signed: bool) -> None: ...
def decode_blocks(codes: Tensor, scales: Tensor, values: Tensor, signed: bool) -> None: ...
def encode_ratio(
    values: list[Tensor], codes: list[Tensor], scales: list[Tensor], block_wise: bool
) -> None: ...
def decode_ratio(codes: list[Tensor], scales: list[Tensor], values: list[Tensor]) -> None: ...
def check_paging(like: Tensor) -> None: ...
def page_state(
    like: Tensor, params: list[tuple[int, str | None, bool, bool]]
) -> list[dict[str, Tensor]]: ...
def initialise_pages(pages: Tensor, value: int) -> None: ...
def settle_pages(pages: Tensor) -> None: ...
def memory_tier(
    tensor: Tensor,
) -> tuple[Literal["device", "managed", "host", "mapped"], tuple[int, int] | None]: ...

class CudaError(RuntimeError):
    name: str
    code: int
    doing: str

@final
class Engine:
    def __new__(
        cls,
        decoupled: bool,
        nonfinite: str,
        percentile_clipping: int,
        max_unorm: float,
        skip_zeros: bool,
    ) -> Engine: ...
    def step(
        self,
        groups: list[dict[str, Any]],
        overrides: dict[Tensor, dict[str, Any]],
        state: dict[Tensor, dict[str, Any]],
        make_state: Callable[[list[Tensor]], None],
        threads: int,
        amp: list[tuple[Tensor | None, Tensor | None]],
        clip: tuple[float, Tensor] | None,
    ) -> int: ...
    def poll(self) -> int: ...
    def work(self) -> tuple[int, int]: ...
