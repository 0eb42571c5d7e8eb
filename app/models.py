"""The command ``python -m app.models``, and ``quartet models``. Its code is in ``app/cli/models.py``."""

import os
import sys

if __name__ == "__main__":
    if sys.argv[1:2] in (["add"], ["import"]):  # they read files from others, which may exhaust the memory
        from app.importing.limits import run_limited

        sys.exit(run_limited(sys.argv[1:]))
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "1")  # the search for plugins takes 5 % of the time of `list`
    from app.cli.models import main

    sys.exit(main())
