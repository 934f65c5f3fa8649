"""The evaluation as a run: samples by protocol, files that resume, processes that share the work, references, report.

The feature network is a small one of the tests' own: what is tested is what is drawn, kept and compared.
"""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from meanflow.draws import Draws, Purpose
from meanflow.errors import UserError
from meanflow.evaluation.evaluator import Evaluator, Plan, Sampler, evaluate, schedule_name, table
from meanflow.evaluation.features import ImageStatistics
from meanflow.evaluation.fid_reference import ADM_FILE, Sources, load_reference
from meanflow.evaluation.frechet import Moments, frechet_distance, read_statistics
from meanflow.evaluation.protocols import named, quantize
from meanflow.method.sampling import sample
from meanflow.world import World

SHAPE, CLASSES, COUNT, BATCH = (3, 8, 8), 5, 44, 8
ODD = 37  # five batches, which two processes cannot halve
CPU = torch.device("cpu")
PROTOCOLS = ("official", "balanced", "round", "floor", "pytorch-fid", "clean-fid", "own-data")


class Net(nn.Module):
    """A velocity that depends on everything, and remembers what it was asked."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, CLASSES), requires_grad=False)
        self.asked = []

    def forward(self, z, r, t, y):
        self.asked.append((z.clone(), r.clone(), t.clone(), y.clone()))
        return 0.7 * z + (self.weight[y] * (t - r))[:, None, None, None]


class Features:
    """Stands in for Extractor: a few numbers an image, by the resize too; remembers what it was shown."""

    device = CPU

    def __init__(self):
        self.shown = []

    def identity(self):
        return {"inception_sha256": "0" * 64, "inception_is_standard": False, "dinov2_sha256": None}

    def __call__(self, images, resize):
        assert images.dtype == torch.uint8
        self.shown.append((resize, images.clone()))
        x = images.float() + {"tensorflow": 0, "pytorch": 1, "clean": 2}[resize]
        mixing = torch.randn(x[0].numel(), 6, generator=torch.Generator().manual_seed(0))
        # in fp64, for in fp32 the last bits depend on how many images there are beside
        pool = ((x.flatten(1).double() / 255) @ mixing.double()).float()
        return {"pool3": pool, "spatial": pool[:, :3].square()}

    def probabilities(self, pool3):
        return pool3.softmax(1)


def sampler(net=None, seed=3):
    return Sampler(net or Net(), lambda z: z, SHAPE, CLASSES, seed, CPU)


def real_images(count, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


@pytest.fixture
def sources(tmp_path):
    np.savez(tmp_path / "adm.npz", arr_0=real_images(30))
    folder = tmp_path / "real" / "below"
    folder.mkdir(parents=True)
    for i, pixels in enumerate(real_images(25, seed=1)):
        Image.fromarray(pixels).save((folder.parent if i % 2 else folder) / f"{i:02d}.png")
    return {"adm": tmp_path / "adm.npz", "data": tmp_path / "real"}


def plan(protocols=PROTOCOLS, schedules=((1.0, 0.0),), count=COUNT):
    return Plan(count, schedules, {name: named(name) for name in protocols}, BATCH)


def run(sources, out, *, net=None, features=None, plan=plan(), identity=None):
    identity = identity or {"weights": "a", "seed": 3}
    return evaluate(sampler(net), features or Features(), plan, sources, out, identity, World("cpu"))


def numbers(report):
    return {(row["protocol"], row["evaluations"]): row for row in report["results"]}


# --- what a protocol changes ---


def test_protocols_change_only_what_they_say(sources, tmp_path):
    """Official beside one other at a time: the noise, labels, pixels and reference that reach the networks."""

    def seen(*protocols):
        net = Net()
        report = run(sources, tmp_path / "-".join(protocols), net=net, plan=plan(protocols))
        return net.asked, numbers(report)

    official_asked, official = seen("official")
    noise = torch.cat([z for z, *_ in official_asked])
    assert torch.equal(noise, Draws(3, 0, torch.arange(COUNT)).normal(Purpose.NOISE, SHAPE))  # scripts/sample.py's
    for name in PROTOCOLS[1:]:
        asked, rows = seen("official", name)
        # the official numbers are the same beside any other
        assert rows["official", 1] == official["official", 1]
        axis = {k for k, v in named(name).describe().items() if v != named("official").describe()[k]}
        if axis == {"labels"}:
            assert len(asked) == 2 * len(official_asked)
            other = asked[len(official_asked) :]
            for (z, r, t, y), (z2, r2, t2, y2) in zip(official_asked, other, strict=True):
                assert torch.equal(z, z2) and torch.equal(r, r2) and torch.equal(t, t2) and not torch.equal(y, y2)
            assert torch.equal(torch.cat([y for *_, y in other]), torch.arange(COUNT) % CLASSES)
        else:  # one drawing of samples serves all
            assert len(asked) == len(official_asked)
            for ours, theirs in zip(asked, official_asked, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        row, base = rows[name, 1], official["official", 1]
        changed = {key for key in row if row[key] != base[key]} - {"protocol"}
        assert axis <= changed
        if axis == {"reference"}:
            assert row["inception_score"] == base["inception_score"] and row["reference_source"] == str(sources["data"])
        else:
            assert row["reference_source"] == base["reference_source"]


def test_protocol_pixels(sources, tmp_path):
    features = Features()
    run(sources, tmp_path / "out", features=features, plan=plan(("official", "round", "floor", "pytorch-fid")))
    draws = Draws(3, 0, torch.arange(BATCH))
    images = sample(Net(), draws.normal(Purpose.NOISE, SHAPE), draws.integers(Purpose.SAMPLE_LABEL, CLASSES))
    views = [("truncate", "tensorflow"), ("round", "tensorflow"), ("floor", "tensorflow"), ("truncate", "pytorch")]
    batches = -(-COUNT // BATCH)
    assert len(features.shown) == 2 * -(-30 // BATCH) + 4 * batches  # two resizes of the reference, four views
    for (rounding, resize), (used, pixels) in zip(views, features.shown[-4 * batches :][:4], strict=True):
        assert used == resize and torch.equal(pixels, quantize(images, rounding))


def test_evaluation_report(sources, tmp_path):
    schedules = ((1.0, 0.0), (1.0, 0.5, 0.0), (1.0, 0.25, 0.0))
    report = run(sources, tmp_path / "out", plan=plan(("official", "own-data"), schedules))
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report["results"]) == 6
    for row in report["results"]:
        assert {"protocol", "reference", "labels", "rounding", "resize", "count", "times", "evaluations"} <= set(row)
        for score in ("fid", "sfid", "precision", "recall"):
            low, high = row[score]["interval"]
            assert low <= row[score]["value"] <= high
        assert row["inception_score"]["interval"] is None  # one split
    # the numbers are those of the features, all at once
    draws = Draws(3, 0, torch.arange(COUNT))
    images = sample(
        Net(), draws.normal(Purpose.NOISE, SHAPE), draws.integers(Purpose.SAMPLE_LABEL, CLASSES), schedules[1]
    )
    real = torch.from_numpy(real_images(30)).permute(0, 3, 1, 2)
    for score, kind in (("fid", "pool3"), ("sfid", "spatial")):
        a, b = (Moments.of(Features()(x, "tensorflow")[kind]).gaussian() for x in (quantize(images, "truncate"), real))
        assert report["results"][2][score]["value"] == pytest.approx(frechet_distance(a, b), rel=1e-9)
    names = [schedule_name(times) for times in schedules]
    assert names[:2] == ["nfe1", "nfe2"] and names[2].startswith("nfe2-")
    for name in names:
        assert Image.open(tmp_path / "out" / f"samples_{name}_uniform.png").size[0] > 8 * 8
    lines = table(report).splitlines()
    assert lines[0].startswith("official (adm, uniform, truncate, tensorflow), 1 step(s), 44 images: fid ")
    assert "no published number compares" in lines[-2] and "equal counts" in lines[-1]


# --- resuming ---


def test_interrupted_evaluation_continues(sources, tmp_path):
    everything = plan(("official", "balanced", "floor"), ((1.0, 0.0), (1.0, 0.5, 0.0)))
    whole = Net()
    wanted = run(sources, tmp_path / "whole", net=whole, plan=everything)

    class Dies(Features):
        def __call__(self, images, resize):
            if len(self.shown) == 20:
                raise KeyboardInterrupt
            return super().__call__(images, resize)

    first, second = Net(), Net()
    with pytest.raises(KeyboardInterrupt):
        run(sources, tmp_path / "out", net=first, features=Dies(), plan=everything)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    assert files
    got = run(sources, tmp_path / "out", net=second, plan=everything)
    assert got["results"] == wanted["results"]
    assert all(path.stat().st_mtime_ns == time for path, time in files.items())  # nothing is done twice
    # but the batch that was in the works: its samples are drawn again
    assert len(whole.asked) <= len(first.asked) + len(second.asked) <= len(whole.asked) + 2
    third = Net()
    assert run(sources, tmp_path / "out", net=third, plan=everything)["results"] == wanted["results"]
    assert not third.asked
    # more protocols and samples take what is there
    more = Net()
    run(sources, tmp_path / "out", net=more, plan=plan(("official", "round"), count=COUNT + BATCH))
    assert len(more.asked) == 7


def test_evaluation_of_something_else_is_refused(sources, tmp_path):
    run(sources, tmp_path / "out")
    with pytest.raises(UserError, match="weights: got 'b', wanted 'a', as in the evaluation that"):
        run(sources, tmp_path / "out", identity={"weights": "b", "seed": 3})
    broken = next((tmp_path / "out" / "features").rglob("*.safetensors"))
    broken.write_bytes(broken.read_bytes()[:50])
    with pytest.raises(UserError, match="remove it and repeat the command"):
        run(sources, tmp_path / "out")


def test_evaluation_of_a_diverged_network_is_refused(sources, tmp_path):
    net = Net()
    net.weight[0] = float("nan")
    with pytest.raises(UserError, match="samples: got .* not finite"):
        run(sources, tmp_path / "out", net=net)


# --- references ---


def test_evaluation_references(sources, tmp_path):
    world, features = World("cpu"), Features()
    args = dict(extractor=features, resize="tensorflow", kept=tmp_path / "kept", batch=7, world=world)
    adm = load_reference("adm", sources["adm"], **args)
    real = Features()(torch.from_numpy(real_images(30)).permute(0, 3, 1, 2), "tensorflow")["pool3"]
    assert torch.allclose(adm.features, real, rtol=1e-6)
    assert torch.allclose(adm.statistics["pool3"].covariance, Moments.of(real).gaussian().covariance, rtol=1e-5)
    shown = len(features.shown)
    again = load_reference("adm", sources["adm"], **args)
    assert len(features.shown) == shown and torch.equal(again.features, adm.features)  # kept
    load_reference("adm", sources["adm"], **(args | {"resize": "clean"}))
    assert len(features.shown) == 2 * shown
    np.savez(sources["adm"], arr_0=real_images(30, seed=5))
    assert not torch.equal(load_reference("adm", sources["adm"], **args).features, adm.features)  # another file
    # ADM's own statistics win over those of the images beside them
    np.savez(tmp_path / "both.npz", arr_0=real_images(30), mu=np.zeros(6), sigma=np.eye(6))
    both = load_reference("adm", tmp_path / "both.npz", **args)
    assert both.statistics["pool3"].mean.abs().max() == 0 and "spatial" in both.statistics
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(6), sigma=np.eye(6))
    alone = load_reference("adm", tmp_path / "statistics.npz", **args)
    assert alone.features is None and set(alone.statistics) == {"pool3"}


def test_evaluation_with_statistics_alone(sources, tmp_path):
    np.savez(tmp_path / "statistics.npz", ref_mu=np.zeros(6), ref_sigma=np.eye(6))
    report = run({"adm": tmp_path / "statistics.npz"}, tmp_path / "out", plan=plan(("official",)))
    assert {"fid", "inception_score"} <= set(report["results"][0])
    assert not {"sfid", "precision", "recall", "fdd"} & set(report["results"][0])


def test_protocols_of_improved_meanflow_have_statistics_of_their_own(sources, tmp_path):
    np.savez(tmp_path / "imf.npz", ref_mu=np.zeros(6), ref_sigma=np.eye(6))
    np.savez(tmp_path / "jit.npz", mu=np.ones(6), sigma=np.eye(6))
    given = Sources(imf_reference=tmp_path / "imf.npz", jit_reference=tmp_path / "jit.npz").by_kind()
    asked = plan(("imf-jax", "imf-torch"))
    jax, torch_ = run(given, tmp_path / "out", plan=asked)["results"]
    assert [row["reference_source"] for row in (jax, torch_)] == [str(given["imf"]), str(given["jit"])]
    assert jax["fid"] != torch_["fid"] and jax["inception_score"]["stderr"] > 0
    lines = {"imf": "imagenet_256_fid_stats.npz; fetch https://huggingface.co/Lyy0725/iMF/.*--imf-reference FILE"}
    lines["jit"] = "jit_in256_stats.npz; fetch https://raw.githubusercontent.com/LTH14/JiT/.*--jit-reference FILE"
    for kind, line in lines.items():
        with pytest.raises(UserError, match=f"reference {kind}: got 'no file', wanted {line}") as caught:
            run(given | {kind: None}, tmp_path / "out", plan=asked)
        assert "\n" not in str(caught.value)


def test_missing_reference_of_an_evaluation(sources, tmp_path):
    for path in (None, tmp_path / "missing.npz"):
        with pytest.raises(UserError, match=f"reference adm: .*{ADM_FILE}.*openaipublic.*--reference FILE") as caught:
            run({"adm": path}, tmp_path / "out", plan=plan(("official",)))
        assert "\n" not in str(caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="wanted a folder with images"):
        run({"data": tmp_path / "empty"}, tmp_path / "out", plan=plan(("own-data",)))
    Image.fromarray(np.zeros((9, 8, 3), np.uint8)).save(sources["data"] / "zz.png")
    with pytest.raises(UserError, match=r"got \(3, 9, 8\), wanted \(3, 8, 8\)"):
        run(sources, tmp_path / "out", plan=plan(("own-data",)))
    np.savez(tmp_path / "pickled.npz", arr_0=np.array([object()]))
    np.savez(tmp_path / "neither.npz", x=np.zeros(3))
    for name in ("pickled", "neither"):
        with pytest.raises(UserError, match="wanted"):
            run({"adm": tmp_path / f"{name}.npz"}, tmp_path / "out", plan=plan(("official",)))


def test_own_statistics_are_a_reference(sources, tmp_path):
    """What a preparation streams is what the evaluation reads; made in another way, it is refused."""
    images = torch.from_numpy(real_images(30)).permute(0, 3, 1, 2)
    statistics = ImageStatistics(Features())
    for part in images.split(7):
        statistics.add(part)
    statistics.save(tmp_path / "own.npz", World("cpu"))
    with np.load(tmp_path / "own.npz", allow_pickle=False) as arrays:
        assert {"mu", "sigma", "mu_s", "sigma_s"} <= set(arrays) and int(arrays["count"]) == 30
    direct = run({"adm": sources["adm"]}, tmp_path / "a", plan=plan(("official",)))["results"][0]
    own = run({"data": tmp_path / "own.npz"}, tmp_path / "b", plan=plan(("own-data",)))["results"][0]
    assert own["fid"]["value"] == pytest.approx(direct["fid"]["value"], rel=1e-9)
    with pytest.raises(UserError, match="own.npz, resize: got 'tensorflow', wanted clean"):
        run({"data": tmp_path / "own.npz"}, tmp_path / "b", plan=plan(("own-data+clean-fid",)))


# --- processes ---


def share_work(rank, sources, out):
    with World("cpu") as world:
        net = Net()
        schedules = ((1.0, 0.0), (1.0, 0.5, 0.0))
        report = evaluate(sampler(net), Features(), plan(schedules=schedules), sources, out, {"weights": "a"}, world)
        assert (report is None) == (rank == 1)
        half = len(net.asked)
        assert half > 0
        return {"batches": half, "scores": [in_training(sources, world, count) for count in (COUNT, ODD)]}


def in_training(sources, world, count):
    extractor = Features()
    reference = load_reference("adm", sources["adm"], extractor, "tensorflow", sources["adm"].parent, BATCH, world)
    evaluator = Evaluator(extractor, reference, lambda z: z, SHAPE, CLASSES, world=world, batch=BATCH, seed=3)
    return evaluator.score(Net(), count)


def test_ranks_of_an_evaluation_equal_one(ranks, sources, tmp_path):
    schedules = ((1.0, 0.0), (1.0, 0.5, 0.0))
    net = Net()
    wanted = evaluate(
        sampler(net), Features(), plan(schedules=schedules), sources, tmp_path / "one", {"weights": "a"}, World("cpu")
    )
    out = tmp_path / "two"
    shares = ranks(share_work, sources, out)
    got = json.loads((out / "report.json").read_text())
    for ours, theirs in zip(got["results"], wanted["results"], strict=True):
        for score in ("fid", "sfid", "inception_score", "precision", "recall"):
            # the reference's images are measured by both, which add in another order
            assert ours[score]["value"] == pytest.approx(theirs[score]["value"], rel=1e-12)
    assert sum(share["batches"] for share in shares) == len(net.asked)
    assert min(share["batches"] for share in shares) >= 0.4 * len(net.asked)
    assert shares[0]["scores"] == shares[1]["scores"]
    for count, shared in zip((COUNT, ODD), shares[0]["scores"], strict=True):
        assert shared == pytest.approx(in_training(sources, World("cpu"), count), rel=1e-12)
    official = wanted["results"][0]
    assert shares[0]["scores"][0] == pytest.approx({k: official[k]["value"] for k in ("fid", "sfid")}, rel=1e-9)
    # the files are the same, bit for bit
    for path in (tmp_path / "one" / "features").rglob("*.safetensors"):
        assert path.read_bytes() == (out / path.relative_to(tmp_path / "one")).read_bytes()


def test_statistics_file_of_an_evaluation_reads_back(sources, tmp_path):
    run(sources, tmp_path / "out", plan=plan(("own-data",)))
    kept = read_statistics(tmp_path / "out" / "reference" / "data-tensorflow.npz")
    images = torch.from_numpy(real_images(25, seed=1)).permute(0, 3, 1, 2)
    wanted = Moments.of(Features()(images, "tensorflow")["pool3"]).gaussian()
    assert torch.allclose(kept["pool3"].mean, wanted.mean, rtol=1e-6)
