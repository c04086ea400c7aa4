"""`python -m jaxqat.cli`."""

import sys

from jaxqat.cli import main

sys.exit(main())
