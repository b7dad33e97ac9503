"""The command of `routers.tasks.step_routing.evaluate`."""

from routers.tasks.step_routing.evaluate import main
from srpo.cli import run

if __name__ == "__main__":
    run(main)
