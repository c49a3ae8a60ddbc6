"""Names in a bundle are a stranger's: what a terminal would obey in them is shown as an escape, everywhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from edge_backbones import errors, parity_report, testing
from edge_backbones.bundle.manifest import Decision, Trial
from edge_backbones.bundle.writer import BundleWriter, write_manifest
from edge_backbones.errors import visible
from edge_backbones.spec import Precision

HOSTILE = "\x1b[2J\x1b]0;t\x07\u202e\u2066\x9b31m\r\u2028"
SHOWN = r"\x1b[2J\x1b]0;t\x07\u202e\u2066\x9b31m\r\u2028"
KEPT = "Größe 日本　語 می\u200cخواهم"  # noqa: RUF001
ROOT = Path(__file__).parents[2]
# Everything that a terminal obeys or that turns the direction of writing, but for the end of a line.
OBEYED = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("layer4", "layer4"),
        (KEPT, KEPT),
        ("👩\u200d🚀", "👩\u200d🚀"),
        (HOSTILE, SHOWN),
        ("one\ntwo\tthree", r"one\ntwo\tthree"),
        ("gnp.\u202egpj", r"gnp.\u202egpj"),
        ("caf\udce9", r"caf\udce9"),
        ("\u200b\ufeff\u00ad\U000e0041", r"\u200b\ufeff\xad\U000e0041"),
        ("", ""),
    ],
)
def test_a_text_is_shown_on_one_line(text, shown):
    assert visible(text) == shown


@pytest.mark.parametrize(
    "kind", [errors.BundleError, errors.InputError, parity_report.ParityError, errors.OutOfMemoryError]
)
def test_an_error_shows_what_it_quotes(kind):
    error = kind(f"{KEPT} {HOSTILE} is not there")
    assert str(error) == f"{KEPT} {SHOWN} is not there"
    assert OBEYED.search(repr(error)) is None


def test_the_traceback_of_a_worker_keeps_its_lines():
    """torch's DataLoader raises the error of a worker anew, with such a text."""
    lines = [
        "Caught InputError in DataLoader worker process 0.",
        "Original Traceback (most recent call last):",
        "  File x",
    ]
    error = errors.InputError("\n".join([*lines, f"name {HOSTILE}", ""]))
    assert str(error).split("\n") == [*lines, f"name {SHOWN}", ""]
    assert str(errors.InputError("\n".join(lines[1:]))).count("\n") == 0


