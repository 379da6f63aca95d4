"""The arena in GPU memory, between two real processes."""

import multiprocessing
import socket
from typing import Any

import torch

from insitu.live.weights import handles
from insitu.live.weights.arena import Arena, plan

SHAPES = [("a", torch.bfloat16, (64, 32)), ("b", torch.float32, (7,))]


def learner(line: socket.socket) -> None:
    message, fd = handles.receive(line, want_fd=True)
    assert fd is not None
    arena = handles.open_arena(message, fd)
    arena.mark_writing()
    arena.views()["a"].fill_(3)
    arena.stamp(1, 2)
    handles.send(line, {"sha256": arena.sha256(), "b": arena.views()["b"].tolist()})
    handles.receive(line)  # until the server has looked: freeing first is not defined


def test_what_another_process_writes_is_read_here() -> None:
    arena = Arena.create(plan(SHAPES), "cuda")
    views: dict[str, Any] = arena.views()
    views["b"].copy_(torch.arange(7.0))
    torch.cuda.synchronize()
    ours, theirs = socket.socketpair()
    process = multiprocessing.get_context("spawn").Process(target=learner, args=(theirs,))
    process.start()
    handles.send(ours, arena.manifest(), arena.fd)
    told, _ = handles.receive(ours)
    assert told == {"sha256": arena.sha256(), "b": list(map(float, range(7)))}
    assert (views["a"] == 3).all()
    assert arena.header.label == "1+2"
    handles.send(ours, {})
    process.join()
    assert process.exitcode == 0
