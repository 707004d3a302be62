"""`python -m cytosyn_aug`: the command line where no script is installed."""

import sys

from cytosyn_aug.cli.main import main

sys.exit(main())
