"""`rollout_ahead: 1`: the next generation batch is played while this one trains, one step off-policy.

    generation batch k taken -> the policy's weights copied -> batch k + 1 played in a thread, by the copy
                             -> batch k trained on                                     meanwhile

The copy never changes while it samples, so that a turn has one policy, and its samples are those of the weights before
the steps that batch k makes. The loss is told who sampled: the old log-probs are the sampler's, so that ratio and clip
correct for it (loss_type minirl, which has a weight for the sampler, gets both). `sampling/*` says how far the policy
has gone since, `rollout/ahead_wait` for how many seconds training waited all the same. The price is a second copy of
the weights and one more pass that scores.

The thread makes no collective and touches no weight of the trainer. Which rows come next is read off the data's order,
which is a function of seed and position. A checkpoint and an evaluation wait until what is under way has ended: its
calls are paid, and in the ledger that is saved (an evaluation's metrics of the environment count them too). Its
episodes are not saved: a resumed run plays that batch anew, with the weights that it resumes from, so that it is
another run than one without a break. No batch is begun once money or lost rollouts have ended the run.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch

from srpo.types import Trajectory


class Ahead:
    """The batch under way, if there is one.

    Args:
        policy: a copy of the policy, which only this uses.

    Attributes:
        waited: seconds for which the last `take` had to wait.
    """

    def __init__(self, policy: torch.nn.Module) -> None:
        self.policy = policy.requires_grad_(False).eval()
        self.waited = 0.0
        self._prompt_ids: Sequence[Any] = ()
        self._played: Future[list[Trajectory]] | None = None

    @torch.no_grad()
    def begin(self, current: torch.nn.Module, prompt_ids: Sequence[Any], play: Callable[[], list[Trajectory]]) -> None:
        """Take the weights of `current`, the policy's base model, and begin to `play`."""
        self.policy.to(next(current.parameters()).device)
        for part in ("parameters", "buffers"):
            for ours, new in zip(getattr(self.policy, part)(), getattr(current, part)(), strict=True):
                ours.copy_(new)
        self._prompt_ids = prompt_ids
        threads = ThreadPoolExecutor(1, "rollout-ahead")
        self._played = threads.submit(play)
        threads.shutdown(wait=False)

    def take(self, prompt_ids: Sequence[Any]) -> list[Trajectory] | None:
        """The episodes of these prompts, as soon as they are over; None: they are not under way.

        Raises:
            RuntimeError: other prompts are under way.
            Exception: whatever ended their play.
        """
        if self._played is None:
            return None
        began, played, self._played = time.monotonic(), self._played, None
        trajectories = played.result()
        self.waited = time.monotonic() - began
        if self._prompt_ids != prompt_ids:
            raise RuntimeError(
                "rollout_ahead: 1 has played other rows than the data loader gives next: set rollout_ahead: 0"
            )
        return trajectories

    def wait(self) -> None:
        """Until nothing is under way; how it ended is for `take`."""
        if self._played is not None:
            wait([self._played])

    def drop(self) -> None:
        """What is under way is not wanted; its loop has been closed."""
        self.wait()
        self._played = None


def old_policy_sampled(batch: dict[str, Any], mask: torch.Tensor) -> torch.Tensor:
    """Old log-probs [B, T] of a batch that was played ahead: the sampler's, wherever `mask` has a trained token."""
    return torch.where(mask.bool(), batch["sampling_per_token_logps"], batch["old_per_token_logps"])


def rows_of_batch(number: int, rows: int, prompts: int, shuffle: bool, seed: int) -> list[int]:
    """Dataset rows of the n-th generation batch of a run, over all ranks, one for each prompt: TRL's order.

    Args:
        rows: of the dataset.
        prompts: of a generation batch.
    """
    epoch, place = divmod(number, rows // prompts)
    order = torch.arange(rows)
    if shuffle:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epoch + 1):
            order = torch.randperm(rows, generator=generator)
    chosen: list[int] = order[place * prompts : (place + 1) * prompts].tolist()
    return chosen


def refuse_ahead(args: Any, adapter: bool, sharded: bool, dataset: Any) -> None:
    """ValueError for what `rollout_ahead: 1` does not work with."""
    reasons = {
        "use_vllm: true (its engine has one set of weights)": args.use_vllm,
        "an adapter (the policy is copied whole)": adapter,
        "routing_replay (experts are recorded on the policy itself)": args.routing_replay != "off",
        "ZeRO-3 or FSDP (no process has the weights to sample with)": sharded,
        "a dataset without a length (which rows come next is not known)": not hasattr(dataset, "__len__"),
    }
    for what, found in reasons.items():
        if found:
            raise ValueError(f"rollout_ahead: 1 does not work with {what}; set rollout_ahead: 0")
