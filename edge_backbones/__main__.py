"""``python -m edge_backbones``: the command line."""

from edge_backbones.cli.main import main

main()
