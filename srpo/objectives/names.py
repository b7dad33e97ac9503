"""What the settings of an objective may be called; read without torch, by the command line's help."""

OBJECTIVE_NAMES = {
    "grpo": "arXiv:2402.03300",
    "sdpo": "arXiv:2601.20802",
    "srpo": "arXiv:2604.02288",
    "bopo": "arXiv:2602.21227",
}
"""`objective:` -> its paper. Each is a file of this folder with a record `OBJECTIVE`."""
LOSS_TYPES = {"minirl": "arXiv:2512.01374"}
"""The same for `loss_type:` of objective grpo, beside TRL's own."""

BASELINES = ("refmax", "refgroup", "refmean", "refsmall", "none")
"""`advantage_baseline:` (srpo/objectives/advantages.py)."""
SCALES = ("group+ref", "group", "none")
"""`advantage_scale:`."""
