"""The command ``python -m app.keys``, and ``quartet keys``. Its code is in ``app/cli/keys.py``."""

from app.cli.keys import main

if __name__ == "__main__":
    main()
