"""Ranks of a job, as processes of one server that has imported everything: starting one costs little."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any


def play(work: Callable[..., None], ranks: int, *words: Any, limit_s: float) -> None:
    """``work(rank, ranks, port, *words)`` in every rank, which meet at the port; who is not done in time is killed."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["agentopd.learner.deepspeed", "agentopd.train", "deepspeed"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=work, args=(rank, ranks, port, *words)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(limit_s)
        process.kill()
