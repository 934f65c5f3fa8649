"""Installs the rooms: the packages `meanflow` (the method) and `meanflow_kernels` (the operators, in kernels/)."""

from setuptools import find_packages, setup

setup(
    name="meanflow",
    version="0.1.0",
    description="MeanFlow training with fused forward-mode kernels",
    python_requires=">=3.11",
    # the folder kernels/ is not a package: Hugging Face's PyPI package `kernels` keeps that import name
    packages=["meanflow", *find_packages("kernels")],
    package_dir={"meanflow": "meanflow", "meanflow_kernels": "kernels/meanflow_kernels"},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "diffusers",
        "matplotlib",
        "numpy",
        "nvidia-ml-py",
        "pillow",
        "pytest-benchmark",
        "safetensors",
        "scikit-learn",
        "tensorboard",
        "tqdm",
        "tyro",
    ],
    extras_require={
        "test": ["hypothesis", "pytest"],
        "flash-attn": ["flash-attn"],
        "xformers": ["xformers"],
    },
)
