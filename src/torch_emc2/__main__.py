"""``python -m torch_emc2`` is the command ``emc2``."""

import sys

from torch_emc2.cli import main

sys.exit(main())
