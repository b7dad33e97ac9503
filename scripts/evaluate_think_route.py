"""The command of `routers.tasks.think_route.evaluate`."""

from routers.tasks.think_route.evaluate import main
from srpo.cli import run

if __name__ == "__main__":
    run(main)
