"""Whether CUDA can be used, and if not, why not.

The driver is looked for at run time: nothing of CUDA is needed to build, install or import qadam.
"""

from qadam import _core


def device_count() -> int:
    """How many CUDA devices the driver reports; 0 without a driver."""
    return _core.cuda_availability()[0]


def is_available() -> bool:
    """Whether there is a CUDA device that qadam can use."""
    return device_count() > 0


def why_not() -> str | None:
    """Why :func:`is_available` is False, or None where it is True."""
    return _core.cuda_availability()[1]
