"""The encoder policy: a categorical distribution over the members of a pool, and abstaining, given a query.

    e  = W' tfidf(q), MiniLM's and softmax(F e + f), where they help       embedding of the query           [width]
    s_m = w_m e + b_m      c_m = max(0, v_m e + d_m)                       foretold score and cost of member m
    f_m = (s_m and c_m at the landmarks, likeness of its descriptor to them, prices)         features of m  [features]
    z_m = a (s_m - b lambda c_m) + e' U f_m + u f_m                        pi(m | q, lambda) = softmax(z)
    z_0 = a r_0 + u_0 e + a_0                                              of abstaining, where it has a reward r_0

W is a truncated SVD of the training queries' TF-IDF; F, f guess a query's family by a logistic regression on its
first directions, for what members do depends on it more sharply than a linear model tells. A member's *capability* w,
b, v, d are ridge regressions of its scores and costs (over the mean cost of the dearest member) on e; from a log, of
those that it tells (`routers.baselines.critic`). Landmarks are some training queries. Trained are U, u and the
sharpnesses a, b > 0 (and u_0, a_0): none belongs to a member, so that a new one needs its features only. As c_m >= 0
is all that lambda touches, the expected c_m under pi never rises with lambda.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.utils.extmath import randomized_svd
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from routers.baselines.critic import Critic
from routers.baselines.features import DIRECTIONS, rarity, seen_in
from routers.baselines.features import embedded as minilm
from routers.data.catalogue import Member
from routers.data.table import spread
from routers.tasks.query_routing.encoder.features import WIDTH, counted, ridge, tfidf

if TYPE_CHECKING:
    from routers.evaluation.off_policy import Logged

MOST_TEXTS = 4000
"""Texts that the embedding is fitted to, spread evenly."""
MINILM_WIDTH = 384
WIDTHS = (256, 768)
"""Directions of the queries' n-grams, to choose from."""


