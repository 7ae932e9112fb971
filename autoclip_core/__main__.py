"""Run the command line: `python -m autoclip_core` does what `autoclip` does."""

import sys

try:
    from .cli.main import main
except KeyboardInterrupt:
    sys.exit(130)

sys.exit(main())
