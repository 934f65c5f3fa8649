"""Prepare the latents that ImageNet models are trained on. The same command again resumes.

python scripts/prepare_data.py encode IMAGES --out LATENTS      class folders, tar files or a Hugging Face image set
python scripts/prepare_data.py import OLD --layout repa --out LATENTS      latents that are there: official, repa, edm2
python scripts/prepare_data.py verify LATENTS                   read everything, name each bad shard (exit code 2)
torchrun --nproc-per-node 8 scripts/prepare_data.py encode ...  on all GPUs
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from .. import cli
from ..data.cache import Cache, read_manifest, verify
from ..data.entries import describe, describe_classes, shown
from ..errors import require


def encode(args: list[str]) -> None:
    """Encode labelled images: class folders, tar files of KEY.jpg and KEY.cls, or a Hugging Face image set."""
    # seconds to import
    from ..data.preparation import Options, prepare
    from ..evaluation.features import Extractor, ImageStatistics

    @dataclass(frozen=True)
    class Encode:
        source: Positional[str]
        """A folder of class folders (or with one called --split), tar files, a saved image set, or hub:NAME."""
        out: Path
        """Folder of the latents. What it holds is continued."""
        inception: Path | None = None
        """Weights of the FID's network, pt_inception-2015-12-05-6726825d.pth: then the statistics of the cropped images
        are written to reference.npz beside the latents, in a second pass over the images."""
        options: Annotated[Options, arg(name="")] = Options()

    chosen = cli.parse(Encode, args, prog="prepare_data.py encode", description=encode.__doc__)
    statistics = (lambda device: ImageStatistics(Extractor(chosen.inception, device))) if chosen.inception else None
    _report(chosen.out, prepare(chosen.source, chosen.out, chosen.options, statistics))


def import_(args: list[str]) -> None:
    """Take over latents that are there already: the official code's, REPA's, EDM2's, or three arrays."""
    from ..data.import_latents import ImportOptions, import_latents

    @dataclass(frozen=True)
    class Import:
        source: Positional[Path]
        """The folder or zip of latents."""
        out: Path
        """Folder of the latents. What it holds is continued."""
        options: Annotated[ImportOptions, arg(name="")]

    chosen = cli.parse(Import, args, prog="prepare_data.py import", description=import_.__doc__)
    _report(chosen.out, import_latents(chosen.source, chosen.out, chosen.options))


def check(args: list[str]) -> int:
    """Read all latents and compare them with the manifest."""

    @dataclass(frozen=True)
    class Verify:
        latents: Positional[Path]
        """Folder of the latents."""

    folder = cli.parse(Verify, args, prog="prepare_data.py verify", description=check.__doc__).latents
    problems = verify(folder)
    for problem in problems:
        print(f"{folder}: {problem}")
    total = len(read_manifest(folder)["shards"])
    if problems:
        hint = "to make them again, repeat the command that prepared it with --repair"
        print(f"{folder}: {len(problems)} of {total} shards are bad; {hint}")
        return 2
    print(f"{folder}: all {total} shards are good")
    return 0


def _report(folder: Path, manifest: dict | None) -> None:
    if manifest is None:
        return  # the first process reports
    shape = "x".join(map(str, manifest["latent_shape"]))
    print(f"{folder}: {manifest['rows']} latents {shape} {manifest['dtype']} in {len(manifest['shards'])} shards")
    print(f"{folder}: {describe_classes(Cache(folder).labels.tolist(), manifest['classes'])}")
    if manifest["converted"]:
        modes = ", ".join(f"{count} {mode}" for mode, count in manifest["converted"].items())
        print(f"{folder}: converted{' to RGB' if manifest['crop'] else ''}: {modes}")
    print(f"{folder}: " + "\n".join(describe(manifest["entries"])))
    if manifest["skipped"]:
        print(f"{folder}: left out {len(manifest['skipped'])} images, listed in manifest.json:")
        for name, reason in manifest["skipped"][:10]:
            print(f"  {shown(name)}: {reason}")


VERBS = {"encode": encode, "import": import_, "verify": check}


def main(args: list[str]) -> int | None:
    if not args or args[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if args else 2
    verb, *rest = args
    require(verb in VERBS, "verb", verb, "one of " + " ".join(VERBS), "see --help")
    return VERBS[verb](rest)


run = partial(cli.run, main)
