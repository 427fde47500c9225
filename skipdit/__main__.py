"""`python -m skipdit`: the same as the `skipdit` command."""

import sys

from .cli import main

sys.exit(main())
