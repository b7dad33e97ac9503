"""The command of `routers.tasks.query_routing.evaluate`."""

from routers.tasks.query_routing.evaluate import main
from srpo.cli import run

if __name__ == "__main__":
    run(main)
