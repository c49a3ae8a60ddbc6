"""What is measured again of a finished bundle, on the device that is to run it: numpy and the engine library are enough."""

from __future__ import annotations

from pathlib import Path

import msgspec

from edge_backbones.bundle import trust
from edge_backbones.bundle.manifest import EngineRecord
from edge_backbones.bundle.reader import Bundle, load_golden, read_current
from edge_backbones.deploy.parity import measure_in_bundle, require
from edge_backbones.deploy.timing import time_bundle
from edge_backbones.engines import promises, registry
from edge_backbones.engines import select as session
from edge_backbones.errors import InferenceError, IntegrityError
from edge_backbones.machine import child
from edge_backbones.parity_report import ParityReport
from edge_backbones.progress import Progress, no_progress


@child.apart(InferenceError)
def verify_bundle(
    path: str | Path,
    *,
    engine: str | None = None,
    gpu: int = 0,
    allow_host_code: bool = False,
    trusted: trust.Trusted | None = None,
    sigstore: trust.SigstoreIdentity | None = None,
    in_process: bool = False,
    progress: Progress = no_progress,
) -> tuple[ParityReport, ...]:
    """Check every file of a bundle, and measure again every engine that can run here (or just ``engine``).

    An engine that was compiled ahead of time is measured for the first time, and the report is added to the bundle: from
    then on runtimes take it. So is that of an engine whose stored report does not let it run, and which holds its gate. One
    that another process takes out meanwhile is left out. ``gpu``: index of the GPU for engines that need one.
    ``allow_host_code``: run programs (TorchScript, which ``engine`` has to name) and the code that a plan may carry.
    ``trusted`` and ``sigstore``: who must have signed, checked before anything runs, as in
    :func:`edge_backbones.bundle.trust.admit`; engines that it refuses are passed over, and ``progress`` gets why.

    All of it happens in a process of its own, whose death is an InferenceError that names the engine; with ``in_process`` in
    this one, for a debugger. Raises TrustError (a BundleError) for a bundle that is not signed as asked, BundleError for a
    damaged file, EngineMismatchError when no engine can run here, and when all are measured ParityError for those of which a
    feature map is outside the gate that the bundle was built with.
    """
    del in_process  # child.apart has read it
    progress("checking files", 0, None)
    bundle, _ = read_current(path, Bundle.check_files)
    bundle, refused = trust.admit(bundle, trusted, sigstore=sigstore)
    for name, reason in refused.items():
        progress(f"passing {name} over: it {reason}", 0, None)
    golden = load_golden(bundle)
    reports: list[ParityReport] = []
    advice: dict[int, str] = {}
    for record in runnable(bundle, engine, gpu, code=allow_host_code):
        progress(f"verifying {record.key.precision}", 0, None)
        try:
            data = bundle.read(record.file)
        except IntegrityError:
            if record in Bundle.open(path).manifest.engines:
                raise
            continue  # taken out since
        on = None if record.key.gpu is None else gpu
        gate = promises.gate_of(bundle.manifest, record.key, record.parity.gate)
        say_what_is_run(bundle, record)
        measured = measure_in_bundle(bundle, record.key, data, golden, gate, on, code=allow_host_code)
        reports.append(measured)
        advice[id(measured)] = _advice_on_verifying(bundle, record)
        if not measured.passed:
            promises.forget(bundle.manifest, record, registry.this_machine(on))
            continue
        promises.remember(bundle.manifest, record, registry.this_machine(on))
        if promises.reasons_against(bundle.manifest, record):
            fresh = msgspec.structs.replace(record, parity=measured)
            if doubt := trust.vouch(bundle, fresh, instead_of=record):
                progress(doubt, 0, None)
            bundle = bundle.add_engine(fresh, {})
            bundle, told = time_bundle(bundle, on, code=allow_host_code, anew=True, progress=progress)
            for text in told:
                progress(text, 0, None)
    if reports:
        require(*reports, advice=lambda report: advice[id(report)])
    return tuple(reports)


def say_what_is_run(bundle: Bundle, record: EngineRecord) -> None:
    way = f"take it out with edge-backbones remove {bundle.path} {record.name}, or compile it again"
    child.doing(f"was running {record.name}", f"the engine is hostile or damaged, {child.OR_A_FAULT}; {way}")


def runnable(bundle: Bundle, engine: str | None, gpu: int, *, code: bool) -> list[EngineRecord]:
    """The engines that ``engine`` means and that can run here; raises EngineMismatchError when there is none."""
    on_gpu = any(record.key.gpu is not None for record in bundle.manifest.engines)
    host = registry.this_machine(gpu if on_gpu else None)

    def reasons_against(record: EngineRecord) -> list[str]:
        return [*session.code_reasons(record, engine, code=code), *registry.reasons_against(record.key, host)]

    return session.fitting_engines(bundle, engine, reasons_against)


def _advice_on_verifying(bundle: Bundle, record: EngineRecord) -> str:
    """What helps where an engine in a bundle is outside its gate."""
    key = record.key
    flavour = registry.get(key.flavour)
    again = flavour.way_to_compile(bundle.path, f" --precision {key.precision}")
    before = "It held its gate when it was compiled: " if record.parity.measured else ""
    explain = f"; edge-backbones verify {bundle.path} --explain finds the layer" if flavour.devices == ("cpu",) else ""
    compile_it = f"{before}compile it again with {again}"
    return compile_it[0].upper() + compile_it[1:] + explain
