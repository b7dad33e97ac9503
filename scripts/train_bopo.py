"""The command of `routers.tasks.step_routing.task`."""

from routers.tasks.step_routing.task import main
from srpo.cli import run

if __name__ == "__main__":
    run(main)
