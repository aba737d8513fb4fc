"""``python -m hpcml`` is ``hpcml``."""

import sys

from .cli import main

sys.exit(main())
