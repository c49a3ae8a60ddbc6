"""Test that the command for an extra names what this package was installed from."""

from __future__ import annotations

import importlib.metadata
import json

import pytest

from edge_backbones import installation
from edge_backbones.errors import MissingDependencyError
from edge_backbones.installation import pip_install


class Installed:
    def __init__(self, text):
        self.text = text

    def read_text(self, name):
        assert name == "direct_url.json"
        return self.text


@pytest.fixture
def installed_from(monkeypatch):
    def installed(record):
        text = record if record is None or isinstance(record, str) else json.dumps(record)
        monkeypatch.setattr(importlib.metadata, "distribution", lambda _: Installed(text))
        installation._origin.cache_clear()

    yield installed
    monkeypatch.undo()
    installation._origin.cache_clear()


@pytest.mark.parametrize(
    ("record", "command"),
    [
        (None, "pip install 'edge-backbones[cpu]'"),
        ("no JSON", "pip install 'edge-backbones[cpu]'"),
        ("[1]", "pip install 'edge-backbones[cpu]'"),
        ({}, "pip install 'edge-backbones[cpu]'"),
        (
            {"url": "file:///home/me/edge_backbones-0.1.0-py3-none-any.whl", "archive_info": {}},
            "pip install '/home/me/edge_backbones-0.1.0-py3-none-any.whl[cpu]'",
        ),
        (
            {"url": "file:///home/my%20robots/it%27s.whl", "archive_info": {}},
            """pip install '/home/my robots/it'"'"'s.whl[cpu]'""",
        ),
        ({"url": "file:///src/clone", "dir_info": {}}, "pip install '/src/clone[cpu]'"),
        ({"url": "file:///src/clone", "dir_info": {"editable": True}}, "pip install --editable '/src/clone[cpu]'"),
        (
            {"url": "https://example.org/e.whl", "archive_info": {}},
            "pip install 'edge-backbones[cpu] @ https://example.org/e.whl'",
        ),
        (
            {"url": "https://example.org/e.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
            "pip install 'edge-backbones[cpu] @ git+https://example.org/e.git@abc'",
        ),
    ],
)
def test_the_command_names_where_the_package_came_from(installed_from, record, command):
    installed_from(record)
    assert pip_install("cpu") == command
    assert str(MissingDependencyError("this", "cpu")).endswith(f"needs the 'cpu' extra: {command}")
    assert pip_install("cpu", "ENV/bin/pip") == command.replace("pip", "ENV/bin/pip", 1)


def test_a_package_that_was_not_installed_by_pip_is_called_by_its_name(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    installation._origin.cache_clear()
    assert pip_install("cpu") == "pip install 'edge-backbones[cpu]'"
    installation._origin.cache_clear()
