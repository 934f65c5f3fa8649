"""What torch-fidelity says of the images and weights of tests/fid_inputs.py: writes fidelity.npz beside this file.

Run in an environment of its own (about 15 minutes on one core), for torch-fidelity asks for torchvision:

    pip install torch==2.13.0 numpy scipy pillow tqdm && pip install --no-deps torch-fidelity==0.4.0
    python tests/data/fidelity/make_fidelity.py

torchvision itself is replaced by empty modules where it is missing: what is computed here does not use it.
"""

import importlib.util
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
TORCHVISION = ("", ".datasets", ".transforms", ".transforms.functional", ".models")


class Hollow(types.ModuleType):
    """A module that has every name."""

    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class Images(torch.utils.data.Dataset):
    """A tensor of images as torch-fidelity takes them."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i]


def hollow_torchvision():
    """Empty modules in torchvision's place."""
    for name in (f"torchvision{part}" for part in TORCHVISION):
        sys.modules[name] = Hollow(name)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, sys.modules[name])


def main():
    import fid_inputs

    if importlib.util.find_spec("torchvision") is None:
        hollow_torchvision()
    import torch_fidelity
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    # the shapes, from the class itself: it cannot be built without weights
    module = sys.modules[FeatureExtractorInceptionV3.__module__]
    module.load_state_dict_from_url = lambda *args, **kwargs: {}
    load = FeatureExtractorInceptionV3.load_state_dict
    FeatureExtractorInceptionV3.load_state_dict = lambda *args, **kwargs: None
    shapes = {name: tuple(x.shape) for name, x in FeatureExtractorInceptionV3("shapes", ["2048"]).state_dict().items()}
    FeatureExtractorInceptionV3.load_state_dict = load

    results = {"torch_fidelity": torch_fidelity.__version__, "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        torch.save(fid_inputs.weights(shapes), path)
        extractor = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(path))
        images = fid_inputs.samples(4)
        features, logits = extractor(images)
        resized = interpolate_bilinear_2d_like_tensorflow1x(images[:1].float(), (299, 299), align_corners=False)
        results |= {
            "features": features.numpy(),
            "logits": logits[:, :64].numpy(),
            "resized": resized[0, 0, :40].numpy(),
        }
        for name, (n, m) in {"small": fid_inputs.SMALL, "large": fid_inputs.LARGE}.items():
            metrics = torch_fidelity.calculate_metrics(
                input1=Images(fid_inputs.samples(n)),
                input2=Images(fid_inputs.references(m)),
                fid=True, isc=True, isc_splits=1, samples_shuffle=False, prc=True, batch_size=20, cuda=False,
                feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(path),
                feature_layer_prc="2048", save_cpu_ram=True, cache=False, verbose=False,
            )  # fmt: skip
            print(name, metrics, flush=True)
            results |= {f"{name}_{key}": value for key, value in metrics.items()}
            np.savez_compressed(HERE / "fidelity.npz", **results)


if __name__ == "__main__":
    main()
