"""`python -m ldit`."""

import sys

from ldit.cli.main import main

sys.exit(main())
