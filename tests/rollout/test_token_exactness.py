"""Every codec with every family of chat templates: the ids that train are the ids that were sampled."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from agentopd.batching import build_batch
from agentopd.config.load import resolve_objective
from agentopd.contracts import Generation, GenerationRequest, ScoredEpisode
from agentopd.objective.masks import TokenClasses
from agentopd.rendering import ChatRenderer, HermesJSON, OpenAI, Pythonic, Qwen3XML
from agentopd.rollout import EpisodeSpec, run_episodes
from agentopd.types import StopReason, Task, ToolCall, Verdict, VerdictStatus

SECRET = "thinking aloud"
SAYS = ([ToolCall(name="add", arguments={"n": 1})], [ToolCall(name="add", arguments={"n": 2})], [])

each_codec = pytest.mark.parametrize("codec", [HermesJSON(), Qwen3XML(), Pythonic(), OpenAI()], ids=lambda c: c.name)
each_family = pytest.mark.parametrize("family", ["qwen3", "llama3", "mistral"])


class Poisoned(PreTrainedTokenizerFast):
    """Fails as soon as anything that was sampled is rendered or encoded again."""

    def __call__(self, text: str, *args: Any, **kwargs: Any) -> Any:
        assert SECRET not in text, "sampled text was encoded"
        return super().__call__(text, *args, **kwargs)

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        assert SECRET not in str(conversation), "sampled text was rendered"
        return super().apply_chat_template(conversation, *args, **kwargs)


class ByteEngine:
    """Says each text byte by byte: right ids, but none that encoding the text would give."""

    max_context = 4000
    lockstep = True

    def __init__(self, tokenizer: PreTrainedTokenizerFast, texts: list[str], end: int) -> None:
        self.requests: list[list[int]] = []
        self.said: list[tuple[int, ...]] = []
        plain = {tokenizer.decode([index]): index for index in range(len(tokenizer)) if index not in range(2)}
        self._texts = [(*(plain[letter] for letter in text), end) for text in texts]

    async def generate(self, requests: list[GenerationRequest]) -> list[Generation]:
        (request,) = requests
        self.requests.append(list(request.token_ids))
        self.said.append(self._texts[len(self.said)])
        return [Generation(self.said[-1], tuple(-0.25 for _ in self.said[-1]), "stop")]


@each_codec
@each_family
def test_trained_ids_are_the_sampled_ids(
    family: str, codec: Any, chat_tokenizer: Callable[..., Any], make_task: Callable[..., Task], counter: type[Any]
) -> None:
    tokenizer = chat_tokenizer(family, Poisoned)
    renderer = ChatRenderer(tokenizer, codec)
    tools = counter.tool_schemas(make_task())
    texts = [f"<think>{SECRET}</think>\n{codec.render(*calls, tools=tools)}" for calls in SAYS]
    engine = ByteEngine(tokenizer, texts, renderer.end_of_turn_id)
    spec = EpisodeSpec(make_task(), counter, skill="counting")
    (episode,) = asyncio.run(run_episodes([spec], engine, renderer))

    assert episode.stop_reason is StopReason.COMPLETED and episode.final_state == {"total": 3}
    assert [turn.text for turn in episode.turns] == texts, "thoughts stay in the turn"
    assert [turn.token_ids for turn in episode.turns] == engine.said
    for before, said, after in zip(engine.requests, engine.said, engine.requests[1:], strict=False):
        assert after[: len(before) + len(said)] == before + list(said), "each prompt continues the last one"
    assert episode.token_ids[: len(engine.requests[-1])] == engine.requests[-1]
    sampled = [token for token, flag in zip(episode.token_ids, episode.loss_mask, strict=True) if flag]
    assert sampled == [token for said in engine.said for token in said]

    verdict = Verdict(outcome=1.0, status=VerdictStatus.OK, reward=1.0)
    batch = build_batch(
        [ScoredEpisode(episode, verdict)], resolve_objective("sft"), {"counting": 1.0}, plain_classes, pad_id=0
    )
    assert batch.target_N.tolist() == batch.input_ids_BT[0, batch.position_N].tolist() == sampled


def plain_classes(ids: Any) -> TokenClasses:
    return TokenClasses(special=(False,) * len(ids), in_span=(False,) * len(ids))


@each_codec
def test_calls_are_marked_in_the_turn(codec: Any, chat_tokenizer: Callable[..., Any]) -> None:
    renderer = ChatRenderer(chat_tokenizer("qwen3"), codec)
    rendered = codec.render(ToolCall(name="add", arguments={"n": 1}))
    ids = renderer.encode_turn(f"<think>{rendered}</think>\nå\n{rendered}")
    inside = [token for token, flag in zip(ids, renderer.call_mask(ids), strict=True) if flag]
    assert renderer.decode_turn(inside).strip() == rendered
