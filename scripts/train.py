"""`accelerate launch scripts/train.py --config RECIPE`: the same as `srpo train RECIPE`."""

from srpo.cli import run
from srpo.train import main

if __name__ == "__main__":
    run(main)
