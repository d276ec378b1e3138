"""Workers of one server, each a process that has only torch and vLLM's extension: python receiving.py WORKERS.

Each line of standard input is a call of all workers as vLLM's `/collective_rpc` has it; the answer is a line with their results.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from select import select
from typing import Any

import torch
from posttrain_receiver import Receiver  # pyrefly: ignore[missing-import]


class Worker(Receiver):
    """Keep the weights, and report their sums in float64."""

    def __init__(self, rank: int) -> None:
        self.rank, self.device = rank, torch.device("cpu")
        self.held: dict[str, torch.Tensor] = {}

    def reload_weights(self, weights_iterator: Any) -> None:
        self.held = {name: tensor.clone() for name, tensor in weights_iterator}

    def sums(self) -> dict[str, float]:
        return {name: float(tensor.double().sum()) for name, tensor in self.held.items()}

    def bits(self) -> dict[str, list[int]]:
        return {name: tensor.flatten().view(torch.uint8).tolist() for name, tensor in self.held.items()}

    def pid(self) -> int:
        return os.getpid()


def work(rank: int, requests: int, answers: int) -> None:
    worker, results = Worker(rank), os.fdopen(answers, "w")
    for line in os.fdopen(requests):
        call = json.loads(line)
        print(json.dumps(getattr(worker, call["method"])(**call["kwargs"])), file=results, flush=True)


def serve(workers: list[tuple[Any, Any]]) -> None:
    """Answer each call with the workers' results, or null as soon as one has died: vLLM's engine ends then."""
    for line in sys.stdin:
        for requests, _ in workers:
            with suppress(BrokenPipeError):
                print(line.strip(), file=requests, flush=True)
        results: dict[Any, Any] = {}
        while len(results) < len(workers) and None not in results.values():
            waiting = [answers for _, answers in workers if answers not in results]
            for answers in select(waiting, [], [])[0]:
                results[answers] = json.loads(answers.readline() or "null")
        dead = None in results.values()
        print(json.dumps(None if dead else [results[answers] for _, answers in workers]), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    started = []
    for number in range(int(sys.argv[1])):
        (read, write), (found, give) = os.pipe(), os.pipe()
        if not os.fork():  # before any thread
            for requests, answers in started:
                os.close(requests.fileno())
                os.close(answers.fileno())
            os.close(write)
            os.close(found)
            work(number, read, give)
            os._exit(0)
        os.close(read)
        os.close(give)
        started.append((os.fdopen(write, "w"), os.fdopen(found)))
    serve(started)
