"""The command of `routers.tasks.think_route.task`."""

from routers.tasks.think_route.task import main
from srpo.cli import run
from srpo.trainer.limits import LostRollouts

if __name__ == "__main__":
    run(main, LostRollouts)
