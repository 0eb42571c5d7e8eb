"""The command ``python -m app.keys``. Its code is in ``app/key_file.py``."""

from app.key_file import main

if __name__ == "__main__":
    main()
