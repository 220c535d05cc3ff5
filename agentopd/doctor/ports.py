"""Ports that a run listens on, and addresses that it goes to."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from agentopd.config import RunConfig
from agentopd.config.teachers import ServedTeacherConfig
from agentopd.doctor.diagnosis import Diagnosis
from agentopd.engines.http import Address

_CONNECT_S = 5.0
_AT_ONCE = 32


def ports(config: RunConfig) -> Iterable[Diagnosis]:
    """Ports to listen on can be had, and every address to go to takes connections."""
    told, wrong = _launcher(os.environ)
    asked = _addresses(config)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        faults = zip(asked, pool.map(lambda key: _unreachable(*asked[key]), asked), strict=True)
        wrong += [f"{key} {fault}" for key, fault in faults if fault]
    if asked:
        told.append(f"{', '.join(asked)} {'takes' if len(asked) == 1 else 'take'} connections")
    servers = config.rollout.servers.started if config.rollout.engine == "vllm_servers" else 0
    servers *= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if servers:
        fault = _no_local_ports(servers)
        wrong += [fault] if fault else []
        told.append(f"{servers} local {'port' if servers == 1 else 'ports'} for vLLM's servers can be had")
    detail = "; ".join(wrong or told or ["none is listened on, and no address is gone to"])
    yield Diagnosis("ports", "fail" if wrong else "ok", detail)


def _launcher(env: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """What there is to say of the address where the ranks of a launched job meet, and what is wrong with it."""
    if "RANK" not in env or "WORLD_SIZE" not in env:
        return [], []
    host, port = env.get("MASTER_ADDR", ""), env.get("MASTER_PORT", "")
    if not host or not port.isdigit():
        return [], [f"the ranks cannot meet at MASTER_ADDR {host!r}, MASTER_PORT {port!r}: set both, or use torchrun"]
    where = f"the ranks meet at {host}:{port}"
    if env.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun's own process listens there
        fault = _unreachable(host, int(port))
    elif env["RANK"] == "0":
        fault = _taken(int(port))
    else:
        fault = _unknown(host)  # nobody listens there before the first rank does
    return ([], [f"{where}, which {fault}"]) if fault else ([where], [])


def _addresses(config: RunConfig) -> dict[str, tuple[str, int]]:
    """Host and port of every address that the run goes to, by what the config calls it."""
    found: dict[str, tuple[str, int]] = {}
    for name, chosen in config.teachers.items():
        if isinstance(chosen, ServedTeacherConfig):
            address = Address.parse(chosen.base_url, key := f"teachers.{name}.base_url")
            found[f"{key} {address}"] = address.host, address.port
    for url in config.rollout.servers.urls:
        address = Address.parse(url, "rollout.servers.urls")
        found[f"rollout.servers.urls {address}"] = address.host, address.port
    ray = config.ray.address if config.ray is not None else None
    host, _, port = (ray or "").rpartition(":")
    if host and port.isdigit() and "://" not in host:
        found[f"ray.address {ray}"] = host, int(port)
    return found


def _unreachable(host: str, port: int) -> str:
    try:
        socket.create_connection((host, port), _CONNECT_S).close()
    except OSError as exc:
        return f"takes no connection ({exc.strerror or exc}): start what listens there, or correct the address"
    return ""


def _taken(port: int) -> str:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as exc:
            return f"cannot be listened on ({exc.strerror}): set MASTER_PORT to a free one"
    return ""


def _unknown(host: str) -> str:
    try:
        socket.getaddrinfo(host, None)
    except OSError as exc:
        return f"is no known host ({exc.strerror or exc}): correct MASTER_ADDR"
    return ""


def _no_local_ports(num: int) -> str:
    with ExitStack() as held:
        try:
            for _ in range(num):
                held.enter_context(socket.socket()).bind(("127.0.0.1", 0))
        except OSError as exc:
            return f"{num} local ports for vLLM's servers cannot be had: {exc.strerror}"
    return ""
