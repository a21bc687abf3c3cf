"""``python -m wlsup``: the same as the ``wlsup`` command."""

import sys

from wlsup.cli import main

sys.exit(main())
