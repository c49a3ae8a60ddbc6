"""``python -m edge_backbones``: the command line, and the folders of the C++ library for build systems."""

import sys

from edge_backbones.for_cpp import folder_for

folder = folder_for(sys.argv[1:])
if folder is not None:
    sys.stdout.write(f"{folder}\n")
else:
    from edge_backbones.cli.main import main

    main()
