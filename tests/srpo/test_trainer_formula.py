"""The trainer's loss and gradient against the equations written out here, row by row, in float64, from plain logits.

Nothing below uses the library's objectives, heads, teacher or reprompting: prompts are tokenised without padding,
both networks give their ordinary logits, and the sums run over Python lists. The real trainer pads, batches, captures
hidden states and works in float32; both must agree.
"""

import copy
import math

import pytest
import torch
from core_helpers import binary_reward, config, dataset, model, scripted, tokenizer, trainer

K, CLIP, EPS_LOW, EPS_HIGH = 20, 2.0, 0.2, 0.28
CASES = {
    "srpo": {},
    "srpo_off_policy": {"off_policy": True},
    "srpo_forward_kl": {"distillation_alpha": 0.0, "off_policy": True},
    "srpo_reverse_kl": {"distillation_alpha": 1.0},
    "srpo_skewed": {"distillation_alpha": 0.3, "entropy_weight_beta": 2.0},
    "srpo_full_vocabulary": {"distillation_mode": "full_logits", "temperature": 0.7},
    "srpo_without_tail": {"distillation_add_tail": False},
    "srpo_temperature": {"temperature": 0.7, "off_policy": True},
    "srpo_no_weights": {"entropy_weight_beta": 0.0},
    "srpo_sampled_token": {"distillation_mode": "sampled_token", "distillation_alpha": 1.0, "off_policy": True},
    "srpo_sequence_mean": {"distillation_aggregation": "sequence_mean"},
    "srpo_two_sided_clip": {"delta": 1.1, "off_policy": True},
    "srpo_no_ratio": {"distillation_is_clip": None, "off_policy": True},
    "sdpo": {"objective": "sdpo"},
    "sdpo_off_policy": {"objective": "sdpo", "off_policy": True, "temperature": 0.7},
    "sdpo_sequence_mean": {"objective": "sdpo", "distillation_aggregation": "sequence_mean"},
    "sdpo_sampled_token": {"objective": "sdpo", "distillation_mode": "sampled_token", "distillation_alpha": 1.0},
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_the_formula(tmp_path, case):
    settings = dict(CASES[case])
    off_policy = settings.pop("off_policy", False)
    made = trainer(config(tmp_path, **settings))
    with torch.no_grad():  # a teacher that differs from the student also without a demonstration
        for i, parameter in enumerate(made.teacher.model.parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    rows = [row for row in dataset().select(range(4)) for _ in range(4)]
    made.model.train()
    batch = made._generate_and_score_completions(rows)
    if off_policy:
        draw = torch.Generator().manual_seed(7)
        with torch.no_grad():
            ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
            mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
            length = batch["completion_ids"].size(1)
            logp, _, _ = made._get_per_token_logps_and_entropies(made.model, ids, mask, length)
        batch["old_per_token_logps"] = logp + 0.5 * torch.randn(logp.shape, generator=draw)
    made.current_gradient_accumulation_steps = 1  # as the training loop sets it
    loss = made._compute_loss(made.model, batch)
    loss.backward()

    old = batch["old_per_token_logps"].double() if off_policy else None
    expected, gradients, distilled = by_hand(made, rows, old)
    assert batch["distilled"].tolist() == distilled and 0 < sum(distilled) < len(distilled)
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    largest = max(g.abs().max() for g in gradients.values())
    for name, parameter in made.model.named_parameters():
        difference = (parameter.grad.double() - gradients[name]).abs().max()
        assert difference <= 1e-5 * largest, (name, difference / largest)


def by_hand(made, rows, old):
    args, eos = made.args, tokenizer().eos_token_id
    student, teacher = copy_in_double(made.model), copy_in_double(made.teacher.model)
    completions = scripted([row["prompt"] for row in rows], made)["completion_ids"]
    rewards = binary_reward(completions)
    ended = [ids[-1] == eos for ids in completions]
    correct = [r >= 0.5 and end for r, end in zip(rewards, ended, strict=True)]

    distilled, demonstrations = [], []
    for i in range(len(rows)):
        group = range(i - i % 4, i - i % 4 + 4)
        siblings = [j for j in group if j != i and correct[j]]
        demonstrations.append(siblings[0] if siblings else None)
        distilled.append(bool(siblings) and (args.objective == "sdpo" or not correct[i]))

    per_token, weights, entropies = [], {}, {}
    for i, row in enumerate(rows):
        question, ids = row["prompt"][0]["content"], completions[i]
        logp = log_probs(student, question, ids, args.temperature)
        chosen = logp[range(len(ids)), ids]
        before = chosen.detach() if old is None else old[i, : len(ids)]
        ratio = torch.exp(chosen - before)
        if distilled[i]:
            shown = tokenizer().decode(completions[demonstrations[i]], skip_special_tokens=True)
            asked = f"{question}\nCorrect solution:\n\n{shown}\n\nCorrectly solve the original question."
            q = log_probs(teacher, asked, ids, args.temperature).detach()
            entropies[i] = -(q.exp() * q).sum(1)
            if args.distillation_mode == "sampled_token":
                values = (chosen - q[range(len(ids)), ids]).detach() * chosen
            else:
                values = torch.stack([distance(logp[t], q[t], args) for t in range(len(ids))])
            if args.distillation_is_clip is not None:
                values = values * ratio.detach().clamp(max=CLIP)
        else:
            group = rewards[i - i % 4 : i - i % 4 + 4]
            advantage = rewards[i] - sum(group) / 4
            capped = ratio if args.delta is None else ratio.clamp(max=args.delta)
            values = -torch.min(capped * advantage, ratio.clamp(1 - EPS_LOW, 1 + EPS_HIGH) * advantage)
            if args.objective == "sdpo":
                values = values * 0.0
        per_token.append(values)

    beta = args.entropy_weight_beta if args.objective == "srpo" else 0.0
    raw = {i: torch.exp(-beta * h) for i, h in entropies.items()}
    mean = torch.cat(list(raw.values())).mean()
    weights = {i: w / mean for i, w in raw.items()}
    weighted = [x * weights.get(i, 1.0) for i, x in enumerate(per_token)]
    if args.distillation_aggregation == "sequence_mean":
        loss = sum(x.mean() for x in weighted) / len(rows)
    else:
        counted = [len(c) for i, c in enumerate(completions) if distilled[i] or args.objective == "srpo"]
        loss = sum(x.sum() for x in weighted) / sum(counted)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in student.named_parameters()}, distilled


def log_probs(network, question, ids, temperature):
    """[len(ids), V], for one unpadded row."""
    prompt = tokenizer().apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]
    logits = network(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits / temperature, dim=-1)


def distance(s, q, args):
    """D_alpha of eq. 3.4 at one token, on the support that the mode names."""
    if args.distillation_mode == "topk_logits":
        top = s.topk(K).indices
        if args.distillation_add_tail:
            s, q = (torch.cat([x[top], torch.log1p(-x[top].exp().sum()).unsqueeze(0)]) for x in (s, q))
        else:
            s, q = (torch.log_softmax(x[top], 0) for x in (s, q))
    alpha, p, r = args.distillation_alpha, s.exp(), q.exp()
    if alpha == 0:
        return (r * (q - s)).sum()
    if alpha == 1:
        return (p * (s - q)).sum()
    m = (1 - alpha) * p + alpha * r
    value = (1 - alpha) * (p * (s - m.log())).sum() + alpha * (r * (q - m.log())).sum()
    assert alpha != 0.5 or value <= math.log(2)
    return value


def copy_in_double(network):
    twin = model()
    twin.load_state_dict(copy.deepcopy(network.state_dict()))
    return twin.double()
