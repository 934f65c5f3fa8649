"""The Fréchet distance against closed forms and scipy, also where covariances are singular; streamed statistics."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meanflow.errors import UserError
from meanflow.evaluation.frechet import Gaussian, Moments, frechet_distance, merge, read_statistics, write_statistics

F64 = torch.float64
TOLERANCE = 1e-6  # relative; what is measured is 1e-9 and better


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=F64)


def rotation(width: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(normal(width, width, seed=seed))[0]


def relative(got: float, wanted: float) -> float:
    return abs(got - wanted) / abs(wanted)


def with_spectrum(values: torch.Tensor, basis: torch.Tensor, mean: torch.Tensor) -> Gaussian:
    return Gaussian(mean, (basis * values) @ basis.T)


ROWS = torch.arange(40)
SPECTRA = {
    "even": (torch.linspace(0.5, 2, 40, dtype=F64), torch.linspace(3, 1, 40, dtype=F64)),
    "ill-conditioned": (torch.logspace(-9, 3, 40, dtype=F64), torch.logspace(2, -8, 40, dtype=F64)),
    "low rank": ((ROWS < 7).double(), (ROWS >= 3) * 2.0),
    "disjoint": ((ROWS < 20).double(), (ROWS >= 20) * 3.0),
    "a point": (torch.zeros(40, dtype=F64), torch.linspace(3, 1, 40, dtype=F64)),
}  # fmt: skip


@pytest.mark.parametrize("basis", ["diagonal", "commuting"])
@pytest.mark.parametrize("spectra", SPECTRA.values(), ids=SPECTRA)
def test_closed_form(spectra, basis):
    a, b = (x.double() for x in spectra)
    means = normal(2, 40, seed=5)
    axes = torch.eye(40, dtype=F64) if basis == "diagonal" else rotation(40)
    got = frechet_distance(with_spectrum(a, axes, means[0]), with_spectrum(b, axes, means[1]))
    wanted = float((means[0] - means[1]).square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    assert relative(got, wanted) < TOLERANCE


@pytest.mark.parametrize("width, count", [(3, 50), (24, 200), (64, 1000)])
def test_against_scipy(width, count):
    mixing = normal(width, width, seed=1)
    a, b = Moments.of(normal(count, width, seed=2) @ mixing), Moments.of(normal(count, width, seed=3) * 2 + 0.3)
    a, b = a.gaussian(), b.gaussian()
    root = scipy.linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy())
    trace = (a.covariance + b.covariance).trace() - 2 * np.trace(root).real
    assert relative(frechet_distance(a, b), float((a.mean - b.mean).square().sum() + trace)) < TOLERANCE


@pytest.mark.parametrize("counts", [(5, 9), (30, 300), (30, 30)], ids=str)
def test_fewer_samples_than_dimensions(counts):
    """With deviations X (n, D) the trace of the root is the sum of the singular values of X_a X_b^T: no root at all."""
    a, b = normal(counts[0], 100) * torch.logspace(1, -4, 100, dtype=F64) + 3, normal(counts[1], 100, seed=1)
    x, y = ((f - f.mean(0)) / (len(f) - 1) ** 0.5 for f in (a, b))
    cross = torch.linalg.svdvals(x @ y.T).sum()
    wanted = (a.mean(0) - b.mean(0)).square().sum() + x.square().sum() + y.square().sum() - 2 * cross
    got = frechet_distance(Moments.of(a).gaussian(), Moments.of(b).gaussian())
    assert relative(got, float(wanted)) < 1e-9


@pytest.mark.parametrize("rank", [1, 20])
def test_rounding_errors_of_a_singular_covariance_add_nothing(rank):
    """Their roots would: each is 1e-8, and there are hundreds."""
    values = torch.cat([torch.linspace(1, 2, rank), torch.zeros(400 - rank)]).double()
    zero, basis = torch.zeros(400, dtype=F64), rotation(400)
    got = frechet_distance(with_spectrum(values, basis, zero), Gaussian(zero, torch.eye(400, dtype=F64)))
    assert relative(got, float((values.sqrt() - 1).square().sum())) < 1e-11


def test_distance_to_itself_is_zero():
    for count in (20, 300):
        a = Moments.of(normal(count, 100) + 100).gaussian()
        assert abs(frechet_distance(a, a)) < 1e-11 * float(a.covariance.trace())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(0.1, 10), count=st.integers(3, 40))
def test_symmetric_invariant_and_quadratic(seed, scale, count):
    a, b, turn = normal(count, 12, seed=seed), normal(count + 5, 12, seed=seed + 1) * 1.5, rotation(12, seed)

    def distance(x, y):
        return frechet_distance(Moments.of(x).gaussian(), Moments.of(y).gaussian())

    wanted = distance(a, b)
    assert relative(distance(b, a), wanted) < TOLERANCE
    assert relative(distance(a @ turn + 7, b @ turn + 7), wanted) < TOLERANCE
    assert relative(distance(a * scale, b * scale), wanted * scale**2) < TOLERANCE


def test_widths_must_agree():
    with pytest.raises(UserError, match="both must be of the same features"):
        frechet_distance(Moments.of(normal(5, 3)).gaussian(), Moments.of(normal(5, 4)).gaussian())
    with pytest.raises(UserError, match="count: got 1, wanted at least two"):
        Moments.of(normal(1, 3)).gaussian()


@pytest.mark.parametrize("offset", [0, 1e4], ids=["centred", "far"])
@pytest.mark.parametrize("sizes", [[500], [1] * 40 + [460], [0, 64, 64, 0, 372], [250, 250]], ids=lambda s: f"{len(s)}")
def test_streamed_statistics_equal_two_passes(sizes, offset):
    x = normal(500, 16).float() + offset  # fp32 features, as networks give them
    got = merge(Moments.of(part) for part in x.split(sizes))
    exact = x.double()
    deviations = exact - exact.mean(0)
    wanted = deviations.T @ deviations / 499
    assert got.count == 500
    assert (got.mean - exact.mean(0)).abs().max() < 1e-12 * (1 + offset)
    assert (got.gaussian().covariance - wanted).abs().max() < 1e-11 * wanted.abs().max()
    assert np.allclose(wanted, np.cov(exact.numpy(), rowvar=False), rtol=1e-9, atol=1e-12 + 1e-12 * offset)


def test_same_parts_same_bits():
    parts = [Moments.of(x) for x in normal(300, 8).split([100, 7, 193])]
    a, b = merge(parts), merge(list(parts))
    assert torch.equal(a.comoment, b.comoment) and torch.equal(a.mean, b.mean)


def test_ranks_equal_one():
    x = normal(640, 12) + 5
    batches = x.split(64)
    one = merge(Moments.of(b) for b in batches).gaussian()
    ranks = merge(merge(Moments.of(b) for b in batches[rank::3]) for rank in range(3)).gaussian()
    other = Moments.of(normal(100, 12, seed=9)).gaussian()
    assert relative(frechet_distance(ranks, other), frechet_distance(one, other)) < 1e-12


def test_statistics_file(tmp_path):
    a, b = Moments.of(normal(50, 6)).gaussian(), Moments.of(normal(50, 4)).gaussian()
    write_statistics(tmp_path / "new" / "stats.npz", {"pool3": a, "spatial": b}, count=50, resize="tensorflow")
    with np.load(tmp_path / "new" / "stats.npz", allow_pickle=False) as arrays:
        assert set(arrays) == {"mu", "sigma", "mu_s", "sigma_s", "count", "resize"}
        assert arrays["sigma"].dtype == np.float64 and int(arrays["count"]) == 50 and arrays["resize"] == "tensorflow"
    found = read_statistics(tmp_path / "new" / "stats.npz")
    assert torch.equal(found["pool3"].covariance, a.covariance) and torch.equal(found["spatial"].mean, b.mean)
    np.savez(tmp_path / "official.npz", ref_mu=np.zeros(3, np.float32), ref_sigma=np.eye(3, dtype=np.float32))
    assert read_statistics(tmp_path / "official.npz")["pool3"].covariance.dtype == F64
    with pytest.raises(UserError, match="cannot be written"):
        (tmp_path / "file").touch()
        write_statistics(tmp_path / "file" / "stats.npz", {"pool3": a})


class Malicious:
    def __reduce__(self):
        return exec, ("open('ran', 'w').close()",)


def test_bad_statistics_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = tmp_path / "good.npz"
    write_statistics(good, {"pool3": Moments.of(normal(50, 60)).gaussian()})
    (tmp_path / "short.npz").write_bytes(good.read_bytes()[:5000])
    np.savez(tmp_path / "pickled.npz", mu=np.array([Malicious()]), sigma=np.eye(1))
    np.savez(tmp_path / "shapes.npz", mu=np.zeros(3), sigma=np.eye(4))
    np.savez(tmp_path / "nan.npz", mu=np.full(3, np.nan), sigma=np.eye(3))
    (tmp_path / "text.npz").write_text("hello")
    for name in ("short", "pickled", "shapes", "nan", "text", "missing"):
        with pytest.raises(UserError, match="reference.*wanted") as caught:
            read_statistics(tmp_path / f"{name}.npz")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
