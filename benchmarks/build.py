"""Build the native libraries in place, and fail where one is missing afterwards: ``python -m benchmarks.build``.

To setup.py a library that cannot be built is a warning; a captured step needs both.
"""

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
CHECK = "from meanflow_kernels.adamw_ema.native import MISSING; raise SystemExit('\\n'.join({*MISSING.values()}) or 0)"


def main() -> int:
    begin = time.time()
    folder = ROOT / "kernels" / "meanflow_kernels"
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT, check=True)
    old = [
        f"native_{name}.so was not built: what the compilers said is above; nvcc has to be in CUDA_HOME or the PATH"
        for name in ("cpu", "cuda")
        if not (path := folder / f"native_{name}.so").exists() or path.stat().st_mtime < begin
    ]
    print("\n".join(old))
    return 1 if old else subprocess.run([sys.executable, "-c", CHECK], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
