"""Inception Score, precision and recall, standard errors: closed forms, plain loops, and what repeated draws spread."""

import numpy as np
import pytest
import torch

from meanflow.errors import UserError
from meanflow.evaluation.frechet import Gaussian, Moments, frechet_distance
from meanflow.evaluation.scores import BLOCKS, blocks, frechet_score, inception_score, precision_recall

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def test_evaluation_blocks():
    for count in (20, 23, 57, 50_000):
        parts = blocks(torch.arange(count))
        assert len(parts) == BLOCKS and torch.equal(torch.cat(parts), torch.arange(count))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    with pytest.raises(UserError, match="count: got 19, wanted at least 20"):
        blocks(torch.arange(19))


def test_frechet_score_is_the_distance_of_all():
    reference = Moments.of(normal(200, 5, seed=1)).gaussian()
    x = normal(57, 5).float()
    assert frechet_score(x, reference).value == pytest.approx(
        frechet_distance(Moments.of(x).gaussian(), reference), rel=1e-9
    )


def test_frechet_interval_is_what_repeated_draws_spread():
    reference = Gaussian(torch.zeros(4, dtype=F64), torch.eye(4, dtype=F64))
    scores = [frechet_score(normal(400, 4, seed=i) * 1.5 + 0.3, reference) for i in range(60)]
    values = torch.tensor([s.value for s in scores])
    stderr = torch.tensor([s.stderr for s in scores]).square().mean().sqrt()
    assert 0.75 < float(stderr / values.std()) < 1.35
    truth = 4 * 0.3**2 + 4 * 0.5**2
    intervals = [s.as_dict()["interval"] for s in scores]
    assert sum(low <= truth <= high for low, high in intervals) >= 50  # 95 % of 60 are 57; bias in n takes some


def test_evaluation_inception_score():
    assert inception_score(torch.full((40, 7), 1 / 7)).value == pytest.approx(1)
    certain = torch.eye(8).repeat(5, 1)  # zeros have no logarithm
    assert inception_score(certain).value == pytest.approx(8)
    p = normal(30, 5).softmax(1)
    mean = p.mean(0)
    wanted = torch.stack([(row * (row / mean).log()).sum() for row in p]).mean().exp()
    assert inception_score(p).value == pytest.approx(float(wanted), rel=1e-12)
    assert inception_score(p).stderr is None
    # ADM's splits: 5,000 in order, then the rest
    parts = normal(7000, 5).softmax(1)
    got, each = inception_score(parts), [inception_score(part).value for part in parts.split(5000)]
    assert got.value == pytest.approx(sum(each) / 2) and got.stderr == pytest.approx(abs(each[0] - each[1]) / 2)


def test_inception_score_of_shuffled_splits():
    """As torch-fidelity and improved MeanFlow's code: numpy's permutation of seed 2020, then ten parts."""
    p = normal(57, 5).softmax(1)
    shuffled = p[torch.from_numpy(np.random.RandomState(2020).permutation(57))]
    each = []
    for i in range(10):
        part = shuffled[i * 57 // 10 : (i + 1) * 57 // 10]
        each.append(float((part * (part.log() - part.mean(0, keepdim=True).log())).sum(1).mean().exp()))
    got = inception_score(p, "shuffled")
    assert got.value == pytest.approx(np.mean(each), rel=1e-12) != inception_score(p).value
    assert got.stderr == pytest.approx(np.std(each, ddof=1) / 10**0.5)


def naive_share(x, centres):
    """For each x: is a centre as near as that centre's third neighbour?"""
    hits = 0
    for a in x:
        for i, c in enumerate(centres):
            others = sorted(float((c - d).norm()) for j, d in enumerate(centres) if j != i)
            if float((a - c).norm()) <= others[2]:
                hits += 1
                break
    return hits / len(x)


def test_evaluation_precision_and_recall(monkeypatch):
    fake, real = normal(40, 6) * 0.7, normal(25, 6, seed=1) + 0.5
    wanted = naive_share(fake, real), naive_share(real, fake)
    for rows in (2048, 7):  # however many rows at a time
        monkeypatch.setattr("meanflow.evaluation.scores.ROWS", rows)
        precision, recall = precision_recall(fake, real)
        assert (precision.value, recall.value) == pytest.approx(wanted)
    assert 0 < wanted[0] < 1 and 0 < wanted[1] < 1 and wanted[0] != wanted[1]
    few = precision_recall(fake, real[:12])[1]
    assert few.stderr is None and few.as_dict()["interval"] is None
    same = precision_recall(fake, fake.clone())
    assert [s.value for s in same] == [1, 1]
    assert [s.value for s in precision_recall(fake, real + 100)] == [0, 0]
    point = precision_recall(real[:1].repeat(30, 1) + 1e-3 * normal(30, 6), real)
    assert point[0].value == 1 and point[1].value < 0.2  # one mode: precise, and covers little
