"""The command of `routers.evaluation.compare_think_route`."""

from routers.evaluation.compare_think_route import main
from srpo.cli import run

if __name__ == "__main__":
    run(main)
