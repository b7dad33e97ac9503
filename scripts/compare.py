"""The command of `routers.evaluation.compare`."""

from routers.evaluation.compare import main
from srpo.cli import run

if __name__ == "__main__":
    run(main)
