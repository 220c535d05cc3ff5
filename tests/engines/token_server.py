"""A server with vLLM's token-in-token-out endpoints that samples by arithmetic: what it says depends on the weights it
was given, the prompt and the seed alone. Prompts that begin with one of the ids below make it misbehave, and so does an
update of its weights that says so. Half of what is cut was sampled, and what follows it ends."""

import argparse
import hashlib
import json
import os
import socket
import threading
import time
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SLOW, DEADLY, HANGING, ENDLESS = 1, 2, 3, 4
STATE = {"weights": "", "version": "default", "aborted": 0, "asked": 0, "loads": 0, "sent": 0, "left": 0, "port": ""}
GROUP = {}
CUTS = defaultdict(threading.Event)
"""Of requests, by their names."""


def sampled(weights: str, token_ids: list[int], seed: int, count: int) -> list[int]:
    digest = hashlib.blake2b(f"{weights}/{token_ids}/{seed}".encode(), digest_size=count).digest()
    return [100 + byte for byte in digest]


def read(folder: Path) -> str:
    """What the weights are, in words where there are any."""
    if (folder / "weights.txt").exists():
        return (folder / "weights.txt").read_text()
    return hashlib.blake2b(b"".join(file.read_bytes() for file in sorted(folder.glob("*.safetensors")))).hexdigest()


def init(question):
    if "no_transfer" in os.environ:
        return 500, {"error": "Weight transfer not configured"}
    info = question["init_info"]
    GROUP["socket"] = socket.create_connection((info["master_address"], info["master_port"]))
    GROUP["socket"].sendall(info["rank_offset"].to_bytes(4))
    return 200, {}


def start(question):
    if GROUP.setdefault("active", False):
        return 500, {"error": "start_weight_update called while a weight update is already active"}
    GROUP["active"] = True
    return 200, {}


def update(question):
    fault = question["update_info"]["faults"].get(STATE["port"])
    if fault == "dies":
        os._exit(9)
    if fault == "refuses":
        return 500, {"error": "out of memory"}
    with GROUP["socket"].makefile("rb") as stream:
        raw = stream.read(int.from_bytes(stream.read(8)))
    STATE["weights"] = hashlib.blake2b(raw).hexdigest()
    STATE["sent"] += 1
    return 200, {}


def finish(question):
    if not GROUP.pop("active", False):
        return 500, {"error": "finish_weight_update called without an update"}
    return 200, {}


def shutdown(question):
    STATE["left"] += 1
    GROUP.pop("socket").close()
    return 200, {}


TRANSFER = {
    "init_weight_transfer_engine": init,
    "start_weight_update": start,
    "update_weights": update,
    "finish_weight_update": finish,
    "shutdown_weight_transfer_engine": shutdown,
}
"""The phases of vLLM's weight transfer; the tensors come over a socket, as the bytes of a file of safetensors."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        version = {"weight_version": STATE["version"]}
        size = {"world_size": 2}
        models = {"data": [{"max_model_len": 512}]}
        answers = {
            "/health": None,
            "/v1/models": models,
            "/weight_info": version,
            "/state": STATE,
            "/get_world_size": size,
        }
        self.reply(*((200, answers[self.path]) if self.path in answers else (404, None)))

    def do_POST(self) -> None:
        question = json.loads(self.rfile.read(int(self.headers["content-length"])) or b"{}")
        if self.path == "/collective_rpc":
            STATE["loads"] += 1
            STATE["weights"] = read(Path(question["kwargs"]["weights_path"]))
            self.reply(200, {"results": [None]})
        elif self.path == "/reset_prefix_cache":
            self.reply(200, {"success": True})
        elif self.path == "/update_weight_version":
            STATE["version"] = question["new_version"]
            self.reply(200, {"success": True})
        elif self.path.strip("/") in TRANSFER:
            self.reply(*TRANSFER[self.path.strip("/")](question or {}))
        elif self.path == "/abort_requests":
            for name in question["request_ids"]:
                CUTS[name].set()
            self.reply(200, {})
        elif self.path == "/inference/v1/generate":
            cut = CUTS[f"generate-tokens-{question['request_id']}"]
            self.reply(*self.generate(question["token_ids"], question["sampling_params"], cut))
        else:
            self.reply(404, None)

    def generate(self, token_ids, params, cut):
        STATE["asked"] += 1
        if token_ids[0] == DEADLY:
            os._exit(9)
        if token_ids[0] == HANGING:
            time.sleep(3600)
        version, weights = STATE["version"], STATE["weights"]
        patience_s = 0.5 if token_ids[0] == SLOW else 3600 if token_ids == [ENDLESS] else 0
        is_cut = cut.wait(patience_s)
        ids = sampled(weights, token_ids, params["seed"], params["max_tokens"])
        ids = ids[: len(ids) // 2] if is_cut else ids
        choice = {
            "token_ids": ids,
            "finish_reason": "abort" if is_cut else "length",
            "weight_versions": [{"version": version, "start": 0, "end": len(ids)}],
            "logprobs": {"content": [{"token_id": token, "logprob": -1.0} for token in ids]},
        }
        return 200, {"choices": [choice]}

    def reply(self, status, answer) -> None:
        body = b"" if answer is None else json.dumps(answer).encode()
        try:
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):
            STATE["aborted"] += 1

    def log_message(self, *args: object) -> None:
        pass


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path)
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    options, _ = parser.parse_known_args()
    if (options.model / "broken").exists():
        raise SystemExit("RuntimeError: these weights cannot be loaded")
    STATE["weights"], STATE["port"] = read(options.model), str(options.port)
    ThreadingHTTPServer((options.host, options.port), Handler).serve_forever()
