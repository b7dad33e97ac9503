"""The command of `routers.tasks.step_routing.task`."""

from routers.tasks.step_routing.player import PhaseStopped
from routers.tasks.step_routing.task import main
from srpo.cli import run
from srpo.trainer.limits import LostRollouts

if __name__ == "__main__":
    run(main, PhaseStopped, LostRollouts)
