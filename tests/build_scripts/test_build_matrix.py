"""Models x precisions x devices: what is made, what is left alone, what fails alone, and what is printed."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
from PIL import Image

from build_scripts import matrix_cells
from build_scripts.build_matrix import Ending, show
from edge_backbones import Bundle
from edge_backbones.errors import EdgeBackbonesError
from tests.build_scripts.matrices import ALL, ROOT, Pretender, carry_out, command, write


def test_everything_is_made_once_and_only_what_changed_again(folder):
    path, first, second = write(folder), Pretender(), Pretender()
    endings, said = carry_out(path, first)
    assert set(first.asked) == set(endings) == ALL
    assert {ending.status for ending in endings.values()} == {"made"}
    assert len(said) == len(ALL)
    assert said[-1].startswith("[6/6] ")
    endings, _ = carry_out(path, second)
    assert second.asked == []
    assert {ending.status for ending in endings.values()} == {"there"}
    changed = Pretender()
    carry_out(write(folder, more=", out_indices = [1]"), changed)
    assert set(changed.asked) == {"test_efficientnet.fp32", "test_efficientnet.fp32 on rtx-40"}
    (folder / "photographs" / "0.png").write_bytes((folder / "photographs" / "1.png").read_bytes())
    again = Pretender()
    carry_out(write(folder, more=", out_indices = [1]"), again)
    assert set(again.asked) == ALL


def test_a_bundle_that_is_gone_is_made_again(folder):
    path = write(folder)
    carry_out(path, Pretender())
    (folder / "bundles" / "test_resnet.int8.bundle" / "manifest.json").write_text("damaged")
    again = Pretender()
    carry_out(path, again)
    assert again.asked == ["test_resnet.int8", "test_resnet.int8 on rtx-40"]


def test_an_engine_that_is_removed_or_damaged_is_made_again(folder):
    path = write(folder)
    endings, _ = carry_out(path, Pretender())
    bundles = {
        row: Bundle.open(folder / "bundles" / f"{row}.bundle") for row in ("test_resnet.fp32", "test_resnet.int8")
    }
    bundles["test_resnet.fp32"].remove_engine(*endings["test_resnet.fp32 on rtx-40"].engines)
    damaged = bundles["test_resnet.int8"].manifest.engines[1].file.path
    (bundles["test_resnet.int8"].path / damaged).write_bytes(b"half")
    again = Pretender()
    endings, _ = carry_out(path, again)
    assert set(again.asked) == {"test_resnet.fp32 on rtx-40", "test_resnet.int8 on rtx-40"}
    for row in bundles:
        bundle = Bundle.open(folder / "bundles" / f"{row}.bundle")
        bundle.check_files()
        assert [engine.key.device_name for engine in bundle.manifest.engines][1:] == ["rtx-40"]
    carry_out(path, nothing := Pretender())
    assert nothing.asked == []


def test_the_own_engine_of_a_bundle_counts_too(folder):
    path = write(folder)
    endings, _ = carry_out(path, Pretender())
    Bundle.open(folder / "bundles" / "test_resnet.fp32.bundle").remove_engine(*endings["test_resnet.fp32"].engines)
    carry_out(path, again := Pretender())
    assert again.asked == ["test_resnet.fp32", "test_resnet.fp32 on rtx-40"]


def test_a_kill_between_a_bundle_and_its_engine_loses_no_engine(folder):
    """The engine that the bundle had before says nothing of the new bundle."""
    path, engine = write(folder), "test_resnet.int8 on rtx-40"
    carry_out(path, Pretender())
    shutil.rmtree(folder / "bundles" / "test_resnet.int8.bundle")
    with pytest.raises(KeyboardInterrupt):
        carry_out(path, Pretender({engine: KeyboardInterrupt()}))
    stored = json.loads((folder / "bundles" / "matrix.json").read_text())
    assert stored["test_resnet.int8"]["status"] == "made"
    assert engine not in stored
    carry_out(path, again := Pretender())
    assert again.asked == [engine]


@pytest.mark.parametrize("killed", ["test_resnet.fp32", "test_resnet.fp32 on rtx-40"])
def test_what_is_begun_is_in_no_state(folder, killed):
    """With one bundle in the matrix: no other cell that ends writes the state meanwhile."""
    path = write(folder)
    text = path.read_text().replace('"fp32", "int8"', '"fp32"')
    path.write_text(text[: text.rindex("[[models]]")] + text[text.index("[[devices]]") :])
    endings, _ = carry_out(path, Pretender())
    assert set(endings) == {"test_resnet.fp32", "test_resnet.fp32 on rtx-40"}
    Bundle.open(folder / "bundles" / "test_resnet.fp32.bundle").remove_engine(*endings[killed].engines)
    with pytest.raises(KeyboardInterrupt):
        carry_out(path, Pretender({killed: KeyboardInterrupt()}))
    stored = json.loads((folder / "bundles" / "matrix.json").read_text())
    assert not {killed, "test_resnet.fp32 on rtx-40"} & set(stored)


def test_what_fails_fails_alone_and_is_tried_again(folder):
    """A refusal, a full disk, no memory, a damaged record: whatever it is."""
    path = write(folder)
    failing = {
        "test_resnet.int8": EdgeBackbonesError("made to\nfail"),
        "test_efficientnet.fp32 on rtx-40": OSError(28, "No space left on device"),
        "test_resnet.fp32 on rtx-40": MemoryError(),
    }
    endings, said = carry_out(path, Pretender(failing))
    assert endings["test_resnet.int8"].why == r"made to\nfail"
    assert endings["test_resnet.int8 on rtx-40"].why == "its bundle was not built"
    assert endings["test_efficientnet.fp32 on rtx-40"].why == "OSError: [Errno 28] No space left on device"
    assert endings["test_resnet.fp32 on rtx-40"].why == "MemoryError"
    assert len(said) == len(ALL)
    assert {name for name, ending in endings.items() if ending.status == "made"} == {
        "test_resnet.fp32", "test_efficientnet.fp32",
    }  # fmt: skip
    again = Pretender()
    endings, _ = carry_out(path, again)
    assert set(again.asked) == ALL - {"test_resnet.fp32", "test_efficientnet.fp32"}
    stored = json.loads((folder / "bundles" / "matrix.json").read_text())
    assert {ending["status"] for ending in stored.values()} == {"made", "there"}


def test_a_state_that_cannot_be_written_stops_no_cell(folder):
    path = write(folder)
    (folder / "bundles" / "matrix.json").mkdir(parents=True)
    endings, said = carry_out(path, Pretender())
    assert {ending.status for ending in endings.values()} == {"made"}
    assert any("matrix.json cannot be written (Is a directory): the next run will make again" in line for line in said)
    assert not list((folder / "bundles").glob(".matrix.json*"))


def test_the_longest_cells_start_first(folder):
    path = write(folder)
    carry_out(path, first := Pretender(seconds={"test_resnet.fp32": 9.0, "test_efficientnet.fp32": 3.0}))
    assert first.asked[0] == "test_resnet.int8"  # of those that were never timed: calibration takes longer
    (folder / "photographs" / "0.png").write_bytes((folder / "photographs" / "1.png").read_bytes())
    carry_out(path, second := Pretender())
    assert [name for name in second.asked if " on " not in name] == [
        "test_resnet.fp32", "test_efficientnet.fp32", "test_resnet.int8",
    ]  # fmt: skip


def test_an_engine_that_no_worker_can_make_waits(folder):
    path = write(folder, device='\n[[devices]]\nprofile = "jetson-orin-nano"\n')
    run = Pretender()
    endings, _ = carry_out(path, run)
    waiting = endings["test_resnet.fp32 on jetson-orin-nano"]
    assert (waiting.status, waiting.why) == ("waiting", "no worker offers sm_87")
    later = Pretender()
    endings, _ = carry_out(path, later, sm_87=1.0)
    assert set(later.asked) == {name for name in endings if name.endswith("jetson-orin-nano")}


def test_a_worker_that_goes_leaves_the_cell_waiting(folder):
    name = "test_resnet.fp32 on jetson-orin-nano"
    gone = Pretender({name: matrix_cells.NoWorkerError("no worker offers sm_87 any more")})
    path = write(folder, device='\n[[devices]]\nprofile = "jetson-orin-nano"\n')
    endings, _ = carry_out(path, gone, sm_87=1.0)
    assert (endings[name].status, endings[name].why) == ("waiting", "no worker offers sm_87 any more")
    carry_out(path, again := Pretender(), sm_87=1.0)
    assert again.asked == [name]


def test_a_model_whose_inputs_cannot_be_read_fails_alone(folder):
    path = write(folder)
    text = path.read_text().replace('precisions = ["fp32"]\n', 'precisions = ["fp32"]\nimages = "nowhere"\n')
    path.write_text(text)
    endings, _ = carry_out(path, Pretender())
    assert endings["test_efficientnet.fp32"].status == "failed"
    assert endings["test_efficientnet.fp32"].why.endswith("nowhere does not exist")
    assert endings["test_efficientnet.fp32 on rtx-40"].why == "its bundle was not built"
    assert {endings[name].status for name in endings if name.startswith("test_resnet")} == {"made"}
    (folder / "nowhere").mkdir()
    Image.new("RGB", (40, 30)).save(folder / "nowhere" / "one.png")
    endings, _ = carry_out(path, Pretender())
    assert {ending.status for ending in endings.values()} == {"made", "there"}
    # Gone for a while, as a folder on a network is: what was made of it is known when it is back.
    (folder / "nowhere").rename(folder / "away")
    assert carry_out(path, Pretender())[0]["test_efficientnet.fp32"].status == "failed"
    (folder / "away").rename(folder / "nowhere")
    assert {ending.status for ending in carry_out(path, Pretender())[0].values()} == {"there"}


def test_the_table_has_a_row_per_bundle_and_a_column_per_device(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    show(
        {
            "net.fp32": Ending(status="made", seconds=12.4),
            "net.fp32 on orin": Ending(status="waiting", why="no worker offers sm_87"),
            "net.int8": Ending(status="failed", why="too loud"),
            "net.int8 on orin": Ending(status="failed", why="its bundle was not built"),
            "vit.fp32": Ending(status="there", seconds=3.0),
        }
    )
    printed = capsys.readouterr().out
    table = [line for line in printed.splitlines() if not line.startswith(("net.", "vit."))]
    cells = [line.strip("│┃ ").replace("┃", "│").split("│") for line in table if "│" in line or "┃" in line]
    assert [[cell.strip() for cell in row] for row in cells] == [
        ["model and precision", "bundle", "orin"],
        ["net.fp32", "12 s", "waiting"],
        ["net.int8", "failed", "failed"],
        ["vit.fp32", "there"],
    ]
    assert [line for line in printed.splitlines() if line.startswith(("net.", "vit."))] == [
        "net.fp32 on orin: waiting: no worker offers sm_87",
        "net.int8: failed: too loud",
        "net.int8 on orin: failed: its bundle was not built",
    ]


def test_a_small_matrix_here(folder):
    """Real builds in processes; one model has a stage too many. The second run has nothing to do."""
    path = write(folder, more=", out_indices = [9]")
    done = subprocess.run(command(path), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    endings = json.loads(done.stdout)
    assert endings["test_efficientnet.fp32"]["status"] == "failed"
    assert "9" in endings["test_efficientnet.fp32"]["why"]
    bundle = Bundle.open(folder / "bundles" / "test_resnet.int8.bundle")
    bundle.check_files()
    assert [engine.key.flavour for engine in bundle.manifest.engines] == ["openvino", "tensorrt_rtx"]
    assert [engine.name for engine in bundle.manifest.engines] == [
        *endings["test_resnet.int8"]["engines"], *endings["test_resnet.int8 on rtx-40"]["engines"],
    ]  # fmt: skip
    write(folder, more=", out_indices = [1]")
    assert subprocess.run(command(path), cwd=ROOT, check=False, stdout=subprocess.DEVNULL).returncode == 0
    again = subprocess.run(command(path), cwd=ROOT, capture_output=True, text=True, check=True)
    assert {ending["status"] for ending in json.loads(again.stdout).values()} == {"there"}
