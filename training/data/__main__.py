"""The command ``python -m training.data``: download the public data sets."""

from training.data.datasets import main

if __name__ == "__main__":
    main()
