"""How much memory, traffic and how many cores a run takes, by formulas: arithmetic, nothing measured here.

Bytes unless a name says otherwise. ``docs/scaling.md`` says where each formula comes from and what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

BF16, FP32 = 2, 4
BYTES = {"bfloat16": BF16, "float32": FP32}
GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """A decoder with grouped-query attention and a gated MLP, as Qwen3, Llama and Mistral are."""

    layers: int
    width: int
    mlp_width: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool

    @classmethod
    def of(cls, config: Any) -> Shape:
        """From the config of a Hugging Face model."""
        heads = config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            mlp_width=config.intermediate_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocabulary=config.vocab_size,
            tied=bool(config.tie_word_embeddings),
        )

    @property
    def parameters(self) -> int:
        """Weights, norms of the layers included."""
        attention = self.width * self.head_dim * 2 * (self.heads + self.kv_heads)
        norms = 2 * self.width + 2 * self.head_dim
        layer = attention + 3 * self.width * self.mlp_width + norms
        return self.layers * layer + self.width + self.vocabulary * self.width * (1 if self.tied else 2)

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of every layer, in bfloat16."""
        return 2 * self.layers * self.kv_heads * self.head_dim * BF16


QWEN3 = {
    "0.6B": Shape(28, 1024, 3072, 16, 8, 128, 151_936, True),
    "1.7B": Shape(28, 2048, 6144, 16, 8, 128, 151_936, True),
    "4B": Shape(36, 2560, 9728, 32, 8, 128, 151_936, True),
    "8B": Shape(36, 4096, 12288, 32, 8, 128, 151_936, False),
    "14B": Shape(40, 5120, 17408, 40, 8, 128, 151_936, False),
    "32B": Shape(64, 5120, 25600, 64, 8, 128, 151_936, False),
}
"""Published shapes."""


def state_bytes(parameters: int, ranks: int, zero_stage: int, dtype: str = "bfloat16") -> float:
    """Of one rank: bfloat16 weights (2), fp32 gradients (4), fp32 masters and Adam's two moments (12 a parameter).

    ZeRO 1 divides the last among the ranks, 2 the gradients too, 3 everything. A float32 student has no masters at
    stage 0, where its weights are their own.
    """
    sizes = (BYTES[dtype], FP32, 2 * FP32 + _master_bytes(zero_stage, dtype))
    split = {0: (1, 1, 1), 1: (1, 1, ranks), 2: (1, ranks, ranks), 3: (ranks, ranks, ranks)}[zero_stage]
    return sum(size * parameters / part for size, part in zip(sizes, split, strict=True))


def checkpoint_bytes(parameters: int, zero_stage: int, dtype: str) -> int:
    """Of a checkpoint, over all ranks: what is trained, in its dtype, its fp32 masters and Adam's two moments."""
    return parameters * (BYTES[dtype] + 2 * FP32 + _master_bytes(zero_stage, dtype))


def _master_bytes(zero_stage: int, dtype: str) -> int:
    return 0 if dtype == "float32" and zero_stage == 0 else FP32


def lora_parameters(shape: Shape, rank: int, targets: str | tuple[str, ...]) -> int:
    """Of adapters of this rank, on every linear layer but the head (``all-linear``) or on those named."""
    width, query, keys = shape.width, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sides = {"q_proj": width + query, "k_proj": width + keys, "v_proj": width + keys, "o_proj": query + width}
    sides |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), width + shape.mlp_width)
    chosen = sides if isinstance(targets, str) else [name for name in targets if name in sides]
    return shape.layers * rank * sum(sides[name] for name in chosen)


def activation_bytes(shape: Shape, tokens: int, size: int = BF16, checkpointed: bool = True) -> int:
    """Of a micro-batch: what each layer keeps, ``size`` bytes a value, and three times a layer's insides that come and
    go in the backward pass. With activation checkpointing a layer keeps its input, and one layer's insides are alive.
    """
    inside = 3 * shape.width + 3 * (shape.heads + 2 * shape.kv_heads) * shape.head_dim + 4 * shape.mlp_width
    kept = shape.layers * shape.width + inside if checkpointed else shape.layers * inside
    return tokens * size * (kept + 3 * inside)


