"""`python -m srpo` is `srpo`."""

from srpo.cli import main

if __name__ == "__main__":
    main()
