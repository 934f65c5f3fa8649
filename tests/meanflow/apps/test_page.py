"""The page: served, drawing what is asked for, saying in one line what does not fit; and in a real browser."""

import io
import json
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
from dataclasses import replace

import numpy as np
import pytest
import runs
import torch
from PIL import Image

pytest.importorskip("diffusers", reason="diffusers is not installed")

from meanflow.apps import page
from meanflow.errors import UserError
from meanflow.interop.pipeline import MeanFlowPipeline
from meanflow.interop.scheduler import MeanFlowScheduler
from meanflow.interop.transformer import ImfTransformer2DModel, MeanFlowTransformer2DModel
from meanflow.interop.weights import load_checkpoint
from meanflow.storage.checkpoint import save_weights
from meanflow.training.trainer import train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """One network as a run, as exported weights, and as a pipeline."""
    folder = tmp_path_factory.mktemp("page")
    config = runs.tiny()
    # far from the start, where all classes and steps are alike
    train(replace(config, optim=replace(config.optim, lr=0.05, warmup_steps=0, ema_decay=0.0)), folder / "run")
    weights, config, _, step = load_checkpoint(folder / "run")
    save_weights(folder / "weights.safetensors", weights, config, step)
    page.load(folder / "run", CPU, torch.float32).pipeline.save_pretrained(folder / "pipeline")
    return folder


@pytest.fixture(scope="module")
def address(sources):
    server = page.make_server(page.load(sources / "run", CPU, torch.float32), "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def get(url: str) -> tuple[int, dict, bytes]:
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


def picture(address: str, query: str) -> np.ndarray:
    status, _, body = get(f"{address}/image.png?{query}")
    assert status == 200, body
    return np.asarray(Image.open(io.BytesIO(body)))


def test_the_page_loads_nothing_from_elsewhere(address):
    status, headers, body = get(address + "/?classes=3")
    text = body.decode()
    assert status == 200 and headers["Content-Type"].startswith("text/html") and "<title>MeanFlow</title>" in text
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "http:" not in text and "https:" not in text and "@import" not in text and "src=" not in text


def test_what_the_page_knows(address):
    _, _, body = get(address + "/model.json")
    model = json.loads(body)
    assert model["classes"] == [[i, str(i)] for i in range(10)] and not model["decodes"] and model["guidance"] == []
    assert model["words"] == "DiT-1x16/2, step 10, 10 classes, float32 on cpu"


@pytest.mark.parametrize("query, rows, columns", [
    ("classes=3,5&each=4", 2, 4), ("classes=7&each=9", 3, 3), ("classes=7&each=5", 2, 3), ("each=1", 1, 1),
    ("classes=1,2,3&each=12", 3, 12),
])  # fmt: skip
def test_a_picture_of_the_right_size(address, query, rows, columns):
    status, headers, body = get(f"{address}/image.png?{query}&steps=2")
    # 8 x 8 pixels and a line between, four times as large
    assert status == 200 and Image.open(io.BytesIO(body)).size == (4 * (9 * columns + 1), 4 * (9 * rows + 1))
    network, decode = (float(part.partition("dur=")[2]) for part in headers["Server-Timing"].split(", "))
    assert network > 0 and decode >= 0 and headers["Content-Type"] == "image/png"


def test_a_seed_means_its_images(address):
    first = picture(address, "classes=3,5&each=4&seed=1")
    assert np.array_equal(first, picture(address, "classes=3,5&each=4&seed=1&steps=1"))
    assert np.array_equal(first, picture(address, "classes=3,5&each=4&seed=1&times=1,0"))
    # the first row is the same images, whatever follows
    assert np.array_equal(first[:36], picture(address, "classes=3,8&each=4&seed=1")[:36])
    for other in ("classes=3,5&each=4&seed=2", "classes=3,5&each=4&seed=1&steps=2", "classes=4,5&each=4&seed=1"):
        assert not np.array_equal(first, picture(address, other)), other


def test_many_images_are_those_of_few(address, monkeypatch):
    whole = picture(address, "classes=3&each=16")
    monkeypatch.setattr(page, "BATCH", 5)
    assert np.abs(whole.astype(int) - picture(address, "classes=3&each=16")).max() <= 1


@pytest.mark.parametrize("name", ["run", "weights.safetensors", "pipeline"])
def test_every_source_draws_the_same(sources, address, name):
    studio = page.load(sources / name, CPU, torch.float32)
    drawn = studio.draw(studio.read("classes=0,1,2&each=3&seed=5&times=1,0.4,0"))
    assert np.array_equal(
        np.asarray(Image.open(io.BytesIO(drawn.png))), picture(address, "classes=0,1,2&each=3&seed=5&times=1,0.4,0")
    )


BAD = {
    "classes=11": "class: got '11'", "classes=dog": "class: got 'dog'", "classes=-1": "class: got '-1'",
    "steps=0": "steps: got 0", "steps=one": "steps: got 'one'", "steps=257": "steps: got 257",
    "times=0,1": "times: got (0.0, 1.0)", "times=1": "times: got (1.0,)", "times=1,x": "times: got 'x'",
    "each=0": "images a class: got 0", "each=300": "images: got 300", "classes=1,2&each=200": "images: got 400",
    "seed=-1": "seed: got -1", "seed=1.5": "seed: got '1.5'", "colour=red": "query: got ['colour']",
    "times=1,nan": "times: got (1.0, nan)", "omega=2": "query: got ['omega'], wanted no guidance, which this network",
}  # fmt: skip


@pytest.mark.parametrize("query, message", BAD.items(), ids=BAD)
def test_bad_input_is_one_line(address, query, message):
    status, headers, body = get(f"{address}/image.png?{query}")
    assert status == 400 and headers["Content-Type"].startswith("text/plain")
    assert body.decode().startswith(message) and b"\n" not in body


@pytest.fixture(scope="module")
def told():
    """A network that is told its guidance, with weights of which it shows."""
    shape = {"depth": 2, "hidden_size": 16, "num_heads": 1, "patch_size": 2, "input_size": 8, "in_channels": 1}
    net = ImfTransformer2DModel(**shape, num_classes=10, head_depth=1)
    generator = torch.Generator().manual_seed(0)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.6, generator=generator)
    return page.Studio(MeanFlowPipeline(net.eval(), MeanFlowScheduler()))


