"""The encoder policy: gradients by hand for every objective, new and dropped members, abstaining, saving, loading."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from routers.data.catalogue import Member
from routers.evaluation.episodes import Episodes, Outcomes, RewardRule
from routers.router import load_router
from routers.tasks.query_routing.encoder.features import STRENGTHS, guessed, ridge
from routers.tasks.query_routing.encoder.model import WIDTHS
from routers.tasks.query_routing.encoder.training import (
    EncoderTraining,
    Rows,
    earned,
    fit,
    group_loss,
    step_loss,
    train_encoder,
)
from routers.tasks.query_routing.evaluate import ABSTAIN, OUT_OF_DOMAIN, guarded, with_abstaining

REWARD = torch.tensor([[1.0, 0.8, 0.0], [-0.1, 0.9, -0.2]], dtype=torch.float64)
DRAWN = torch.tensor([[0, 2, 2, 1], [0, 2, 0, 2]])
LOGITS = torch.tensor([[0.3, -0.2, 0.1], [0.0, 0.4, -0.5]], dtype=torch.float64)
TOLD = torch.tensor([[0.0, 0.5, 0.1], [0.2, 0.1, -0.3]], dtype=torch.float64).log_softmax(dim=1)


def gradient(how: EncoderTraining) -> np.ndarray:
    """Of the loss of `DRAWN` by the logits of 2 queries x 3 members."""
    how = replace(how, num_generations=4)
    logits = LOGITS.clone().requires_grad_()
    references = REWARD[:, [2, 0]]  # the last member is the cheapest, the first the dearest
    group_loss(logits.log_softmax(dim=1), TOLD, DRAWN, REWARD, references, how).backward()
    assert logits.grad is not None
    return logits.grad.numpy()


def policy_gradient(advantages: np.ndarray, rewarded: np.ndarray) -> np.ndarray:
    """- sum over drawn a of A (1[a] - pi) / 8, by query."""
    p, found = LOGITS.softmax(dim=1).numpy(), np.zeros((2, 3))
    for q in range(2):
        for g in range(4):
            if rewarded[q, g]:
                found[q] -= advantages[q, g] * (np.eye(3)[DRAWN[q, g]] - p[q]) / 8
    return found


R = REWARD.gather(1, DRAWN).numpy()
ALL = np.ones((2, 4), dtype=bool)


def test_the_gradient_of_grpo_is_its_formula() -> None:
    expected = policy_gradient(R - R.mean(axis=1, keepdims=True), ALL)
    np.testing.assert_allclose(gradient(EncoderTraining("grpo")), expected, atol=1e-12)
    scaled = (R - R.mean(axis=1, keepdims=True)) / (R.std(axis=1, ddof=1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(
        gradient(EncoderTraining("grpo", scale_rewards="group")), policy_gradient(scaled, ALL), atol=1e-12
    )


def test_the_gradient_of_bopo_is_its_formula() -> None:
    best = np.array([[1.0], [-0.1]])  # of mean, cheapest and dearest
    np.testing.assert_allclose(gradient(EncoderTraining("bopo")), policy_gradient(R - best, ALL), atol=1e-12)


def test_the_gradient_of_srpo_is_its_formula() -> None:
    """In the first group the third member fails and two are right; in the second all fail, so that reward counts."""
    how = EncoderTraining("srpo", distillation_alpha=0.0)
    failed = R < 0.5
    distilled = failed & ~failed.all(axis=1, keepdims=True)
    expected = policy_gradient(R - R.mean(axis=1, keepdims=True), ~distilled)
    p, t = LOGITS.softmax(dim=1).numpy()[0], TOLD.exp().numpy()[0]
    told = np.array([t[0], t[1], 0.0]) / (t[0] + t[1])  # the failed member is masked
    expected[0] += 2 * (p - told) / 8  # of KL(told || pi); both distilled draws have one entropy, hence weight 1
    np.testing.assert_allclose(gradient(how), expected, atol=1e-12)
    np.testing.assert_allclose(gradient(replace(how, objective="sdpo"))[1], np.zeros(3), atol=1e-12)


def tiny(abstain: float | None = None, **how: object) -> tuple[object, Outcomes, RewardRule]:
    """Sums go to a cheap calculator, the rest to a dear model; a third member is cheap and useless."""
    rng = np.random.default_rng(0)
    texts = [f"sum of {i} and {i + 3}" if i % 2 else f"who was king number {i} of the land" for i in range(60)]
    score = np.array([[i % 2, (i + 1) % 2, 0.0] for i in range(60)], dtype=float)
    usd = np.tile([0.001, 0.01, 0.0005], (60, 1)) * rng.uniform(0.9, 1.1, (60, 1))
    rule = RewardRule(0.01)
    items = [{"query_id": str(i), "query": text} for i, text in enumerate(texts)]
    known = Outcomes(items, ["calc", "large", "bad"], score, usd, rule(score, usd), rule=rule)
    catalogue = {
        "calc": Member("calc", "a calculator for sums", 0.1, 0.1),
        "large": Member("large", "a large model that knows kings", 3.0, 9.0),
        "bad": Member("bad", "a small model", 0.05, 0.05),
    }
    options = {"max_steps": 40, "queries": 32, **how}
    made = train_encoder(
        known, rule, catalogue=catalogue, cost_weights=(0.2, 0.0, 1.0), abstain_reward=abstain, **options
    )
    return made, known, rule


@pytest.mark.parametrize("objective", ["expected", "grpo", "sdpo", "srpo", "bopo"])
def test_every_objective_learns_whom_to_ask(objective: str) -> None:
    """Where nothing is foretold, so that all is learned by trying."""
    router, known, rule = tiny(max_steps=1)
    outcomes = torch.stack([torch.tensor(known.score), torch.tensor(known.usd / rule.cost_scale)]).float()
    embedded = router.model.embed([item["query"] for item in known.items])
    rows, how = (
        Rows(embedded, outcomes, torch.zeros(2, 60, 3)),
        EncoderTraining(objective, queries=32, learning_rate=0.02),
    )
    before = earned(router.model, rows, [0.2]).mean()
    fit(router.model, rows, how, [0.2], torch.Generator().manual_seed(0), 60)
    assert before < 0.7 and earned(router.model, rows, [0.2]).mean() > 0.8  # the best possible is .89


def test_the_expected_reward_is_exact_and_has_its_own_gradient() -> None:
    router, _, _ = tiny(max_steps=1)
    embedded = router.model.embed(["sum of 1 and 2", "who was king"]).double()
    model = router.model.double()
    outcomes = torch.stack([torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), torch.tensor([[0.1, 1.0, 0.05]] * 2)])
    batch, weight = (
        Rows(embedded, outcomes.double(), model.foretold(embedded)),
        torch.full((2,), 0.2, dtype=torch.float64),
    )
    logp = model(embedded, weight)
    loss = step_loss(
        model, model, batch, weight, torch.ones(3, dtype=torch.bool), EncoderTraining(), torch.Generator()
    )
    reward = batch.outcomes[0] - 0.2 * batch.outcomes[1]
    assert loss.item() == pytest.approx(-(logp.exp() * reward).sum(dim=1).mean().item(), abs=1e-12)
    [found] = torch.autograd.grad(loss, [model.preference])
    p, mean = logp.exp(), (logp.exp() * reward).sum(dim=1, keepdim=True)
    by_logit = -(p * (reward - mean)) / 2
    mean_f, std = model.feature_moments
    features = ((model.features - mean_f) / std).clamp(-3, 3)
    torch.testing.assert_close(found, (by_logit @ features).sum(dim=0), atol=1e-10, rtol=0)


@pytest.mark.parametrize(("rows", "width"), [(12, 3), (6, 9)])  # by the Gram matrix, and by the SVD
def test_what_the_other_rows_foretell_is_a_ridge_regression_without_the_row(rows: int, width: int) -> None:
    rng = np.random.default_rng(0)
    x, values = rng.normal(size=(rows, width)), rng.normal(size=(rows, 2))
    [(weights, bias, found)] = ridge(x, values)
    centred = x - x.mean(axis=0)

    def solved(strength: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.asarray(np.linalg.solve(x.T @ x + strength * np.eye(width), x.T @ (y - y.mean(axis=0))))

    [strength] = [s for s in STRENGTHS if np.allclose(solved(s, centred, values), weights.T)]
    assert bias == pytest.approx(values.mean(axis=0) - weights @ x.mean(axis=0))
    for row in range(rows):  # the mean of the rest is its own, too
        keep = np.arange(rows) != row
        own = x[keep] - x[keep].mean(axis=0)
        told = values[keep].mean(axis=0) + (x[row] - x[keep].mean(axis=0)) @ solved(strength, own, values[keep])
        assert found[row] == pytest.approx(told)


@pytest.mark.parametrize("telling", [True, False])
def test_minilm_is_read_where_it_earns_more(telling: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random words say nothing; an embedding does, or is noise."""
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{n}" for n in rng.integers(0, 500, 5)) for _ in range(60)]
    kind = {text: i % 2 for i, text in enumerate(texts)}
    axes = rng.normal(size=(2, 384)) / 384**0.5

    def embedded(some: tuple[str, ...]) -> np.ndarray:
        noise = rng.normal(size=(len(some), 384)) / 384**0.5
        return np.float32([axes[kind.get(text, 0)] for text in some] if telling else noise)

    monkeypatch.setattr("routers.tasks.query_routing.encoder.model.minilm", embedded)
    monkeypatch.setattr("routers.tasks.query_routing.encoder.training.has_minilm", lambda: True)
    score = np.eye(2)[[kind[text] for text in texts]] if telling else np.tile([0.0, 1.0], (60, 1))
    usd, rule = np.full((60, 2), 0.1), RewardRule(1.0)
    items = [{"query_id": text, "query": text} for text in texts]
    known = Outcomes(items, ["a", "b"], score, usd, rule(score, usd), rule=rule)
    model = train_encoder(known, rule, minilm=None, max_steps=0).model
    assert model.config.minilm == telling and model.config.width == WIDTHS[0]  # of equals the smaller
    assert train_encoder(known, rule, minilm=True, max_steps=0).model.config.minilm


