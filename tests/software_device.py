"""The software GPU, for tests of the CUDA path on machines without one.

Loads the stand-in ``libcuda`` (crates/softgpu) before qadam looks for a driver, and has CPU tensors
stand in for device memory, for the life of the process. ``make test`` runs ``pytest -m cuda`` with
``QADAM_SOFTGPU`` set to the library.
"""

import ctypes
import json
import os

from qadam import _core

ADOPT = "softgpu_adopt", "softgpu_unadopt"


class SoftwareDevice:
    """Control of the software GPU; see crates/softgpu/README.md."""

    def __init__(self, path):
        self.library = ctypes.CDLL(os.fspath(path), mode=ctypes.RTLD_GLOBAL)
        adopt, unadopt = (
            ctypes.cast(getattr(self.library, name), ctypes.c_void_p).value for name in ADOPT
        )
        _core.use_software_device(adopt, unadopt)
        self.library.softgpu_sync_count.restype = ctypes.c_uint64
        for name in ("softgpu_call_log", "softgpu_leaks", "softgpu_last_fault"):
            function = getattr(self.library, name)
            function.restype = ctypes.c_uint64
            function.argtypes = [ctypes.c_char_p, ctypes.c_uint64]

    def text(self, name):
        """What a text function of the library says."""
        function = getattr(self.library, name)
        size = function(None, 0)
        buffer = ctypes.create_string_buffer(size + 1)
        function(buffer, size + 1)
        return buffer.value.decode()

    def calls(self):
        """Driver calls since the logs were cleared, in order."""
        return [json.loads(line) for line in self.text("softgpu_call_log").splitlines()]

    def clear(self):
        """Forgets the calls so far."""
        self.library.softgpu_clear_logs()

    def syncs(self):
        """How many calls since then made the host wait."""
        return self.library.softgpu_sync_count()

    def fail(self, name, k, code):
        """Makes the ``k``-th call of ``name`` from now return ``code``."""
        self.library.softgpu_fail(name.encode(), ctypes.c_uint64(k), ctypes.c_int32(code))

    def disarm(self):
        """No call fails any more."""
        self.library.softgpu_disarm()
