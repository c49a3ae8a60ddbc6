"""``edge-backbones bench``: time an engine beside its peers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from edge_backbones.bench.compare import CompareOptions, compare, read_images
from edge_backbones.bench.results import FEWEST_TURNS, Comparison, encode, read, refuse_unlike, regressions
from edge_backbones.bundle.reader import Bundle
from edge_backbones.cli import console
from edge_backbones.cli.options import Form, takes, usage
from edge_backbones.cli.shared import (
    AllowHostCode,
    BundleArgument,
    DeviceOption,
    EngineOption,
    JsonFlag,
    ThreadsOption,
    check_output,
    names,
)
from edge_backbones.engines import select


@takes(
    CompareOptions,
    vs=Form(type=str | None, read=lambda text: tuple(filter(None, names(text))), metavar="LIST"),
    pythons=Form(
        flag="peer_python",
        type=list[str] | None,
        read=lambda entries: dict(entry.partition("=")[::2] for entry in entries),
        metavar="NAME=PYTHON",
    ),
    seconds=Form(metavar="SECONDS"),
)
def bench(
    bundle: BundleArgument,
    *,
    engine: EngineOption = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    given: dict[str, Any],
    images: Annotated[
        Path | None,
        typer.Option(
            "--images",
            "-i",
            metavar="FOLDER",
            help="A folder of photographs for nncf to calibrate with. By default the golden samples of the bundle.",
            show_default=False,
            rich_help_panel="Peers",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="FILE", help="Write the results to this JSON file too.", show_default=False
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Compare with earlier results, a file of --out: the exit code is 4 if the engine has become slower.",
            show_default=False,
        ),
    ] = None,
    allow_host_code: AllowHostCode = False,
    as_json: JsonFlag = False,
) -> None:
    """Time a bundle's engine and its peers side by side: they take turns, and ratios come with their bounds.

    Example: **edge-backbones bench resnet50.bundle --vs torch,onnxruntime,nncf --out today.json**
    """
    if out is not None:
        check_output(out, "--out")
    before = None if against is None else read(against)
    with usage():
        CompareOptions(**given)  # what is typed wrong is refused before the bundle is looked at
    opened = Bundle.open(bundle)
    device = select.device_for(opened, device, engine, allow_host_code=allow_host_code)
    if device != "cpu":
        given.setdefault("vs", ("torch", "onnxruntime"))  # OpenVINO runs on the CPU alone
    if threads is not None:
        given["threads"] = threads
    if images is not None and not {"nncf", "nncf-f32"} & set(given.get("vs", ())):
        raise typer.BadParameter(
            f"{images} is what nncf calibrates with: add nncf to --vs, or leave it out", param_hint="--images"
        )
    if before is not None:
        if given.get("turns", FEWEST_TURNS) < FEWEST_TURNS:
            raise typer.BadParameter(
                f"{given['turns']} are too few for --against: {FEWEST_TURNS} or more", param_hint="--turns"
            )
        known = {"bundle": opened.path.name, "device": device, "input_shape": opened.manifest.input.opt_shape}
        refuse_unlike(before, given.get("vs", CompareOptions().vs), **known)
    calibrating = None if images is None else read_images(images, opened)
    with usage():
        options = CompareOptions(
            **given, engine=engine, device=device, images=calibrating, allow_host_code=allow_host_code
        )
    with console.Steps(as_json) as progress:
        result = compare(bundle, options, progress=progress)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(encode(result))
    lost = [] if before is None else regressions(result, before)
    if as_json:
        console.print_json({"comparison": result, "regressions": lost})
    else:
        _print_comparison(result)
        for phrase in lost:
            console.err.print(f"slower than before: {phrase}", soft_wrap=True)
        if before is not None and not lost:
            console.out.print(f"no ground lost since {before.date}")
    if lost:
        raise typer.Exit(console.EXIT_SLOWER)


_COSTS = (
    ("SQNR dB", "worst_sqnr_db"), ("images/s", "images_per_second"), ("load s", "load_s"), ("first call ms", "first_call_ms"),
    ("MB", "resident_mb"), ("device MB", "device_mb"), ("file MB", "file_mb"), ("J/image", "joules"),
)  # fmt: skip


def _print_comparison(result: Comparison) -> None:
    """Print the speed and the cost of each contender as tables, then in words what they ran and which did not run."""
    shape = "x".join(str(size) for size in result.input_shape)
    title = f"{result.engine} on {result.machine.name}, {result.threads} threads, input {shape}, {result.device}"
    ratios = {ratio.name: ratio for ratio in result.ratios}
    shown = [m for m in result.measurements if not m.missing]
    speed = console.Table("", title=title)
    for column in ("ms", "times ours", "p90 ms", "p99 ms", "jitter"):
        speed.add_column(column, justify="right")
    for m in shown:
        ratio = ratios.get(m.name)
        told = "1" if ratio is None else f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
        jitter = "" if m.jitter is None else f"{m.jitter:.0%}"
        speed.add_row(m.name, _figure(m.median_ms), told, _figure(m.p90_ms), _figure(m.p99_ms), jitter)
    measured = [(head, field) for head, field in _COSTS if any(getattr(m, field) is not None for m in shown)]
    cost = console.Table("")
    for head, _ in measured:
        cost.add_column(head, justify="right")
    for m in shown:
        cost.add_row(m.name, *(_figure(getattr(m, field)) for _, field in measured))
    console.out.print(speed)
    console.out.print(cost)
    for m in shown:
        versions = ", ".join(f"{name} {version.partition('-')[0]}" for name, version in m.versions.items())
        console.out.print(f"{m.name}: {m.what} ({versions})")
    for m in result.measurements:
        if m.missing:
            console.out.print(f"{m.name} did not run: {m.missing}")
    few = [ratio.name for ratio in result.ratios if not ratio.is_sure]
    if few:
        console.out.print(f"Not ranked against {', '.join(few)}: that takes {FEWEST_TURNS} turns or more.")
    unranked = [ratio.name for ratio in result.ratios if ratio.is_sure and not ratio.is_ranked]
    if unranked:
        console.out.print(
            f"Not ranked against {', '.join(unranked)}: the difference is within the noise of this machine."
        )


def _figure(value: float | None) -> str:
    """Return a number with three digits, nothing for None."""
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"
