"""The command ``quartet predict``; see ``training.prediction``."""

from training.prediction import main

if __name__ == "__main__":
    main()