def test_errors_with_constructors_of_their_own_show_what_they_quote():
    for error in (
        errors.MissingDependencyError(HOSTILE, "cpu"),
        errors.BrokenLibraryError(ImportError(HOSTILE)),
        errors.ResourceError(HOSTILE, "memory", HOSTILE),
    ):
        assert OBEYED.search(str(error)) is None
        assert r"\x1b[2J" in str(error)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """A bundle that works, with hostile names wherever the manifest has one."""
    patch = pytest.MonkeyPatch()
    names = {name: f"{name}{KEPT}{HOSTILE}" for name in testing.SPEC.stage_names}
    spec = msgspec.structs.replace(
        testing.SPEC,
        stage_names=tuple(names.values()),
        out_features=tuple(names[name] for name in testing.SPEC.out_features),
    )
    patch.setattr(testing, "SPEC", spec)
    folder = tmp_path_factory.mktemp("names")
    bundle = testing.make_bundle(folder / f"{KEPT}{HOSTILE}.bundle", testing.pooling_input(1))
    patch.undo()
    manifest = bundle.manifest
    engine = manifest.engines[0]
    replace = msgspec.structs.replace
    trial = Trial(
        precision=Precision.FP32,
        cosine=1.0,
        sqnr_db=99.0,
        milliseconds=1.0,
        passed=True,
        blocks=(HOSTILE,),
    )
    # Another engine, which does not run here. Its key may hold no control characters: it names a file.
    other = replace(engine, key=replace(engine.key, architecture="another", device_name="Größe"))
    blob = bytes(bundle.read(engine.file))
    other = replace(other, file=BundleWriter(bundle.path).add_file(other.key.path(blob, ".blob"), blob))
    manifest = replace(
        manifest,
        source=replace(
            manifest.source,
            name=HOSTILE,
            preprocessing=HOSTILE,
            preprocessing_notes=(HOSTILE,),
        ),
        engines=(engine, other),
        golden=replace(manifest.golden, images=(f"photo{HOSTILE}", HOSTILE)),
        decision=Decision(device_name=HOSTILE, sentence=HOSTILE, trials=(trial,)),
        provenance=replace(manifest.provenance, created=HOSTILE, versions={HOSTILE: HOSTILE}),
    )
    write_manifest(bundle.path, manifest)
    return bundle.path


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("photos") / f"photo{KEPT}{HOSTILE}.png"
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def run(*arguments: object, folder: Path) -> subprocess.CompletedProcess:
    """The command on a pipe of UTF-8, in a folder of its own."""
    command = [sys.executable, "-X", "utf8", "-m", "edge_backbones", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    assert OBEYED.search(done.stdout + done.stderr) is None, ascii(done.stdout + done.stderr)
    return done


@pytest.mark.parametrize(
    ("command", "code", "kept"),
    [
        (["inspect", "BUNDLE"], 0, True),
        (["doctor", "BUNDLE"], 0, False),
        (["verify", "BUNDLE"], 0, True),
        (["run", "BUNDLE", "PHOTO", "--out", "maps"], 0, True),
        (["report", "BUNDLE", "--out", "page.html"], 0, False),
        (["compile", "BUNDLE", "--in-process"], 1, True),
        (["compile", "BUNDLE", "--in-process", "--precision", "int8"], 1, True),
        (["remove", "BUNDLE", "x" + HOSTILE], 1, True),
        (["run", "BUNDLE", "PHOTO", "--engine", "x" + HOSTILE], 1, True),
        (["run", "BUNDLE", f"nothing{HOSTILE}.png"], 1, False),
        (["inspect", "BUNDLE" + HOSTILE], 1, True),
        (["bench", "BUNDLE", "--vs", f"x{HOSTILE}x"], 2, False),
        (["build", "resnet18", "out", "--weights", "random:0", "--images", f"nothing{HOSTILE}"], 1, False),
    ],
    ids=lambda value: " ".join(map(ascii, value)) if isinstance(value, list) else "",
)
def test_no_command_prints_what_a_terminal_obeys(hostile, photo, tmp_path, command, code, kept):
    arguments = [part.replace("BUNDLE", str(hostile)).replace("PHOTO", str(photo)) for part in command]
    done = run(*arguments, folder=tmp_path)
    said = done.stdout + done.stderr
    assert done.returncode == code, said
    if "report" not in command:
        assert SHOWN in said.replace("\n", "")  # a table breaks its lines
    if code == 0:
        assert set(done.stderr.splitlines()) <= {"checking files", "verifying fp32", "running"}
    if kept:
        assert "Größe 日本" in said


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_json_holds_the_names_as_they_are(hostile, tmp_path, command):
    assert f"pool4{KEPT}{HOSTILE}" in texts(json.loads(run(command, hostile, "--json", folder=tmp_path).stdout))


def texts(value: object) -> set[str]:
    """Every text in a JSON document."""
    if isinstance(value, dict):
        return set().union(*map(texts, value.values()))
    if isinstance(value, list):
        return set().union(*map(texts, value))
    return {value} if isinstance(value, str) else set()


def test_a_refusal_is_json_too(hostile, tmp_path):
    document = json.loads(run("verify", hostile, "--engine", HOSTILE, "--json", folder=tmp_path).stdout)
    assert document["error"] == "EngineMismatchError"
    assert SHOWN in document["message"]


def test_a_report_shows_names_and_obeys_none(hostile, tmp_path):
    page = tmp_path / "page.html"
    run("report", hostile, "--out", page, folder=tmp_path)
    text = page.read_text(encoding="utf-8")
    assert OBEYED.search(text) is None
    assert SHOWN in text
    assert KEPT in text
