"""What the help of the command line says beside the options: the panels of commands, the exit codes, and how texts are shown.

Texts of options serve Python's ``help()`` too, so they are plain: names in ``backticks``, examples between two stars.
"""

from __future__ import annotations

import inspect
import re

from rich.markup import escape

PANELS: dict[str, dict[str, str]] = {
    "Build": {
        "stages": "List the stages of a network that a bundle may keep.",
        "build": "Build a bundle from a model of timm or transformers.",
    },
    "Deploy": {
        "compile": "Compile engines for a bundle, usually on the device that will run them.",
        "verify": "Check a bundle's signature and files, and measure its engines again.",
        "pack": "Write a small bundle with only what one device needs.",
        "export-triton": "Write a model repository for a Triton server.",
        "export-deepstream": "Write what DeepStream's nvinfer needs to run a TensorRT plan of a bundle.",
        "sign": "Sign a bundle.",
        "remove": "Remove engines from a bundle.",
    },
    "Use": {
        "run": "Compute the feature maps of photographs, of a video or of a camera.",
        "bench": "Time an engine beside torch, ONNX Runtime and others.",
    },
    "Look": {
        "inspect": "Show what is in a bundle, and which of its engines run here.",
        "report": "Write an HTML page about a bundle.",
        "doctor": "Say what this machine can build and run, and what to do about the rest.",
        "profiles": "List the devices that engines are compiled for.",
    },
}
"""One line about each command, by panel, in the order of ``edge-backbones --help``, which imports no command for them."""

EXIT_CODES = (
    "Exit codes: 0 done. 1 refused: a file, a model, a device or a library is not as it has to be; one line says why. 2 "
    "wrong usage: an option or its value, whatever it is used on. 3 a feature map is outside its parity gate. 4 slower than "
    "stored results. 130 interrupted."
)
"""The one rule of exit codes, as the help shows it."""

START = (
    "Vision backbones as verified bundles of compiled engines, behind the transformers backbone API.\n\n"
    "Start here:\n\n"
    "`edge-backbones build resnet50 resnet50.bundle --images photos/`\n\n"
    "`edge-backbones run resnet50.bundle photo.jpg`\n\n"
    "`edge-backbones COMMAND --help` explains a command, `--install-completion` lets the Tab key complete it."
)
"""What ``edge-backbones --help`` says above the commands."""

_MARKED = re.compile(r"\*\*(.+?)\*\*|`(.+?)`", re.DOTALL)


def panel_of(name: str) -> str | None:
    """Return the panel of a command; None for one that has none."""
    return next((panel for panel, commands in PANELS.items() if name in commands), None)


def marked(text: str) -> str:
    """Return a plain text as rich's markup: brackets stay as they are, what is between stars or backticks becomes bold.

    Lines of a paragraph are joined, because a terminal has its own width.
    """
    paragraphs = [" ".join(paragraph.split()) for paragraph in inspect.cleandoc(text).split("\n\n")]
    return _MARKED.sub(r"[bold]\1\2[/bold]", escape("\n\n".join(paragraphs)))