def test_it_is_saved_loaded_and_knows_new_and_dropped_members(tmp_path: Path) -> None:
    router, known, _ = tiny()
    router.save(tmp_path)
    query = "sum of 400 and 7"
    with load_router(tmp_path) as again:
        assert again.route(query) == router.route(query)
        assert set(again.route(query, members=["large", "bad"]).scores) == {"large", "bad"}
    with load_router(tmp_path, members=["bad", "large"]) as fewer:
        assert list(fewer.route(query).scores) == ["bad", "large"]
        assert fewer.route("who was king of the north").member == "large"
    fresh = Member("fresh", "answers everything", 0.01, 0.01)
    with load_router(tmp_path, catalogue={**{m.name: m for m in router.members}, "fresh": fresh}) as more:
        texts = [item["query"] for item in known.items]
        more.learn_member(fresh, texts, [1.0] * 60, [0.0001] * 60)
        assert (
            more.route(query, cost_weight=1.0).member == more.route("who was king", cost_weight=1.0).member == "fresh"
        )
        more.save(tmp_path / "more")
        assert load_router(tmp_path / "more").route(query) == more.route(query)


def test_a_dearer_member_is_asked_less_and_the_foretold_cost_never_rises() -> None:
    router, known, _ = tiny()
    texts, weights = [item["query"] for item in known.items], [0.0, 0.1, 0.3, 1.0, 3.0, 10.0]
    embedded = router.model.embed(texts)
    cost = router.model.foretold(embedded)[1].clamp(min=0)
    with torch.no_grad():
        spent = [float((router.model(embedded, torch.full((60,), w)).exp() * cost).sum(dim=1).mean()) for w in weights]
    assert spent == sorted(spent, reverse=True) and spent[0] > 2 * spent[-1]
    with pytest.raises(ValueError, match="cost_weight is -1"):
        router.route("x y", cost_weight=-1)