class EncoderConfig(PretrainedConfig):
    """Shapes, and the names of the members whose capabilities are rows of the model's buffers."""

    model_type = "srpo_encoder"

    def __init__(
        self,
        members: Sequence[str] = (),
        width: int = WIDTHS[0],
        landmarks: int = 32,
        minilm: bool = False,
        abstain_reward: float | None = None,
        cost_scale: float = 1.0,
        families: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.families = families
        self.members, self.width, self.landmarks, self.minilm = list(members), width, landmarks, minilm
        self.abstain_reward, self.cost_scale = abstain_reward, cost_scale


class EncoderPolicy(PreTrainedModel):
    """See above. Buffers are what is fitted in closed form, parameters what is trained."""

    config_class = EncoderConfig
    config: EncoderConfig

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        members = len(config.members)
        size = config.width + MINILM_WIDTH * config.minilm + config.families
        features = 3 * config.landmarks + 2
        shapes = {
            "words": (2 * WIDTH, config.width),
            "idf": (2 * WIDTH,),
            "landmarks": (config.landmarks, size),
            "capability": (2, members, size + 1),  # of score and cost; the bias last
            "features": (members, features),
            "feature_moments": (2, features),
        }
        if config.families:
            shapes["family"] = (config.families, WIDTHS[0] + 1)  # the bias last
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape))
        self.interaction = nn.Parameter(torch.empty(size, features))
        self.preference = nn.Parameter(torch.empty(features))
        self.sharpness = nn.Parameter(torch.empty(2))
        self.abstain = nn.Parameter(torch.empty(size + 1)) if config.abstain_reward is not None else None
        self.forget()
        self.post_init()

    @torch.no_grad()
    def forget(self) -> None:
        """Set what is trained to its beginning: the policy is softmax(foretold reward / 0.1)."""
        for parameter in self.parameters():
            parameter.zero_()
        self.sharpness[0] = math.log(10.0)

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: all parameters begin at what the constructor says."""

    def fit_embedding(self, texts: Sequence[str], seed: int) -> None:
        """Fit what texts are embedded by, without any outcome."""
        some = [texts[i] for i in spread(len(texts), min(len(texts), MOST_TEXTS))]
        parts = counted(some)
        idf = rarity(seen_in(parts), len(some))
        rank = min(self.config.width, len(some) - 1)
        _, _, vt = randomized_svd(tfidf(parts, idf), rank, n_iter=2, random_state=seed)
        self.idf.copy_(torch.from_numpy(idf))
        self.words.zero_()[:, :rank] = torch.from_numpy(np.ascontiguousarray(vt.T))

    @property
    def reads(self) -> str:
        """What queries are embedded by, in words for a table."""
        more = {"MiniLM": self.config.minilm, f"{self.config.families} guessed families": self.config.families}
        return " and ".join(
            [f"{self.config.width} directions of n-grams", *(name for name, has in more.items() if has)]
        )

    def embed(self, texts: Sequence[str]) -> Tensor:
        """``[texts, width]``."""
        found = tfidf(counted(texts), self.idf.numpy())
        places, starts = (torch.from_numpy(part.astype(np.int64)) for part in (found.indices, found.indptr[:-1]))
        embedded = nn.functional.embedding_bag(
            places, self.words, starts, mode="sum", per_sample_weights=torch.from_numpy(found.data)
        )
        parts = [embedded]
        if self.config.minilm:
            parts.append(torch.from_numpy(minilm(tuple(texts))))
        if self.config.families:
            parts.append(_linear(embedded[:, : WIDTHS[0]], self.family).softmax(dim=1))
        return torch.cat(parts, dim=1)

    def describe_members(self, members: Sequence[Member], embedded: Tensor, capability: Tensor) -> None:
        """Set the capabilities of all members, and features by them.

        Args:
            members: in the order of the configuration.
            embedded: ``[rows, width]``, of training queries.
            capability: ``[2, members, width + 1]``.
        """
        self.landmarks.copy_(embedded[spread(len(embedded), len(self.landmarks))])
        self.capability.copy_(capability)
        features = self.described(members, capability)
        self.features.copy_(features)
        spread_of = features.std(dim=0, correction=0).clamp(min=0.05)
        self.feature_moments.copy_(torch.stack([features.mean(dim=0), spread_of]))

    def described(self, members: Sequence[Member], capability: Tensor) -> Tensor:
        """Features ``[members, features]`` of members whose capabilities ``[2, members, width + 1]`` are known."""
        at_landmarks = _linear(self.landmarks, capability)
        alike = self.embed([member.descriptor for member in members]) @ self.landmarks.T
        prices = [[math.log10((price or 0.0) + 1e-3) for price in (m.price_in, m.price_out)] for m in members]
        return torch.cat([at_landmarks[0].T, at_landmarks[1].T, alike, torch.tensor(prices)], dim=1)

    def foretold(self, embedded: Tensor) -> Tensor:
        """Score and cost of every member by their capabilities, ``[2, rows, members]``."""
        return _linear(embedded, self.capability)

    def forward(
        self,
        embedded: Tensor,
        cost_weight: Tensor,
        foretold: Tensor | None = None,
        allowed: Tensor | None = None,
    ) -> Tensor:
        """Log-probabilities ``[rows, members]``, and of abstaining in a last column where it has a reward.

        Args:
            embedded: ``[rows, width]``.
            cost_weight: ``[rows]``, lambda.
            foretold: ``[2, rows, members]``: in training, what the other rows foretell of each; None: `foretold`.
            allowed: ``[members]`` or ``[rows, members]`` bool; None: all.
        """
        score, cost = self.foretold(embedded) if foretold is None else foretold
        own, priced = self.sharpness.exp()
        mean, deviation = self.feature_moments
        features = ((self.features - mean) / deviation).clamp(-3, 3)
        logits = own * (score - priced * cost_weight[:, None] * cost.clamp(min=0))
        logits = logits + embedded @ (self.interaction @ features.T) + features @ self.preference
        if allowed is not None:
            logits = logits.masked_fill(~allowed, -torch.inf)
        if self.abstain is not None:
            none = own * self.config.abstain_reward + embedded @ self.abstain[:-1] + self.abstain[-1]
            logits = torch.cat([logits, none[:, None]], dim=1)
        return logits.log_softmax(dim=1)


def capabilities(embedded: Tensor, outcomes: Tensor) -> tuple[Tensor, Tensor]:
    """Ridge regressions of outcomes ``[2, rows, members]``: ``[2, members, width + 1]``, and what is left out.

    How hard a query is and who is better at it are regressed apart, since the latter alone decides, and is smaller.
    """
    parts = [values for part in outcomes.double().numpy() for values in _common_and_own(part)]
    fitted = ridge(embedded.double().numpy(), *parts)
    found = [[a + b for a, b in zip(*fitted[i : i + 2], strict=True)] for i in (0, 2)]
    weights = [np.concatenate([weight, bias[:, None]], axis=1) for weight, bias, _ in found]
    capability, left_out = (np.stack(parts) for parts in (weights, [part for *_, part in found]))
    return torch.from_numpy(capability).float(), torch.from_numpy(left_out).float()


def capabilities_of_log(embedded: Tensor, logged: Logged) -> tuple[Tensor, Tensor]:
    """The same from the outcomes of who was asked alone: `Critic`s on the leading directions of the embedding."""
    rows = embedded.double().numpy()
    directions = np.linalg.svd(rows, full_matrices=False)[2][:DIRECTIONS]
    directions = directions / np.linalg.norm(rows @ directions.T, axis=1).mean()
    x, found = np.hstack([rows @ directions.T, np.ones((len(rows), 1))]), []
    for seen in (logged.score, logged.costs):
        critic = Critic(x, logged.chosen, seen, len(logged.members))
        weights = np.hstack([critic.theta[:, :-1] @ directions, critic.theta[:, -1:]])
        found.append((weights, critic.left_out(x, logged.chosen, seen)))
    capability, left_out = (torch.from_numpy(np.stack(parts)).float() for parts in zip(*found, strict=True))
    return capability, left_out


def _common_and_own(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    common = values.mean(axis=1, keepdims=True)
    return common, values - common


def _linear(embedded: Tensor, capability: Tensor) -> Tensor:
    return embedded @ capability[..., :-1].mT + capability[..., None, :, -1]
