"""``python -m hpcml.cli`` is ``hpcml``."""

import sys

from . import main

sys.exit(main())
