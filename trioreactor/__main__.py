"""``python -m trioreactor``: see `trioreactor.cli`."""

import sys

from trioreactor.cli import main

sys.exit(main())
