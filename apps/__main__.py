"""``python -m apps``: the same command line as ``thalweg``, from a checkout."""

from thalweg.apps.cli import main

if __name__ == "__main__":
    main()
