"""`accelerate launch scripts/evaluate.py MODEL --output_dir FOLDER`: the same as `srpo evaluate`."""

import sys

from srpo.cli import run
from srpo.evaluate import main

if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
