"""How a generation batch is cut into micro-batches changes neither the loss nor the step that is taken."""

import pytest
from core_helpers import config, distance, logged, model, trainer, weights

SPLITS = ((16, 1), (8, 2), (4, 4))
CASES = {
    "srpo": {"objective": "srpo"},
    "srpo_sequence_mean": {"objective": "srpo", "distillation_aggregation": "sequence_mean"},
    "sdpo": {"objective": "sdpo"},
    "sdpo_sequence_mean": {"objective": "sdpo", "distillation_aggregation": "sequence_mean"},
    "sampled_token": {"objective": "srpo", "distillation_mode": "sampled_token", "distillation_alpha": 1.0},
    "truncated_rows_masked": {"objective": "srpo", "mask_truncated_completions": True},
}


@pytest.mark.parametrize("case", CASES)
def test_two_steps_do_not_depend_on_the_micro_batches(tmp_path, case):
    runs = []
    for rows, accumulation in SPLITS:
        args = config(
            tmp_path,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
            learning_rate=1.0,
            **CASES[case],
        )
        made = trainer(args)
        made.train()
        assert all(0 < share < 1 for share in logged(made, "srpo/distilled_share")), "both branches must be present"
        runs.append(made)
    ends = [weights(made.model) for made in runs]
    moved = distance(ends[0], weights(model()))
    assert moved > 1e-3
    for made, end in zip(runs[1:], ends[1:], strict=True):
        assert distance(ends[0], end) <= 1e-5 * moved
        for name in ("loss", "grad_norm", "loss/sdpo", "srpo/gradient_share", "srpo/weight_ess"):
            assert logged(made, name) == pytest.approx(logged(runs[0], name), rel=1e-5, abs=1e-7), name
