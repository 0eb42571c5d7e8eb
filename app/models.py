"""The command ``python -m app.models``. Its code is in ``app/cli/models.py``."""

import sys

from app.cli.models import main

if __name__ == "__main__":
    sys.exit(main())
