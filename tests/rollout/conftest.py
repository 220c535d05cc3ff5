import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from agentopd.contracts import AssistantTurn, EpisodeContext, Generation, GenerationRequest, StepResult
from agentopd.errors import SandboxError, ToolError
from agentopd.rendering import ChatRenderer, HermesJSON
from agentopd.rendering.micro_template import MICRO_CHAT_TEMPLATE
from agentopd.types import Event, Limits, Message, Split, Task, ToolSchema

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"]


class CounterEnvironment:
    """Counts up with ``add``; ``done`` or a turn without calls ends it. The tool ``fail`` fails in many ways."""

    name: ClassVar[str] = "counter"
    version: ClassVar[str] = "1"
    opened: ClassVar[list["CounterEnvironment"]] = []

    def __init__(self) -> None:
        self.total = 0
        self.turns = 0
        self.closed = 0
        self.broken: set[str] = set()
        self.opened.append(self)

    @classmethod
    def tool_schemas(cls, task: Task) -> tuple[ToolSchema, ...]:
        return (ToolSchema(name="add", parameters={"type": "object", "properties": {"n": {"type": "integer"}}}),)

    @classmethod
    def load_tasks(cls, split: Split, source: str, limit: int | None, seed: int) -> Iterable[Task]:
        return ()

    async def reset(self, task: Task, ctx: EpisodeContext) -> tuple[Message, ...]:
        self.task, self.context = task, ctx
        self.broken = set(task.public.get("broken", ()))
        if "slow" in self.broken:
            await asyncio.sleep(30)
        if "constructor" in self.broken or "reset" in self.broken:
            raise RuntimeError("reset broke")
        return task.prompt

    async def step(self, action: AssistantTurn) -> StepResult:
        self.turns += 1
        await asyncio.sleep(self.task.public.get("sleep_s", 0))
        if action.malformed:
            return StepResult((Message(role="tool", content=f"malformed: {action.malformed[0].reason}"),))
        if not action.tool_calls:
            return StepResult(done=True)
        (call, *_) = action.tool_calls
        if call.name == "fail":
            self._fail(str(call.arguments["how"]))
        if call.name == "silent":
            return StepResult()
        self.total += int(call.arguments["n"])
        event = Event(turn=self.turns - 1, kind="tool_call", data={"name": call.name})
        note = f"{self.total} (roll {self.context.rng.randint(1, 6)})"
        return StepResult((Message(role="tool", content=note),), events=(event,))

    def _fail(self, how: str) -> None:
        raise {"tool": ToolError("no such counter"), "sandbox": SandboxError("jail died"), "bug": KeyError("oops")}[how]

    def state(self) -> dict[str, Any]:
        if "state" in self.broken:
            raise RuntimeError("state broke")
        return {"total": self.total}

    async def close(self) -> None:
        self.closed += 1
        if "close" in self.broken:
            raise RuntimeError("close broke")


class TalkingEngine:
    """Answers each request with what ``say`` returns for it, as exact ids; keeps every batch it was given."""

    max_context = 400

    def __init__(self, renderer: ChatRenderer, say: Callable[[GenerationRequest], str], lockstep: bool = True) -> None:
        self.renderer, self.say, self.lockstep = renderer, say, lockstep
        self.batches: list[list[GenerationRequest]] = []

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        self.batches.append(list(requests))
        await asyncio.sleep(0)
        return [self._one(request) for request in requests]

    def _one(self, request: GenerationRequest) -> Generation:
        ids = self.renderer.encode_turn(self.say(request))
        room = request.params.max_tokens
        finish = "stop" if len(ids) <= room else "length"
        return Generation(tuple(ids[:room]), (-0.5,) * len(ids[:room]), finish, weight_version=4)

    def sync_weights(self, version: int) -> dict[str, float]:
        return {}

    def sleep(self) -> None:
        pass

    async def aclose(self) -> None:
        pass


@pytest.fixture(scope="session")
def tokenizer_parts() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(['{"name": "add", "arguments": {"n": 1}}'] * 3, trainer)
    return tokenizer


@pytest.fixture
def renderer(tokenizer_parts: Tokenizer) -> ChatRenderer:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer_parts, eos_token="<|im_end|>")
    fast.chat_template = MICRO_CHAT_TEMPLATE
    return ChatRenderer(fast, HermesJSON())


@pytest.fixture
def counter() -> type[CounterEnvironment]:
    CounterEnvironment.opened.clear()
    return CounterEnvironment


@pytest.fixture
def make_task() -> Callable[..., Task]:
    def make(id: str = "t", limits: Limits | None = None, prompt: str = "Count to 3.", **public: Any) -> Task:
        return Task(
            id=id,
            env="counter",
            prompt=(Message(role="user", content=prompt),),
            public=public,
            hidden={"goal": "CANARY"},
            privileged={"hint": "CANARY"},
            limits=limits or Limits(),
        )

    return make


@pytest.fixture
def talk(renderer: ChatRenderer) -> Callable[..., TalkingEngine]:
    """An engine that says the n-th text at an episode's n-th turn (the last one for ever)."""

    def make(*texts: str, lockstep: bool = True) -> TalkingEngine:
        start = renderer.tokenizer.get_vocab()["<|im_start|>"]

        def say(request: GenerationRequest) -> str:
            # Two markers open the prompt (user, assistant), one more tool system turn, two more each later turn.
            turn = (list(request.token_ids).count(start) - 3) // 2
            return texts[min(turn, len(texts) - 1)]

        return TalkingEngine(renderer, say, lockstep)

    return make
