"""The command of `routers.quickstart.serve_smollm2`."""

from routers.quickstart.serve_smollm2 import main

if __name__ == "__main__":
    main()
