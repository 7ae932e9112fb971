"""`python -m autoclip_core` is the command line."""

import sys

from .cli.main import main

sys.exit(main())
