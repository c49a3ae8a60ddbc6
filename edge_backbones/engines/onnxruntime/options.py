"""Options of ONNX Runtime sessions that share the CPU with other engines of the process."""

from __future__ import annotations

from typing import Any

from edge_backbones import cpus
from edge_backbones.engines.onnxruntime.library import load_library

_ERRORS_ONLY = 3  # ONNX Runtime writes warnings to the terminal of the program. Errors come back as exceptions.
_SPIN_MICROSECONDS = "100"


def session_options(threads: int | None = None) -> Any:
    """Return options for a session. ``threads``: most threads of one call, None for ONNX Runtime's choice: one per core.

    ONNX Runtime counts the cores of the machine and knows neither affinity masks nor quotas, so under a limit the number is
    set here.

    ONNX Runtime's threads spin while they wait for work, between calls too, and take CPU time from other engines. Here they
    spin for 0.1 ms at most, and only inside calls. A session that is alone is as fast as before (benchmarks/threads.py).
    """
    options = load_library().SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    if threads is None and (limit := cpus.limit()) is not None:
        threads = min(limit, cpus.cores())
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.intra_op.spin_duration_us", _SPIN_MICROSECONDS)
    return options
