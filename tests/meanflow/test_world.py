"""Processes that find each other, whatever those before them left behind."""

import threading

import pytest
import runs
import torch
import torch.distributed as dist
from ranks import started_by_torchrun

from meanflow.errors import UserError
from meanflow.training.trainer import train
from meanflow.world import World, choose_device, fresh_store


def meet(store, size):
    """Names of the parts that processes of now agree on."""
    names = [None] * size

    def join(rank):
        part = fresh_store(store, rank, size)
        part.set(str(rank), "now")
        names[rank] = part

    threads = [threading.Thread(target=join, args=(rank,), daemon=True) for rank in reversed(range(size))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return names


def test_processes_meet_apart_from_those_that_died():
    store = dist.HashStore()
    first = meet(store, 3)
    assert all(part.get("2") == b"now" for part in first)
    # the keys of the first attempt are still there
    store.set("hello/2", "somebody who died while greeting")
    second = meet(store, 3)
    first[0].set("address", "old")
    assert not second[1].check(["address"])
    second[0].set("address", "new")
    assert all(part.get("address") == b"new" for part in second)


def test_one_process_alone_agrees_with_itself(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    with World("cpu") as world:
        assert world.is_main and world.size == 1 and not dist.is_initialized()
        assert world.broadcast(3) == 3 and world.gather(3) == [3] and world.poll_stop(True)
        assert world.sum(torch.ones(2)).tolist() == [1, 1]

        def complain():
            raise UserError("name: got 1, wanted 2; change it")

        assert str(world.first_error(complain)).startswith("name")
        with pytest.raises(UserError):
            world.agree(complain)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    assert train(runs.tiny(steps=4, accumulate=2), out) == 0
    return out


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_group_of_one_trains_as_a_process_alone(parallel, alone, tmp_path, monkeypatch):
    started_by_torchrun(monkeypatch)
    with World("cpu") as world:
        assert world.connected and world.size == dist.get_world_size() == 1 and world.gather(3) == [3]
        assert world.sum(torch.ones(2)).tolist() == [1, 1]
    assert not dist.is_initialized()
    # stopped in between, so that it resumes from its own checkpoint
    for steps in (3, 4):
        assert train(runs.tiny(steps=steps, accumulate=2, parallel=parallel), tmp_path) == 0
    assert runs.final_state(tmp_path) == runs.final_state(alone)


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="torchrun: got process 3 on a machine of 2 GPU.*--nproc-per-node 2") as error:
        choose_device("auto")
    assert "\n" not in str(error.value)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device("auto") == torch.device("cuda", 1)
