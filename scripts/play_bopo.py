"""The command of `routers.tasks.step_routing.play`."""

from routers.tasks.step_routing.play import main
from srpo.cli import run

if __name__ == "__main__":
    run(main)