def head_bytes(shape: Shape, chunk: int, size: int = BF16, trained: bool = True) -> int:
    """Of the fused head: one chunk of logits, and the gradient of its weight in fp32 where it is trained."""
    return chunk * shape.vocabulary * size + trained * shape.vocabulary * shape.width * FP32


def kv_bytes(shape: Shape, sequences: int, tokens: int) -> int:
    """Keys and values of so many sequences of so many tokens."""
    return shape.kv_bytes_per_token * sequences * tokens


def evidence_bytes(tokens: int, top_k: int) -> int:
    """A teacher's answer before compression: fp32 for the token, three bytes and fp16 for each id of its top-K."""
    return tokens * (FP32 + (3 + BF16) * top_k)


def held_evidence_bytes(tokens: int, top_k: int, hidden_width: int = 0) -> int:
    """The same in memory: eight bytes and fp32 for each id, and the hidden states that whole distributions take."""
    return tokens * (FP32 + (8 + FP32) * top_k + FP32 * hidden_width)


def sync_seconds(parameters: int, replicas: float, link: float, folder: float) -> float:
    """One rank writes the weights over its link, then every replica reads them from a folder that all of them share."""
    return BF16 * parameters * (1 / link + replicas / folder)


def decode_rate(shape: Shape, sequences: int, context: int, bandwidth: float) -> float:
    """Tokens a second of one replica at most: each step reads all weights, and the keys and values of its sequences."""
    read = BF16 * shape.parameters + kv_bytes(shape, sequences, context)
    return sequences * bandwidth / read


def train_flops(parameters: int, tokens: int, recompute: bool = True) -> int:
    """Forward and backward pass, and the forward pass again with activation checkpointing."""
    return (8 if recompute else 6) * parameters * tokens


def score_flops(parameters: int, tokens: int) -> int:
    """A forward pass."""
    return 2 * parameters * tokens


def judge_cores(episodes: int, seconds: float, cpu_s_per_verdict: float) -> float:
    """Cores that keep up with so many verdicts in so many seconds."""
    return episodes * cpu_s_per_verdict / seconds


@dataclass(frozen=True)
class Hardware:
    """One GPU and its links, and one host that judges."""

    flops: float = 989e12
    """Dense bfloat16, H100 and H200."""
    utilisation: float = 0.4
    memory_gib: float = 80.0
    bandwidth: float = 3.35e12
    """Of its memory, bytes a second (H100 SXM)."""
    bandwidth_use: float = 0.6
    link: float = 50e9
    """Between machines, bytes a second for each GPU (400 Gbit/s)."""
    folder: float = 50e9
    """Of the folder that weights go through, bytes a second for all readers together: an assumption."""
    host_cores: int = 64
    cpu_s_per_verdict: float = 0.016
    """Of a program with ten calls in the jail (docs/sandbox.md)."""
    cpu_s_per_suite: float = 5.0
    """Of the tests of a repository: an assumption, as different as repositories are."""


@dataclass(frozen=True)
class Plan:
    """A run on some GPUs. ``shared`` GPUs do everything in turn; otherwise each has one part."""

    name: str
    student: str
    teacher: str
    learners: int
    samplers: int
    scorers: int
    zero_stage: int
    episodes: int
    prompt: int = 1024
    sampled: int = 1024
    live: int = 64
    """Sequences that one replica decodes at once."""
    replica: int = 1
    """GPUs of one replica of the student."""
    micro_tokens: int = 16384
    shared: bool = False

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.learners if self.shared else self.learners + self.samplers + self.scorers


PLANS = (
    Plan("1 GPU", "1.7B", "4B", 1, 1, 1, 0, 256, live=128, shared=True),
    Plan("8 GPUs", "4B", "14B", 3, 3, 2, 2, 1024, live=128),
    Plan("64 GPUs", "8B", "32B", 24, 16, 24, 3, 8192, live=128),
    Plan("512 GPUs", "32B", "32B", 320, 112, 80, 3, 32768, live=128, replica=2),
)
"""Splits that keep no part waiting for long by these formulas."""


