"""RL post-training of routing policies: GRPO, SDPO, SRPO and BoPO in one trainer core on TRL.

The trainer classes are imported on first use, so that the pure parts (`srpo.objectives`, `srpo.types`) stay light.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from srpo.versions import warn_outside

__version__ = "0.2.0"

TRL_SERIES = "1.16"
"""The one TRL minor version whose hooks the trainer core overrides (see tests/srpo/test_trl_hooks.py)."""

_LAZY = {
    "SRPOConfig": "srpo.config",
    "SRPOTrainer": "srpo.trainer.trainer",
    "SDPOTrainer": "srpo.trainer.named",
    "GRPOTrainer": "srpo.trainer.named",
    "BoPOTrainer": "srpo.trainer.named",
}

__all__ = ["TRL_SERIES", "BoPOTrainer", "GRPOTrainer", "SDPOTrainer", "SRPOConfig", "SRPOTrainer", "__version__"]


def _check_trl() -> None:
    try:
        found = version("trl")
    except PackageNotFoundError:
        found = "none"
    if found.split(".")[:2] != TRL_SERIES.split("."):
        raise ImportError(
            f"srpo {__version__} works with trl {TRL_SERIES}.x, found {found}: pip install 'trl=={TRL_SERIES}.*'"
        )


_check_trl()
warn_outside(__version__)


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'srpo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
