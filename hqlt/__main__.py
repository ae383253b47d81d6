"""`python -m hqlt`, for launchers such as torchrun that start modules."""

import sys

from hqlt.cli import main

sys.exit(main())
