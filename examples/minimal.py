"""Verifier-calibrated on-policy distillation, the whole of it, in one file.

    python examples/minimal.py --student DIR_OR_ID --teacher DIR_OR_ID [--steps 50]

A step: sample answers from the student, verify them, let a teacher score the very tokens the student wrote, weigh the
teacher's guidance by the verdict, update. A new skill (adding) is taught by the teacher; an old one (copying) is
replayed from the same student, with the frozen starting student as its teacher. Nothing is imported from agentopd:
this is its algorithm on one machine, for reading, and a test holds both to the same loss.

Shapes: B episodes, T tokens of prompt and answer (right-padded), K teacher top-K, V vocabulary.
"""

import argparse
import copy
import random
import re
from dataclasses import dataclass

import torch
from torch import Tensor

TOP_K, GROUP_SIZE, PROMPTS, MAX_NEW_TOKENS, LR = 32, 4, 8, 64, 1e-5
W_AGREE, W_NEUTRAL, W_CONFLICT = 1.0, 0.5, 0.25
CAP, BUDGET = 5.0, 1.0  # nats: of one token, and of a sequence's mean
ETA_V, CLIP_LOW, CLIP_HIGH, DUAL_CLIP, TIS_CAP, MAX_PROB_DROP = 0.2, 0.2, 0.28, 3.0, 2.0, 0.2
TAIL_FLOOR = 1e-6
NEW, OLD = 0, 1
SHARES = {NEW: 0.75, OLD: 0.25}


@dataclass
class Rollouts:
    """What one step learns from. Log-probs at index t are of token t given the tokens before it."""

    tokens: Tensor  # (B, T)
    sampled: Tensor  # (B, T) True on the tokens the student sampled
    special: Tensor  # (B, T) True on end-of-turn markers: no teacher term there
    rollout_logprobs: Tensor  # (B, T) the sampler's
    teacher_logprobs: Tensor  # (B, T)
    topk_ids: Tensor  # (B, T, K)
    topk_logprobs: Tensor  # (B, T, K) the teacher's
    success: Tensor  # (B,) in [0, 1]; nan where the verifier could not judge
    group: Tensor  # (B,) answers to the same prompt share it
    skill: Tensor  # (B,)