def test_guidance_where_the_network_is_told_it(told):
    facts, query = told.describe(), "classes=1,2&each=2"
    assert facts["guidance"] == (1, 0, 1) and facts["words"].startswith("imf-2x16/2, 10 classes")
    assert told.read(query).guidance == (1, 0, 1)
    assert told.read(query + "&omega=3&start=0.2").guidance == (3, 0.2, 1)
    drawn = [told.draw(told.read(query + more)).png for more in ("", "&omega=1&start=0&end=1", "&omega=3&end=0.8")]
    assert drawn[0] == drawn[1] != drawn[2]
    for more, message in {"&omega=0.5": "got (0.5, 0.0, 1.0), wanted omega of 1", "&start=x": "start: got 'x'"}.items():
        with pytest.raises(UserError) as error:
            told.read(query + more)
        assert message in str(error.value)
    for name in page.GUIDANCE:
        assert f'<input type="range" id="{name}"' in page.HTML.read_text()


def test_an_unknown_path(address):
    status, _, body = get(address + "/../etc/passwd")
    assert status == 404 and b"is not here, wanted one of /, /model.json, /image.png" in body


def test_a_failure_is_one_line_and_not_the_last(address, monkeypatch, capsys):
    def broken(self, request):
        raise RuntimeError("no luck\nat all")

    with monkeypatch.context() as patch:
        patch.setattr(page.Studio, "draw", broken)
        assert get(address + "/image.png")[::2] == (500, b"The server failed: RuntimeError: no luck")
        assert "Traceback" in capsys.readouterr().err
    assert get(address + "/image.png")[0] == 200


def test_classes_by_name(sources, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("\n".join(["zero, nought", "One", *"abcdefgh"]))
    studio = page.load(sources / "run", CPU, torch.float32, str(names))
    assert studio.read("classes=nought, one ,4").labels == (0, 1, 4)
    assert studio.describe()["classes"][0] == (0, "zero, nought")


def test_sources_that_do_not_fit(sources, tmp_path):
    with pytest.raises(UserError, match="^source: got '/nowhere', wanted a file or folder"):
        page.load(page.Path("/nowhere"), CPU, torch.float32)
    with pytest.raises(UserError, match="^names or vae: got 'imagenet', wanted none: a pipeline has its own"):
        page.load(sources / "pipeline", CPU, torch.float32, "imagenet")
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match=f"^source: got {tmp_path}, which cannot be loaded"):
        page.load(tmp_path, CPU, torch.float32)


def test_latents_need_a_decoder(tmp_path):
    net = MeanFlowTransformer2DModel(depth=1, hidden_size=16, num_heads=2, patch_size=2, input_size=8)
    MeanFlowPipeline(net, MeanFlowScheduler()).save_pretrained(tmp_path / "latents")
    with pytest.raises(UserError, match="^vae: got None, wanted a decoder of the 4 channels of latents"):
        page.load(tmp_path / "latents", CPU, torch.float32)


def test_the_command(command, sources, address):
    code, _, err = command("page", sources / "run", "--device", "cpu", "--port", address.rpartition(":")[2])
    assert code == 2 and err.splitlines()[-1].startswith("page.py: error: port: got 127.0.0.1:")
    code, _, err = command("page", sources / "nothing")
    assert code == 2 and err.count("\n") == 1 and "page.py: error: source: got" in err


# --- a real browser ---


def dom(url: str, profile) -> str:
    """What a page has become after its scripts."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs chromium")
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    command += ["--virtual-time-budget=20000", "--dump-dom", url]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.slow
def test_in_a_browser(address, tmp_path):
    text = dom(address + "/?classes=3,5&times=1,0.5,0&each=4&seed=1", tmp_path)
    assert "8 images in " in text and "2 steps, " in text and 'src="blob:' in text
    assert 'alt="8 images of 3, 5"' in text and 'download="meanflow_classes3-5_steps2_seed1.png"' in text
    assert text.count('aria-pressed="true"') == 2 and 'id="error" role="alert"></p>' in text


@pytest.mark.slow
def test_a_browser_shows_errors(address, tmp_path):
    text = dom(address + "/?classes=3&steps=1&each=0&seed=1", tmp_path)
    assert 'role="alert">images a class: got 0, wanted a positive whole number; change it</p>' in text
    assert 'id="result" hidden' in text
