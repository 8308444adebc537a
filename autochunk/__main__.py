"""``python -m autochunk``: see ``autochunk.cli``."""

import sys

from autochunk.cli import main

sys.exit(main())
