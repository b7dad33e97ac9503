"""The command of `routers.quickstart.record`."""

from routers.quickstart.record import main
from srpo.cli import run as run_script

if __name__ == "__main__":
    run_script(main)