def test_abstaining_has_its_own_reward_and_never_a_members(tmp_path: Path) -> None:
    router, _, _ = tiny(abstain=0.9)
    rows = Rows(torch.zeros(1, 1), torch.tensor([[[1.0, 0.5]], [[0.2, 0.0]]]), torch.zeros(2, 1, 2))
    torch.testing.assert_close(rows.reward(torch.tensor([0.5]), 0.3), torch.tensor([[0.9, 0.5, 0.3]]))
    calm = router.route("sum of 400 and 7")
    assert calm.member == "calc"  # earns .98
    asked = router.route("who was king of the north", cost_weight=0.2)
    assert (
        asked.member is None and "abstains" in asked.error and sum(asked.scores.values()) < 0.5
    )  # the large earns .8
    router.save(tmp_path)
    assert load_router(tmp_path).route("who was king of the north").member is None


def test_the_same_seed_gives_the_same_policy() -> None:
    one, two, other = tiny(objective="srpo")[0], tiny(objective="srpo")[0], tiny(objective="srpo", seed=1)[0]
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))


RECIPE = ["quickstart/encoder", "--max_steps", "20", "--cost_weights", "0.2", "0.6", "--heldout_limit", "60"]


def test_a_recipe_trains_evaluates_and_describes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from srpo.evaluate import main as evaluate
    from srpo.recipe import RecipeError
    from srpo.train import main as train

    output = tmp_path / "encoder"
    evaluation = train([*RECIPE, "--output_dir", str(output)])
    names = [f"{name}, price sensitivity {weight:g}" for name in ("start", "grpo") for weight in (0.2, 0.6)]
    assert set(names) < set(evaluation.routers) and "TF-IDF ridge" in evaluation.routers
    rewards = evaluation.frame.groupby("router")["reward"].mean()
    assert rewards["grpo, price sensitivity 0.2"] > rewards["python"] + 0.1  # the best single member
    alike = evaluation.header["rule"]
    assert alike["baselines"] == alike["grpo, price sensitivity 0.2"] and alike["baselines"]["cost_weight"] == 0.2
    card = (output / "README.md").read_text()
    assert "text-classification" in card and "load_router" in card and "[`grpo" not in card
    with load_router(output) as router:
        assert router.settings.cost_weights == (0.2, 0.6) and router.route("What is 17 + 25?").usd > 0
    again = evaluate([str(output), "--output_dir", str(tmp_path / "again")]).frame
    first = evaluation.frame
    first, again = (f[f.router.str.endswith(", price sensitivity 0.6")] for f in (first, again))
    assert again["reward"].mean() == pytest.approx(first[first.router.str.startswith("grpo")]["reward"].mean())
    with pytest.raises(RecipeError, match="beta, max_completion_length: means nothing for model_name_or_path"):
        train([*RECIPE, "--output_dir", str(tmp_path / "b"), "--beta", "0.1", "--max_completion_length", "9"])
    with pytest.raises(ValueError, match="abstain_reward is of model_name_or_path: encoder"):
        train(["quickstart/grpo", "--output_dir", str(tmp_path / "c"), "--abstain_reward", "0.1"])
    assert not (tmp_path / "b").exists() and not (tmp_path / "c" / "model.safetensors").exists()


