"""Adapters by peft: they alone train, are saved and come back; whoever needs plain weights gets them folded in."""

import asyncio

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from agentopd.config.model import LoRAConfig
from agentopd.config.run import LearnerConfig
from agentopd.contracts import GenerationRequest, SamplingParams
from agentopd.engines import HFEngine
from agentopd.errors import ConfigError
from agentopd.learner.deepspeed import DeepSpeedLearner
from agentopd.weights import add_lora, full_shapes, full_weights

IDS = torch.arange(3, 35)[None]


@pytest.fixture
def learner(tiny_model, objective):
    made = []

    def make(dtype=torch.float32, seed=0, **lora):
        model = tiny_model(dtype=dtype)
        torch.manual_seed(seed)
        add_lora(model, LoRAConfig(rank=4, alpha=8, **lora))
        config = LearnerConfig(lr=1e-2, warmup_steps=0)
        made.append(DeepSpeedLearner(model, config, objective("topk_opd"), total_steps=10))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_adapters_train_and_in_the_models_dtype(learner, make_batch, dtype):
    trained, batch = learner(dtype), make_batch()
    before = {name: weight.detach().clone() for name, weight in trained.module.named_parameters()}
    values = [trained.step(batch)["distill/reverse_kl"] for _ in range(8)]
    assert values[-1] < 0.9 * values[0]
    for name, weight in trained.module.named_parameters():
        assert weight.dtype == dtype
        assert ("lora" in name) == (not torch.equal(weight, before[name])), name


def test_a_checkpoint_holds_adapters_alone_and_continues_exactly(learner, make_batch, tmp_path):
    one, batches = learner(torch.bfloat16), [make_batch(seed=seed) for seed in range(3)]
    one.step(batches[0])
    one.save(tmp_path)
    (file,) = tmp_path.glob("*/mp_rank_00_model_states.pt")
    assert all("lora" in name for name in torch.load(file, weights_only=False)["module"])
    last = [one.step(batch) for batch in batches[1:]][-1]
    other = learner(torch.bfloat16, seed=1)
    other.load(tmp_path)
    assert [other.step(batch) for batch in batches[1:]][-1] == last
    for ours, theirs in zip(one.module.parameters(), other.module.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_export_is_a_plain_model_with_the_same_logits(learner, make_batch, tmp_path):
    trained = learner()
    for seed in range(3):
        trained.step(make_batch(seed=seed))
    trained.export(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = trained.module(IDS).logits
        assert_close(plain(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    names = {name for name, _ in plain.named_parameters()}
    assert {name for name, _ in full_weights(trained.module)} == names
    shapes = [(name, weight.dtype, tuple(weight.shape)) for name, weight in full_weights(trained.module)]
    assert full_shapes(trained.module) == shapes


def test_the_engine_samples_with_the_adapters(learner, make_batch):
    trained = learner()
    trained.step(make_batch())
    request = GenerationRequest(IDS[0].tolist(), SamplingParams(max_tokens=5), seed=1)
    engine = HFEngine(trained.module)
    (made,) = asyncio.run(engine.generate([request]))
    asyncio.run(engine.aclose())
    row = torch.cat([IDS, torch.tensor([made.token_ids])], dim=1)
    with torch.no_grad():
        logprobs = trained.module(row).logits.log_softmax(-1)[0, -6:-1]
    assert_close(torch.tensor(made.logprobs), logprobs.gather(1, row[0, -5:, None])[:, 0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("targets", [("no_such",), ("lm_head",), ("embed_tokens", "q_proj")])
def test_targets_that_cannot_have_one_are_refused(tiny_model, targets):
    with pytest.raises(ConfigError, match=r"model\.lora\.targets \["):
        add_lora(tiny_model(), LoRAConfig(targets=targets))


def test_targets_can_be_chosen(tiny_model):
    model = tiny_model()
    add_lora(model, LoRAConfig(rank=2, targets=("q_proj",)))
    trainable = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert len(trainable) == 2 * model.config.num_hidden_layers and all("q_proj.lora" in name for name in trainable)
