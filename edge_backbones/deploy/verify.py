"""Measure the engines of a finished bundle again, on the device that runs them.

It needs numpy and the engine library alone.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from edge_backbones.bundle import trust
from edge_backbones.bundle.manifest import EngineRecord
from edge_backbones.bundle.reader import Bundle, load_golden, read_current
from edge_backbones.deploy.parity import measure_in_bundle, require
from edge_backbones.deploy.timing import time_bundle
from edge_backbones.engines import promises, registry, select
from edge_backbones.errors import InferenceError, IntegrityError
from edge_backbones.machine import child
from edge_backbones.parity_report import ParityReport
from edge_backbones.progress import Progress, no_progress


@child.apart(InferenceError)
def verify_bundle(
    path: str | Path,
    *,
    engine: str | None = None,
    device: str = "auto",
    allow_host_code: bool = False,
    trusted: trust.Trusted | None = None,
    sigstore: trust.SigstoreIdentity | None = None,
    in_process: bool = False,
    progress: Progress = no_progress,
) -> tuple[ParityReport, ...]:
    """Check every file of a bundle, and measure every engine that can run here again.

    If an engine was compiled ahead of time, or its stored report does not let it run, and it holds its gate now, the
    new report is stored in the bundle, and runtimes choose it from then on. An engine that another process removes
    meanwhile is skipped.

    Args:
        path: Folder of the bundle.
        engine: Measure only this engine: a precision, a flavour, or a name in the manifest or the beginning of one.
        device: Measure only engines for this device: ``"cpu"``, ``"cuda"`` or ``"cuda:1"``. ``"auto"`` measures all of
            them, on the CPU and on GPU 0.
        allow_host_code: Run programs (TorchScript, which ``engine`` has to name) and the code that a plan may carry.
        trusted: Keys of which one must have signed the bundle. This is checked before anything runs, as in
            :func:`edge_backbones.bundle.trust.admit`. Engines that it refuses are skipped, and ``progress`` gets the
            reason.
        sigstore: Identity that must have signed the bundle, checked likewise.
        in_process: Measure in this process, for a debugger. By default a child process does it, and if it dies, the
            InferenceError names the engine that it ran.
        progress: Gets every step and note.

    Returns:
        One report for each measured engine.

    Raises:
        TrustError: The bundle is not signed as asked (a BundleError).
        BundleError: A file is damaged.
        EngineMismatchError: No engine can run here.
        InferenceError: An engine failed, or the child process died.
        ParityError: At least one engine is outside the gate that the bundle was built with. Raised after all were
            measured.
    """
    del in_process  # the decorator child.apart has read it
    progress("checking files", 0, None)
    bundle, _ = read_current(path, Bundle.check_files)
    bundle, refused = trust.admit(bundle, trusted, sigstore=sigstore)
    for name, reason in refused.items():
        progress(f"passing {name} over: it {reason}", 0, None)
    golden = load_golden(bundle)
    reports: list[ParityReport] = []
    advice: dict[int, str] = {}
    for record, on in runnable(bundle, engine, device, code=allow_host_code):
        progress(f"verifying {record.key.precision}", 0, None)
        try:
            data = bundle.read(record.file)
        except IntegrityError:
            if record in Bundle.open(path).manifest.engines:
                raise
            continue  # another process has removed the engine since
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
            bundle, notes = time_bundle(bundle, on, code=allow_host_code, anew=True, progress=progress)
            for text in notes:
                progress(text, 0, None)
    if reports:
        require(*reports, advice=lambda report: advice[id(report)])
    return tuple(reports)


def say_what_is_run(bundle: Bundle, record: EngineRecord) -> None:
    """Tell the parent process which engine runs next, for its message in case this process dies."""
    way = f"take it out with edge-backbones remove {bundle.path} {record.name}, or compile it again"
    child.doing(f"was running {record.name}", f"the engine is hostile or damaged, {child.OR_A_FAULT}; {way}")


def runnable(bundle: Bundle, engine: str | None, device: str, *, code: bool) -> list[tuple[EngineRecord, int | None]]:
    """Return the engines that ``engine`` asks for and that can run here, each with the GPU's index (None: the CPU).

    Args:
        bundle: The bundle.
        engine: A precision, a flavour, a name in the manifest or the beginning of one, or None for all.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.
        code: Allow engines that are programs, and runtimes inside plans.

    Raises:
        EngineMismatchError: There is none; the message has a reason for each engine.
        InputError: ``device`` names no device.
    """
    host, place, gpu = select.machine_for(bundle, device)
    engine = select.full_name(bundle, engine)

    def reasons_against(record: EngineRecord) -> list[str]:
        reasons = [*select.against_place(record, place), *select.code_reasons(record, engine, code=code)]
        return reasons or registry.reasons_against(record.key, host)

    fitting = select.fitting_engines(bundle, engine, reasons_against, device=place)
    return [(record, gpu if place == "cuda" or record.key.gpu is not None else None) for record in fitting]


def _advice_on_verifying(bundle: Bundle, record: EngineRecord) -> str:
    """Return advice for an engine of a bundle that is outside its gate."""
    key = record.key
    flavour = registry.get(key.flavour)
    again = flavour.way_to_compile(bundle.path, f" --precision {key.precision}")
    before = "It held its gate when it was compiled: " if record.parity.measured else ""
    explain = f"; edge-backbones verify {bundle.path} --explain finds the layer" if flavour.devices == ("cpu",) else ""
    compile_it = f"{before}compile it again with {again}"
    return compile_it[0].upper() + compile_it[1:] + explain
