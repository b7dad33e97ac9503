"""The command of `routers.serving.route`."""

from routers.serving.route import main
from srpo.cli import run

if __name__ == "__main__":
    run(main)
