"""Shared fixtures: benchmark slices, chat endpoints over real HTTP, tokenizers with well-known chat templates."""

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Timings belong to benchmarks/: a busy machine must not fail a property.
settings.register_profile("agentopd", deadline=None, derandomize=True)
settings.load_profile("agentopd")

FAMILIES = {
    "qwen3": ("<|im_end|>", "<|endoftext|>", ["<|im_start|>", "<tool_call>", "</tool_call>", "<think>", "</think>"]),
    "llama3": ("<|eot_id|>", "<|begin_of_text|>", ["<|start_header_id|>", "<|end_header_id|>"]),
    "mistral": ("</s>", "<s>", ["[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"]),
}
"""End of turn, beginning of text, further markers."""


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The directory of benchmark slices, from ``AGENTOPD_DATA``."""
    where = os.environ.get("AGENTOPD_DATA")
    if not where:
        pytest.skip("AGENTOPD_DATA is not set: point it at the folder of benchmark slices (gsm8k_dev.jsonl, ...)")
    path = Path(where)
    if not (path / "gsm8k_dev.jsonl").is_file():
        pytest.fail(f"AGENTOPD_DATA={where!r} has no gsm8k_dev.jsonl")
    return path


class ChatServer:
    """An OpenAI-compatible chat endpoint in a thread. ``reply(question, messages)`` returns (status, body or text).

    A string is sent as the assistant's message; a dictionary is the whole body. Every request is kept.
    """

    def __init__(self, reply: Callable[[str, list[dict[str, str]]], tuple[int, Any]]) -> None:
        self.requests: list[dict[str, Any]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                server.requests.append(body)
                status, answer = reply(body["messages"][-1]["content"], body["messages"])
                if isinstance(answer, str):
                    message = {"role": "assistant", "content": answer}
                    answer = {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
                data = json.dumps(answer).encode()
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    self.send_response(status)
                    self.send_header("content-type", "application/json")
                    self.send_header("retry-after-ms", "1")
                    self.send_header("content-length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)

            def log_message(self, *args: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.base_url = f"http://127.0.0.1:{self._http.server_port}/v1"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


@pytest.fixture
def serve() -> Iterator[Callable[..., ChatServer]]:
    """Start chat servers; all are stopped after the test."""
    servers: list[ChatServer] = []

    def start(reply: Callable[[str, list[dict[str, str]]], tuple[int, Any]]) -> ChatServer:
        servers.append(ChatServer(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def honest(question: str, messages: list[dict[str, str]]) -> tuple[int, str]:
    """A rule-based teacher and judge: its criteria are strings of the references, and it looks for them."""
    if messages[0]["content"].startswith("You write grading rubrics"):
        body = json.loads(question)
        words = list(dict.fromkeys(" ".join(body["references"]).split()))[:4]
        words += [f"filler {i}" for i in range(4 - len(words))]
        criteria = [{"text": f"contains: {word}", "weight": (5, 1, 1, 1)[i]} for i, word in enumerate(words)]
        return 200, json.dumps({"criteria": criteria})
    if messages[0]["content"].startswith("You grade answers"):
        body = json.loads(question)
        rules = [criterion.removeprefix("contains: ") for criterion in body["criteria"]]
        met = {label: [int(rule in answer) for rule in rules] for label, answer in body["answers"].items()}
        return 200, f"```json\n{json.dumps({'scores': met})}\n```"
    return 200, "7 is the answer"


@pytest.fixture
def honest_server(serve: Callable[..., ChatServer]) -> ChatServer:
    """A chat endpoint that grades honestly."""
    return serve(honest)


@pytest.fixture(scope="session")
def chat_tokenizer() -> "Callable[..., PreTrainedTokenizerFast]":
    """``chat_tokenizer(family, kind=PreTrainedTokenizerFast)``: byte-level, with the family's template and markers."""
    # Here, because every process reads this file and the one that only deals out tests needs none of it.
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    def make(family: str, kind: type[PreTrainedTokenizerFast] = PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
        eos, bos, markers = FAMILIES[family]
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=340,
            special_tokens=[bos, eos, *markers],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(["the assistant adds the number to the total"] * 4, trainer)
        fast = kind(tokenizer_object=tokenizer, eos_token=eos, bos_token=bos, name_or_path=f"{family}-style")
        fast.chat_template = (Path(__file__).parent / "templates" / f"{family}.jinja").read_text()
        return fast

    return make
