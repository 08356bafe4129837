"""`python -m registry.cli`, the same as `registry`."""

from registry.cli import main

if __name__ == "__main__":
    main()
