"""What importing the runtime loads. `test_packaging.py` runs it with numpy and onnxruntime and nothing else."""

from __future__ import annotations

import subprocess
import sys


def test_import_loads_only_numpy_and_no_other_package_of_ours() -> None:
    """Here everything is installed, so whatever was imported by accident would be found."""
    code = (
        "import sys; before = set(sys.modules); import pmpd.runtime; "
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)); "
        "print(*(name for name in sys.modules if name.startswith('pmpd.') and name.count('.') == 1))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    packages, ours = process.stdout.splitlines()
    assert set(packages.split()) <= {"numpy", "pmpd", "onnxruntime"}
    assert ours == "pmpd.runtime"
