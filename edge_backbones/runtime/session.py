"""An engine that has been loaded, and the choice of the engine to load."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from edge_backbones.bundle import Bundle
from edge_backbones.errors import EngineMismatchError
from edge_backbones.manifest import EngineRecord
from edge_backbones.runtime import compat, openvino
from edge_backbones.spec import Precision

# Engines are offered in this order when several can run here: fewer bits first, they were let in by parity. No CPU
# computes in fp8: there it is fp32 with rounding in between.
_PREFERENCE = (Precision.INT8, Precision.FP16, Precision.BF16, Precision.FP32, Precision.FP8)


class EngineSession(Protocol):
    """One loaded engine. ``run`` may be called from several threads at once."""

    def run(self, array: np.ndarray) -> list[np.ndarray]:
        """Every output of the engine, in graph order, as new float32 arrays that the caller owns.

        ``array`` is C-contiguous, of the input's dtype and of a shape that the engine takes as it is.
        """
        ...

    def close(self) -> None:
        """Release the engine. Not while a call runs in another thread; closing twice is fine."""
        ...


def choose_engine(bundle: Bundle, host: compat.Host, engine: str | None = None) -> EngineRecord:
    """The best engine of a bundle that can run on ``host``.

    ``engine`` narrows the choice to a precision (``"int8"``), a flavour (``"openvino"``) or a name as the manifest has
    it. Raises EngineMismatchError with one reason per engine that was passed over.
    """
    engines = bundle.manifest.engines
    wanted = [e for e in engines if engine is None or engine in (e.key.precision.value, e.key.flavour, e.name)]
    if not wanted:
        held = ", ".join(e.name for e in engines) or "none"
        asked = "an engine" if engine is None else f"engine {engine!r}"
        raise EngineMismatchError(f"{bundle.path} has no {asked}; it holds: {held}. {_advice(bundle)}")
    reasons = {e.name: compat.reasons_against(e.key, host) for e in wanted}
    fitting = [e for e in wanted if not reasons[e.name]]
    if not fitting:
        listed = "; ".join(f"{name}: {' and '.join(why)}" for name, why in reasons.items())
        raise EngineMismatchError(f"no engine of {bundle.path} can run here. {listed}. {_advice(bundle)}")
    # Of two engines of one precision, the one that was compiled for more of this CPU's instructions.
    return min(fitting, key=lambda e: (_PREFERENCE.index(e.key.precision), -len(e.key.cpu_features)))


def open_session(bundle: Bundle, engine: EngineRecord, *, threads: int | None = None) -> EngineSession:
    """Read, check and load one engine."""
    open_engine: Callable[..., EngineSession] = {"openvino": openvino.OpenVinoSession}[engine.key.flavour]
    return open_engine(bundle.read(engine.file), outputs=bundle.manifest.backbone.outputs, threads=threads)


def installed_versions() -> dict[str, str]:
    """Version of every engine library that can be imported here, by flavour."""
    version = openvino.library_version()
    return {} if version is None else {"openvino": version}


def _advice(bundle: Bundle) -> str:
    return f"Run: edge-backbones compile {bundle.path}"
