"""Run the command line from a checkout: ``python cli.py factorize ...``. Installed, it is ``surgery``."""

from surgery.cli.main import main

if __name__ == "__main__":
    main()
