"""Datasheet peaks by the name the driver gives a GPU. A GPU that is not here gets no percentage of a peak."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Peak:
    """A GPU's datasheet."""

    tflops: float
    """Dense 16-bit matrix products, TFLOP/s."""
    gbps: float
    """Device memory, GB/s."""
    source: str


PEAKS = {
    "NVIDIA A100-SXM4-40GB": Peak(312, 1555, "NVIDIA A100 Tensor Core GPU datasheet"),
    "NVIDIA A100-SXM4-80GB": Peak(312, 2039, "NVIDIA A100 Tensor Core GPU datasheet"),
    "NVIDIA H100 80GB HBM3": Peak(989, 3350, "NVIDIA H100 Tensor Core GPU datasheet (SXM, without sparsity)"),
    "NVIDIA H100 PCIe": Peak(756, 2000, "NVIDIA H100 Tensor Core GPU datasheet (PCIe, without sparsity)"),
    "NVIDIA H200": Peak(989, 4800, "NVIDIA H200 Tensor Core GPU datasheet (SXM, without sparsity)"),
    "NVIDIA B200": Peak(2250, 8000, "NVIDIA DGX B200 datasheet (an eighth of it, without sparsity)"),
}
