"""The documentation builds as a site, strictly, with its references complete."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from agentopd.config import RunConfig

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.slow


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("material", reason="pip install mkdocs-material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
    pages = {path.relative_to(tmp_path).parent.as_posix() for path in tmp_path.rglob("index.html")}
    written = {path.relative_to(ROOT / "docs").with_suffix("").as_posix() for path in ROOT.glob("docs/**/*.md")}
    assert written - {"index"} <= pages
    config = (tmp_path / "reference/config/index.html").read_text()
    for name, field in RunConfig.model_fields.items():
        assert f"<code>{name}</code>" in config or f"<code>[{name}" in config or f"<code>[[{name}" in config, field
    commands = (tmp_path / "reference/commands/index.html").read_text()
    assert "agentopd envs validate" in commands and "--allow-uncertified" in commands
