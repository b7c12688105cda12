"""``python -m detection`` is ``deqdet``."""

import sys

from detection.cli import main

sys.exit(main())
