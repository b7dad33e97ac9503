"""The trainer by the names of its objectives."""

from srpo.trainer.trainer import SRPOTrainer


class GRPOTrainer(SRPOTrainer):
    """[`SRPOTrainer`] with `objective="grpo"`: TRL's GRPO, any loss type, with this library's world and records."""

    _objective = "grpo"


class SDPOTrainer(SRPOTrainer):
    """[`SRPOTrainer`] with `objective="sdpo"`: every completion with teacher information is distilled."""

    _objective = "sdpo"


class BoPOTrainer(SRPOTrainer):
    """[`SRPOTrainer`] with `objective="bopo"`: advantages beside two reference policies, every trajectory alike."""

    _objective = "bopo"