def figures(plan: Plan, hardware: Hardware = Hardware()) -> dict[str, float]:
    """What a plan takes: GiB of one GPU, seconds of each part of a step, bytes over the network, cores."""
    student, teacher = QWEN3[plan.student], QWEN3[plan.teacher]
    context, ranks = plan.prompt + plan.sampled, plan.learners
    tokens, sampled = plan.episodes * context, plan.episodes * plan.sampled
    flops = hardware.flops * hardware.utilisation
    replicas = plan.samplers / plan.replica
    bandwidth = hardware.bandwidth * hardware.bandwidth_use * plan.replica
    rollout = sampled / (replicas * decode_rate(student, plan.live, context, bandwidth))
    train = train_flops(student.parameters, tokens) / (flops * ranks)
    score = score_flops(teacher.parameters, tokens) / (flops * plan.scorers)
    sync = 0.0 if plan.shared else sync_seconds(student.parameters, replicas, hardware.link, hardware.folder)
    step = (rollout + score + train + sync) if plan.shared else max(rollout, score, train) + sync
    return {
        "state_gib": state_bytes(student.parameters, ranks, plan.zero_stage) / GIB,
        "activations_gib": activation_bytes(student, plan.micro_tokens) / GIB,
        "head_gib": head_bytes(student, 1024) / GIB,
        "sampler_weights_gib": BF16 * student.parameters / plan.replica / GIB,
        "kv_gib": kv_bytes(student, plan.live, context) / plan.replica / GIB,
        "teacher_gib": BF16 * teacher.parameters / GIB,
        "rollout_s": rollout,
        "score_s": score,
        "train_s": train,
        "sync_s": sync,
        "step_s": step,
        "evidence_gib": evidence_bytes(sampled, 64) / GIB,
        "written_gib": 0.0 if plan.shared else BF16 * student.parameters / GIB,
        "read_gib": 0.0 if plan.shared else BF16 * student.parameters * replicas / GIB,
        "verdicts_per_s": plan.episodes / step,
        "judge_cores": judge_cores(plan.episodes, step, hardware.cpu_s_per_verdict),
        "suite_cores": (suites := judge_cores(plan.episodes, step, hardware.cpu_s_per_suite)),
        "suite_hosts": -(-suites // hardware.host_cores),
    }


ROWS = (
    ("learner state, GiB a GPU", "state_gib"),
    ("activations, GiB a GPU", "activations_gib"),
    ("output head, GiB a GPU", "head_gib"),
    ("sampler's weights, GiB a GPU", "sampler_weights_gib"),
    ("keys and values, GiB a GPU", "kv_gib"),
    ("teacher's weights, GiB", "teacher_gib"),
    ("rollout, s", "rollout_s"),
    ("teacher, s", "score_s"),
    ("learner, s", "train_s"),
    ("weight sync, s", "sync_s"),
    ("step, s", "step_s"),
    ("teacher's answers, GiB a step", "evidence_gib"),
    ("weights written, GiB a step", "written_gib"),
    ("weights read by servers, GiB a step", "read_gib"),
    ("verdicts a second", "verdicts_per_s"),
    ("cores that judge, 16 ms a verdict", "judge_cores"),
    ("cores that judge, 5 s a verdict", "suite_cores"),
    ("hosts of 64 cores for those", "suite_hosts"),
)


def table(hardware: Hardware = Hardware()) -> str:
    """The plans as Markdown."""
    lines = [["", *(plan.name for plan in PLANS)], ["---"] * (len(PLANS) + 1)]
    lines += [
        ["student / teacher", *(f"Qwen3 {plan.student} / {plan.teacher}" for plan in PLANS)],
        ["learner / rollout / teacher GPUs", *(_split(plan) for plan in PLANS)],
        ["ZeRO stage", *(str(plan.zero_stage) for plan in PLANS)],
        ["episodes a step", *(f"{plan.episodes:,}" for plan in PLANS)],
    ]
    found = [figures(plan, hardware) for plan in PLANS]
    lines += [[label, *(_shown(values[key]) for values in found)] for label, key in ROWS]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _split(plan: Plan) -> str:
    return "shared" if plan.shared else f"{plan.learners} / {plan.samplers} / {plan.scorers}"


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


if __name__ == "__main__":
    print(table())
