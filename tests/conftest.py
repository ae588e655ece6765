"""What several test files share: one exported bundle of the demo model, and the data beside the repository."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

# The first call of a property also pays for imports and session start-up: a deadline would measure those.
settings.register_profile("pmpd", deadline=None)
settings.load_profile("pmpd")


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model at 4, 3 and 2 bits, without kernels. Tests copy it before they change anything."""
    from pmpd.exporter.config import ExportConfig
    from pmpd.exporter.pipeline import export_bundle

    output = tmp_path_factory.mktemp("demo") / "demo-pmpd"
    export_bundle(ExportConfig(model="demo", output=output, precisions=(4, 3, 2), targets=()))
    return output


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of models and data sets beside the repository."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not path.is_dir():
        pytest.skip("needs the data in ../shared, which is not there")
    return path
