"""Some processes that take orders, connected by gloo; this process as torchrun starts a single one."""

import os
import socket
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import runs
import torch
import torch.distributed as dist
from fresh import FORKS

from meanflow.training.trainer import train

# a hang fails after so long; a compiler at work takes its time
RANKS, SECONDS = 2, 240


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def started_by_torchrun(monkeypatch):
    """What `torchrun --nproc-per-node 1` tells its process: a World is then a process group of one."""
    told = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "TORCHELASTIC_RUN_ID": "of one"}
    for name, value in (told | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}).items():
        monkeypatch.setenv(name, str(value))


class Ranks:
    """Calls a function of (rank, ...) in each of some processes; what fails or hangs there fails here."""

    def __init__(self, count: int = RANKS):
        self.count = count
        self.start()

    def start(self):
        port = free_port()
        self.pipes, self.processes = [], []
        for rank in range(self.count):
            here, there = FORKS.Pipe()
            self.processes.append(FORKS.Process(target=serve, args=(rank, self.count, port, there), daemon=True))
            self.processes[-1].start()
            self.pipes.append(here)

    def stop(self):
        for process in self.processes:
            process.kill()
            process.join()

    def worked(self) -> float:
        """Seconds of the processor that the processes and what they ran have had."""
        stats = [Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split() for process in self.processes]
        return sum(int(ticks) for stat in stats for ticks in stat[11:15]) / os.sysconf("SC_CLK_TCK")

    def answers(self, pipe) -> bool:
        """Whether one answers before all have stopped working."""
        before = self.worked()
        while not pipe.poll(SECONDS):
            now = self.worked()
            if now - before < 1:
                return False
            before = now
        return True

    def __call__(self, work, *args):
        for pipe in self.pipes:
            pipe.send((work, args))
        answers = [pipe.recv() if self.answers(pipe) else (False, "no answer: hangs") for pipe in self.pipes]
        if not all(ok for ok, _ in answers):
            self.stop()
            self.start()
            pytest.fail("\n".join(str(answer) for ok, answer in answers if not ok))
        return [answer for _, answer in answers]


def serve(rank: int, count: int, port: int, pipe):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(count)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(hours=1))
    while True:
        work, args = pipe.recv()
        try:
            pipe.send((True, work(rank, *args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
        torch._dynamo.reset()


def train_tiny(rank: int, out: str, options: dict) -> int:
    return train(runs.tiny(**options), Path(out))


def train_guided(rank: int, out: str, options: dict) -> int:
    return train(runs.guided(**options), Path(out))
