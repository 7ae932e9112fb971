"""Run the command line: `python -m autoclip_core` does what `autoclip` does."""

import sys

from .cli.main import main

sys.exit(main())
