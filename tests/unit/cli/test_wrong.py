"""Wrong command lines: the message names the option, the bound and the value, and with --json it is a document."""

from __future__ import annotations

import json

import pytest

from edge_backbones.cli import main as cli


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("run x y --threads 0", "--threads must be at least 1, got 0"),
        ("run x y -t 0", "--threads must be at least 1, got 0"),
        ("build a b --num-channels 0", "--num-channels must be at least 1, got 0"),
        ("compile b --level 9", "--level must be at most 5, got 9"),
        ("compile b --workspace q", "--workspace takes a whole number, got 'q'"),
        ("build a b --percentile q", "--percentile takes a number, got 'q'"),
        ("run x y --gpu 0", "there is no option --gpu: type --device cuda, or --device cuda:0"),
        ("run x y --cpu", "there is no option --cpu: type --device cpu"),
        ("run x y --device gpu", "A GPU is called cuda: --device cuda"),
        ("run x y --device gpu:1", "A GPU is called cuda: --device cuda:1"),
        ("run x y --device 1", "A GPU is called cuda: --device cuda:1"),
        ("build a b --gpu 0", "No such option: --gpu"),
        ("run", "Missing argument"),
        ("biuld", "Did you mean 'build'?"),
    ],
)
def test_a_wrong_command_line_is_told_in_the_words_of_its_option(arguments, said, capsys):
    assert cli._run(arguments.split()) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert said in " ".join(told.err.split())
    assert "Input should" not in told.err
    assert cli._run([*arguments.split(), "--json"]) == 2
    told = capsys.readouterr()
    assert told.err == ""
    document = json.loads(told.out)
    assert document.keys() == {"error", "message"}
    assert document["error"] == "UsageError"
    assert said in document["message"]


def test_another_word_for_a_device_gets_no_advice_about_gpus(capsys):
    assert cli._run(["run", "x", "y", "--device", "tpu"]) == 2
    assert "A GPU is called" not in capsys.readouterr().err
