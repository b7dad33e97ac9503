"""The command of `routers.serving.commands`."""

from routers.serving.commands import main
from srpo.cli import run

if __name__ == "__main__":
    run(main)
