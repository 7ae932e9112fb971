"""The command `autoclip`; Ctrl-C during its imports ends it without a traceback."""

import sys

try:
    from autoclip_core.cli.main import main as main
except KeyboardInterrupt:
    sys.exit(130)
