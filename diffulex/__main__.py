"""`python -m diffulex`: the demo, the report of one model, and the state of this installation."""

import sys

from .cli.main import main

sys.exit(main())