def test_guarded_routing_is_the_harmonic_mean_in_and_out_of_domain() -> None:
    score, usd, rule = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]), np.full((3, 2), 0.5), RewardRule(1.0, 0.2)
    items = [{"query_id": str(i), "query": "q", "family": f} for i, f in enumerate(["a", "a", OUT_OF_DOMAIN])]
    known = with_abstaining(Outcomes(items, ["x", "y"], score, usd, rule(score, usd), rule=rule), 0.3)
    np.testing.assert_allclose(known.reward[:, 2], 0.3)
    played = Episodes.merged([known.play("x", "member", ["x"] * 3), known.play("p", "policy", ["x", "x", ABSTAIN])])
    assert guarded(played).splitlines()[2:4] == [
        "- x: in domain 50.0%, out of domain 0.0%, harmonic mean 0.0%",
        "- p: in domain 50.0%, out of domain 100.0%, harmonic mean 66.7%",
    ]
    assert played.frame.query("router == 'p'")["usd"].sum() == 1.0


def test_families_are_guessed_by_those_who_have_not_seen_the_fold() -> None:
    """Places on a line say the family, but for one query: who has not seen it guesses the other family."""
    x = np.concatenate([np.linspace(-2, -1, 30), np.linspace(1, 2, 30)])[:, None]
    families = ["left"] * 30 + ["right"] * 30
    families[10], families[3] = "right", "rare"
    found = guessed(x, families, [f"query {i}" for i in range(60)])
    assert found is not None
    weights, biases, left_out = found
    assert weights.shape == (3, 1) and left_out.shape == (60, 3)  # left, right, and the rest
    assert left_out.sum(axis=1) == pytest.approx(np.ones(60)) and left_out[10].argmax() == left_out[9].argmax()
    right = left_out[:, left_out[40].argmax()]
    assert right[30:].min() > 0.8 and right[:30].max() < 0.3
    # the weights that the model keeps guess alike, from all rows
    logits = x @ weights.T + biases
    assert (logits.argmax(axis=1) == left_out.argmax(axis=1)).all()
    assert guessed(x, ["one"] * 60, [f"query {i}" for i in range(60)]) is None


def test_guessed_families_are_read_where_they_help_and_saved_with_the_router(tmp_path: Path) -> None:
    """Two words together say the family (both or none, or one of them), which no linear model of the words tells."""
    rng = np.random.default_rng(0)
    pairs = [(bool(i & 1), bool(i & 2)) for i in range(240)]
    noise = rng.integers(100, 999, (240, 3))
    asked = [f"{'salt' if a else 'iron'} {'moon' if b else 'tree'}" for a, b in pairs]
    texts = [f"{words} {' '.join(map(str, some))}" for words, some in zip(asked, noise.tolist(), strict=True)]
    same = np.array([a == b for a, b in pairs])
    score = np.stack([same, ~same], axis=1).astype(float)
    usd, rule = np.full((240, 2), 0.01), RewardRule(0.01)
    items = [{"query_id": text, "query": text, "family": words} for text, words in zip(texts, asked, strict=True)]
    known = Outcomes(items, ["v", "w"], score, usd, rule(score, usd), rule=rule)
    router = train_encoder(known, rule, objective="expected", max_steps=0)
    assert router.model.config.families == 4 and "4 guessed families" in router.model.reads
    router.save(tmp_path)
    again, new = load_router(tmp_path), [f"{words} 5 6 7" for words in asked[:4]]
    for own, read in zip(router.route_all(new), again.route_all(new), strict=True):
        assert own.member == read.member and own.scores == pytest.approx(read.scores, abs=1e-6)
    assert [decision.member for decision in again.route_all(new)] == ["v", "w", "w", "v"]
