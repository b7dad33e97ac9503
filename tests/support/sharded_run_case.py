"""A whole run of query routing on an engine: torchrun --nproc_per_node 2 sharded_run_case.py ENGINE WORDS..."""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [*(str(TESTS / folder) for folder in ("support", "srpo", "routers")), str(TESTS.parent)]


def main(engine: str, words: list[str]) -> None:
    from sharded_weights_cases import engine_settings

    for name, value in engine_settings(engine).items():
        path = Path(tempfile.mkdtemp(), "engine.json")
        path.write_text(json.dumps(value))
        words += [f"--{name}", str(path)]
    from srpo.cli import run
    from srpo.train import main as train

    run(lambda: train(words))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