def loss(logits: Tensor, r: Rollouts, shares: dict[int, float]) -> Tensor:
    """The loss (scalar) of a batch, from the student's logits (B, T, V) at every position."""
    logprobs = torch.zeros_like(logits, dtype=torch.float32)
    logprobs[:, 1:] = logits[:, :-1].float().log_softmax(-1)  # row t now predicts token t
    new = logprobs.gather(2, r.tokens[..., None])[..., 0]
    old = new.detach()  # one optimiser step per batch: the policy before the update is the current one
    known = ~r.success.isnan()

    # The teacher's divergence on the student's own tokens, exact on K ids plus one bucket for all the others.
    divergence = reverse_kl(logprobs.gather(2, r.topk_ids), r.topk_logprobs)
    # How much of it each token takes: agreement of the verdict with the teacher's opinion of the token.
    sigma = torch.where(known, 2 * r.success - 1, 0.0)[:, None]
    agreement = sigma * (r.teacher_logprobs - old).sign()
    weight = torch.where(agreement > 0, W_NEUTRAL + (W_AGREE - W_NEUTRAL) * agreement, torch.tensor(W_NEUTRAL))
    weight = torch.where(agreement < 0, W_NEUTRAL - (W_CONFLICT - W_NEUTRAL) * agreement, weight)
    # Bound the pressure of one token, then of one sequence.
    guided = r.sampled & ~r.special
    weight = weight * (CAP / divergence.detach().abs()).clamp(max=1.0)
    pressure = torch.where(guided, weight * divergence.detach(), 0.0).abs().sum(1) / guided.sum(1).clamp(min=1)
    weight = weight * (BUDGET / pressure).clamp(max=1.0)[:, None]
    teacher_term = torch.where(guided, token_share(guided, r.skill, shares) * weight * divergence, 0.0).sum()

    # The verifier's advantage, relative to the other answers to the same prompt.
    judged = r.sampled & known[:, None]
    advantage = ETA_V * group_advantage(r.success, r.group)[:, None] * token_share(judged, r.skill, shares)
    ratio = (new - old).exp()
    surrogate = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH))
    surrogate = torch.where(advantage < 0, torch.minimum(surrogate, -advantage * DUAL_CLIP), surrogate)
    importance = (old - r.rollout_logprobs).clamp(-20, 20).exp().clamp(max=TIS_CAP)
    moved = old.exp() - r.rollout_logprobs.exp()
    trusted = ~(((advantage > 0) & (moved > MAX_PROB_DROP)) | ((advantage < 0) & (moved < -MAX_PROB_DROP)))
    verifier_term = torch.where(judged & trusted, surrogate * importance, 0.0).sum()
    return teacher_term + verifier_term


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(student || teacher) on the last axis, with one more bin for the mass outside it."""

    def log_tail(logprobs: Tensor) -> Tensor:
        return torch.log(-torch.expm1(logprobs.logsumexp(-1).clamp(max=-TAIL_FLOOR)))

    inside = (student.exp() * (student - teacher)).sum(-1)
    return inside + log_tail(student).exp() * (log_tail(student) - log_tail(teacher))


def token_share(part: Tensor, skill: Tensor, shares: dict[int, float]) -> Tensor:
    """Weight of each token (B, 1): its skill's share over the skill's number of tokens taking part."""
    weight = torch.zeros(len(skill), 1)
    for name, share in shares.items():
        weight[skill == name] = share / part[skill == name].sum().clamp(min=1)
    return weight


def group_advantage(reward: Tensor, group: Tensor) -> Tensor:
    """(R - mean) / std inside each group (B,); 0 for unknown rewards and constant groups."""
    advantage = torch.zeros_like(reward)
    for name in group.unique():
        members = (group == name) & ~reward.isnan()
        known = reward[members]
        if len(known) > 1 and known.max() - known.min() > 1e-8:
            advantage[members] = (known - known.mean()) / (known.std() + 1e-6)
    return advantage


def make_task(skill: int) -> tuple[str, str]:
    """A prompt and its answer."""
    a, b = random.randint(10, 99), random.randint(10, 99)
    if skill == NEW:
        return f"What is {a} + {b}? Give the number last.", str(a + b)
    return f"Repeat this number: {a}{b}", f"{a}{b}"


def verify(answer: str, text: str) -> float:
    """1.0 if the last number of the text is the answer, else 0.0."""
    numbers = re.findall(r"\d+", text)
    return float(bool(numbers) and numbers[-1] == answer)


@torch.no_grad()
def rollout(student, tokenizer, teachers: dict[int, torch.nn.Module]) -> Rollouts:
    """Sample a group of answers to every prompt, verify them, and let each skill's teacher score the tokens."""
    rows, masks, sampler, success, group, skill = [], [], [], [], [], []
    for index in range(PROMPTS):
        kind = NEW if random.random() < SHARES[NEW] else OLD
        text, answer = make_task(kind)
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
        )
        prompt = tokenizer(chat, add_special_tokens=False, return_tensors="pt").input_ids
        out = student.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=True, top_k=0, num_return_sequences=GROUP_SIZE,
            max_new_tokens=MAX_NEW_TOKENS, output_logits=True, return_dict_in_generate=True,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        drawn = torch.stack(out.logits, 1).float().log_softmax(-1)  # (GROUP_SIZE, new tokens, V)
        for ids, logprobs in zip(out.sequences[:, prompt.shape[1] :], drawn, strict=True):
            ends = (ids == tokenizer.eos_token_id).nonzero()
            n = int(ends[0]) + 1 if len(ends) else len(ids)  # the end-of-turn token is sampled too
            rows.append(torch.cat([prompt[0], ids[:n]]))
            masks.append(torch.arange(len(rows[-1])) >= prompt.shape[1])
            sampler.append(torch.cat([torch.zeros(prompt.shape[1]), logprobs[:n].gather(1, ids[:n, None])[:, 0]]))
            success.append(verify(answer, tokenizer.decode(ids[:n], skip_special_tokens=True)))
            group.append(index)
            skill.append(kind)
    pad = lambda xs: torch.nn.utils.rnn.pad_sequence(xs, batch_first=True)  # noqa: E731
    tokens, skills = pad(rows), torch.tensor(skill)
    scored = torch.zeros(*tokens.shape, student.config.vocab_size)
    for kind, teacher in teachers.items():  # right padding cannot reach earlier tokens under causal attention
        if (skills == kind).any():
            scored[skills == kind, 1:] = teacher(tokens[skills == kind]).logits[:, :-1].float().log_softmax(-1)
    topk = scored.topk(TOP_K)
    return Rollouts(
        tokens, pad(masks), tokens == tokenizer.eos_token_id, pad(sampler),
        scored.gather(2, tokens[..., None])[..., 0], topk.indices, topk.values,
        torch.tensor(success), torch.tensor(group), skills,
    )  # fmt: skip


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.student)
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval() for name in (args.student, args.teacher)
    )
    teachers = {NEW: teacher, OLD: copy.deepcopy(student)}
    optimizer = torch.optim.AdamW(student.parameters(), lr=LR, betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(args.steps):
        rollouts = rollout(student, tokenizer, teachers)
        value = loss(student(rollouts.tokens).logits, rollouts, SHARES)
        value.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rates = [float(rollouts.success[rollouts.skill == kind].mean()) for kind in (NEW, OLD)]
        print(f"step {step}  loss {value.item():.4f}  new {rates[0]:.2f}  old {rates[1]:.2f}")


if __name__ == "__main__":
    main()
