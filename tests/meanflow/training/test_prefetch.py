"""Data made ahead: in order, restarted where asked, errors handed on, threads ended."""

import threading
import time
import traceback

import pytest
import torch

from meanflow.training.prefetch import Prefetcher


def prefetch_threads():
    return [t for t in threading.enumerate() if t.name == "prefetch"]


def test_in_order_and_ahead_but_no_further_than_depth():
    made = []
    with Prefetcher(lambda step: made.append(step) or {"step": step}, first=7, depth=3) as data:
        assert [data.get(step)["step"] for step in range(7, 12)] == [7, 8, 9, 10, 11]
        time.sleep(0.2)
        assert 11 < max(made) <= 11 + 3 + 1  # three are ready, one is in hand
    assert not prefetch_threads()


def test_another_step_starts_anew():
    with Prefetcher(lambda step: step, first=0) as data:
        assert [data.get(0), data.get(5), data.get(6), data.get(2), data.get(3)] == [0, 5, 6, 2, 3]
        assert len(prefetch_threads()) == 1


def make_or_fail(step):
    if step == 2:
        raise OSError("the disk is gone")
    return step


def test_errors_come_out_of_get_with_their_traceback():
    with Prefetcher(make_or_fail, first=0) as data:
        assert [data.get(0), data.get(1)] == [0, 1]
        for _ in range(2):  # asked again, it is tried again
            with pytest.raises(OSError, match="the disk is gone") as error:
                data.get(2)
            assert any(frame.name == "make_or_fail" for frame in traceback.extract_tb(error.value.__traceback__))
        assert data.get(3) == 3
    assert not prefetch_threads()


def test_waiting_is_counted():
    with Prefetcher(lambda step: time.sleep(0.05), first=0) as data:
        data.get(0)
        first = data.wait_seconds
        time.sleep(0.15)
        data.get(1)
        assert 0.03 < first and data.wait_seconds - first < 0.03


def test_closing_does_not_wait_for_what_nobody_asked():
    data = Prefetcher(lambda step: step, first=0, depth=1)
    time.sleep(0.05)  # the thread now waits for room
    start = time.perf_counter()
    data.close()
    data.close()
    assert time.perf_counter() - start < 1 and not prefetch_threads()
    assert data.get(4) == 4  # and it can go on
    data.close()


@pytest.mark.gpu
def test_tensors_are_pinned():
    with Prefetcher(lambda step: (torch.full((3,), step), None), first=0, pin=True) as data:
        x, nothing = data.get(0)
        assert x.is_pinned() and nothing is None and x.to("cuda", non_blocking=True).sum() == 0
