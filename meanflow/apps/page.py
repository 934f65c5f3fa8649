"""One local web page: classes, steps, guidance and a seed in, a grid of images and its times out.

Python's own server and one HTML file, which loads nothing from elsewhere: a form and a picture are all of it, so a
framework of forty packages would be no gain. ``/image.png?classes=3,5&steps=1&each=8&seed=0`` is the picture itself.
"""

import io
import json
import math
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import parse_qsl, urlsplit

import torch
from torch import Tensor
from tyro.conf import Positional

from .. import cli
from ..data.images import grid, save_png
from ..draws import Draws, Purpose
from ..errors import UserError, require
from ..interop import convert
from ..interop.formats import find_format
from ..method.sampling import check_times, even_times
from ..world import choose_device

HTML = Path(__file__).with_name("page.html")
GUIDANCE = ("omega", "start", "end")
OPTIONS = ("classes", "steps", "times", "each", "seed", *GUIDANCE)
MOST = 256
"""Images of a request."""
BATCH = 32
"""Images at a time."""


@dataclass(frozen=True)
class Request:
    """A request for images."""

    labels: tuple[int, ...]
    """Classes, one row of images each; empty: images of no class."""
    times: tuple[float, ...]
    each: int
    """Images per class."""
    seed: int
    guidance: tuple[float, ...] = ()
    """What the network is told of it, if it is told something."""


class Picture(NamedTuple):
    """A grid of images as a PNG, and its times in milliseconds."""

    png: bytes
    network_ms: float
    decode_ms: float


