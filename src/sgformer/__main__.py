"""`python -m sgformer`."""

import sys

from sgformer.cli import main

sys.exit(main())