class Studio:
    """Serves requests for images, one at a time.

    Args:
        pipeline: a :class:`meanflow.interop.pipeline.MeanFlowPipeline` on its device.
    """

    def __init__(self, pipeline):
        self.pipeline = pipeline
        self.pipeline.set_progress_bar_config(disable=True)
        self.model = pipeline.transformer.model_config
        names = pipeline.config.id2label or {}
        self.classes = [(i, names.get(str(i), str(i))) for i in range(self.model.num_classes)]
        self._numbers = {name.casefold(): i for name, i in pipeline.labels.items()}
        self._lock = threading.Lock()

    def describe(self) -> dict:
        """Facts for the page."""
        recipe, net = self.pipeline.config.recipe or {}, self.pipeline.transformer
        step = [f"step {recipe['step']}"] if recipe.get("step") else []
        name = self.model.name if self.model.network == "imf" else f"DiT-{self.model.name}"
        words = [name, *step, f"{self.model.num_classes} classes"]
        words += [f"{str(net.dtype).removeprefix('torch.')} on {net.device.type}"]
        facts = {"words": ", ".join(words), "classes": self.classes, "decodes": self.pipeline.vae is not None}
        return facts | {"guidance": self.pipeline.guidance()}

    def read(self, query: str) -> Request:
        """Parse a request from a query string.

        Raises:
            UserError: naming the option that does not fit.
        """
        found = dict(parse_qsl(query, keep_blank_values=True))
        unknown = sorted(found.keys() - set(OPTIONS))
        require(not unknown, "query", unknown, f"names among {', '.join(OPTIONS)}", "leave the others out")
        labels = tuple(self._label(word.strip()) for word in found.get("classes", "").split(",") if word.strip())
        if found.get("times"):
            times = check_times([_number("times", word, float) for word in found["times"].split(",")])
        else:
            times = even_times(_number("steps", found.get("steps", "1"), int))
        each, seed = (_number(name, found.get(name, default), int) for name, default in (("each", "8"), ("seed", "0")))
        require(each >= 1, "images a class", each, "a positive whole number", "change it")
        count = each * max(1, len(labels))
        require(count <= MOST, "images", count, f"at most {MOST} at once", "take fewer classes or images a class")
        require(len(times) <= MOST, "steps", len(times) - 1, f"fewer than {MOST}", "take fewer")
        require(0 <= seed < 2**63, "seed", seed, "a number in [0, 2^63)", "change it")
        return Request(labels, times, each, seed, self._guidance(found))

    def _guidance(self, found: dict[str, str]) -> tuple[float, ...]:
        """What a query tells of the guidance; the rest as the pipeline has it."""
        known = dict(zip(GUIDANCE, self.pipeline.guidance(), strict=False))
        strange = [name for name in GUIDANCE if name in found and name not in known]
        require(not strange, "query", strange, "no guidance, which this network is not told", "leave it out")
        if not known:
            return ()
        known |= {name: _number(name, found[name], float) for name in known if name in found}
        omega, *interval = known.values()
        return self.pipeline.guidance(omega, interval or None)

    def _label(self, word: str) -> int:
        if word.casefold() in self._numbers:
            return self._numbers[word.casefold()]
        wanted = f"a name or a number from 0 to {self.model.num_classes - 1}"
        known = word.isdecimal() and int(word) < self.model.num_classes
        require(known, "class", word, wanted, "names of several classes do for none: take the number")
        return int(word)

    def draw(self, request: Request) -> Picture:
        """Draw a grid: a row per class, or nearly a square of one. Image i of a seed depends on its class alone."""
        labels = request.labels or (self.model.num_classes,)
        y = torch.tensor(labels).repeat_interleave(request.each)
        images, network, decode = [], 0.0, 0.0
        with self._lock:
            for samples in torch.arange(len(y)).split(BATCH):
                part, *ms = self._draw_batch(samples, y[samples], request)
                images.append(part)
                network, decode = network + ms[0], decode + ms[1]
        pixels = torch.cat(images)
        columns = request.each if len(labels) > 1 else math.ceil(len(pixels) ** 0.5)
        file = io.BytesIO()
        save_png(file, grid(pixels, columns), zoom=max(1, 32 // pixels.shape[-1]))
        return Picture(file.getvalue(), network, decode)

    def _draw_batch(self, samples: Tensor, labels: Tensor, request: Request) -> tuple[Tensor, float, float]:
        """Draw uint8 images; returns the milliseconds of network and decoder, too."""
        device, model = self.pipeline.transformer.device, self.model
        shape = (model.in_channels, model.input_size, model.input_size)
        noise = Draws(request.seed, 0, samples.to(device)).normal(Purpose.NOISE, shape)
        clock = [_now(device)]

        def note(pipeline, i: int, t, tensors: dict) -> dict:
            if i == len(request.times) - 2:
                clock.append(_now(device))
            return tensors

        omega, *interval = request.guidance or (None,)
        images = self.pipeline(
            labels, timesteps=request.times, latents=noise, output_type="pt", callback_on_step_end=note,
            guidance_scale=omega, guidance_interval=interval or None,
        ).images  # fmt: skip
        clock.append(_now(device))
        begin, between, end = clock
        return (255 * images.float()).round().to(torch.uint8).cpu(), between - begin, end - between


def _now(device: torch.device) -> float:
    """Time in milliseconds, after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * time.perf_counter()


def _number(name: str, word: str, kind: type):
    try:
        return kind(word)
    except ValueError:
        raise UserError(f"{name}: got {word[:40]!r}, wanted a number; correct it") from None


def load(path: Path, device: torch.device, dtype: torch.dtype, names: str = "", vae: str = "") -> Studio:
    """Load a studio from a run, a checkpoint, exported weights, a saved pipeline or an official checkpoint.

    Args:
        names: of the classes, as :func:`meanflow.interop.convert.read_names` takes them; a pipeline has its own.
        vae: decoder of the latents, a folder or a name; by default the one that a run's configuration names.

    Raises:
        UserError: where something cannot be loaded, or does not go together.
    """
    if path.is_dir() and find_format(path) == "pipeline":
        require(not (names or vae), "names or vae", names or vae, "none: a pipeline has its own", "leave it out")
        pipeline = convert.load_pipeline(path)
    else:
        weights = convert.load(path, "auto")
        data = weights.config.get("data", {})
        if data.get("name", "latents") == "latents":
            vae = vae or data.get("vae", "")
        found = convert.read_names(names, weights.model.num_classes) if names else None
        pipeline = convert.make_pipeline(weights, vae, found)
    channels = pipeline.transformer.config.in_channels
    wanted, hint = f"a decoder of the {channels} channels of latents", "name it by --vae, or save the pipeline with one"
    require(pipeline.vae is not None or channels in (1, 3), "vae", None, wanted, hint)
    # diffusers warns of every cast
    return Studio(pipeline.to(device) if dtype == torch.float32 else pipeline.to(device, dtype))


# --- the server ---


class Handler(BaseHTTPRequestHandler):
    """Answers a browser, or curl."""

    studio: Studio

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        pages = {"/": self._page, "/model.json": self._model, "/image.png": self._image}
        if url.path not in pages:
            return self._line(HTTPStatus.NOT_FOUND, f"{url.path[:80]!r} is not here, wanted one of {', '.join(pages)}")
        try:
            pages[url.path](url.query)
        except UserError as error:
            self._line(HTTPStatus.BAD_REQUEST, str(error))
        except torch.OutOfMemoryError:
            self._line(HTTPStatus.INTERNAL_SERVER_ERROR, "memory: the images do not fit; start with --dtype bf16")
        except (BrokenPipeError, ConnectionResetError):
            # the browser has closed the connection
            self.close_connection = True
        except Exception as error:
            traceback.print_exc()
            first = (str(error).strip() or "no message").splitlines()[0][:200]
            self._line(HTTPStatus.INTERNAL_SERVER_ERROR, f"The server failed: {type(error).__name__}: {first}")

    def _page(self, query: str) -> None:
        # nothing from elsewhere, whatever a class is called
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
        self._send(
            HTML.read_bytes(), "text/html; charset=utf-8", {"Content-Security-Policy": policy + "img-src blob: data:"}
        )

    def _model(self, query: str) -> None:
        self._send(json.dumps(self.studio.describe()).encode(), "application/json")

    def _image(self, query: str) -> None:
        picture = self.studio.draw(self.studio.read(query))
        timing = f"network;dur={picture.network_ms:.3f}, decode;dur={picture.decode_ms:.3f}"
        self._send(picture.png, "image/png", {"Server-Timing": timing})

    def _line(self, status: HTTPStatus, words: str) -> None:
        self._send(" ".join(words.split()).encode(), "text/plain; charset=utf-8", status=status)

    def _send(self, body: bytes, kind: str, headers: dict[str, str] | None = None, status=HTTPStatus.OK) -> None:
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(body)), "Cache-Control": "no-store"} | (
            headers or {}
        )
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args) -> None:
        """Log nothing: the page shows errors."""


def make_server(studio: Studio, host: str, port: int) -> ThreadingHTTPServer:
    """Make a server that is bound but not started; port 0 takes a free one.

    Raises:
        UserError: where the address cannot be had.
    """
    try:
        return ThreadingHTTPServer((host, port), type("BoundHandler", (Handler,), {"studio": studio}))
    except (OSError, OverflowError) as error:
        raise UserError(
            f"port: got {host}:{port}, which cannot be had ({error}), wanted a free one; name another"
        ) from None


def serve(studio: Studio, host: str, port: int, say: Callable[[str], None] = print) -> None:
    """Serve the page until the process is interrupted."""
    with make_server(studio, host, port) as server:
        # warm up: the first call of a network is slower
        studio.draw(Request((), (1.0, 0.0), 1, 0))
        say(f"{studio.describe()['words']}\nhttp://{host}:{server.server_port}/   (Ctrl-C ends)")
        server.serve_forever()


@dataclass(frozen=True)
class Options:
    checkpoint: Positional[Path]
    """A run folder, a checkpoint, exported weights, or a folder of a saved pipeline."""
    names: str = ""
    """Names of the classes: "imagenet", a JSON file {number: name}, or a file with a name a line."""
    vae: str = ""
    """Decoder of the latents, a local folder or its name (default: the one that the run's configuration names)."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Dtype of the weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one."""
    host: str = "127.0.0.1"
    """Address to listen at; this one is this machine alone. There is no password."""
    port: int = 7860
    """Port to listen at; 0 takes a free one."""


def main(args: list[str]) -> None:
    options = cli.parse(Options, args, prog="page.py", description=__doc__)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[options.dtype]
    studio = load(options.checkpoint, choose_device(options.device), dtype, options.names, options.vae)
    serve(studio, options.host, options.port)


run = partial(cli.run, main)
