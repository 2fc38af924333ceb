from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from luthier.store.store import Store
from luthier.workflows.models import pull

LIFE = Path(__file__).with_name("sdk_life.py")
SDKS = Path(sys.prefix) / "sdk"  # `make setup` puts the older majors there


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, tiny_encoder: Path) -> Iterator[str]:
    """A service in a process of its own, as ``luthier up`` starts it."""
    home = tmp_path_factory.mktemp("up") / "home"
    store = Store(home)
    pull(store, str(tiny_base))
    pull(store, str(tiny_encoder))
    store.close()
    command = [sys.executable, "-m", "luthier", "up", "--port", "0", "--announce"]
    environment = {**os.environ, "LUTHIER_HOME": str(home)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, text=True) as process:
        assert process.stdout is not None
        yield f"{json.loads(process.stdout.readline())['url']}/v1"
        process.terminate()
        process.wait(60)


@pytest.mark.parametrize("major", ["1", "2", "3"])
def test_a_program_written_for_openai_runs_with_each_major_of_its_package(url: str, major: str) -> None:
    folder = SDKS / major
    environment = dict(os.environ)
    if folder.is_dir():
        environment["PYTHONPATH"] = f"{folder}{os.pathsep}{environment.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [sys.executable, str(LIFE), url], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout)["openai"].startswith(f"{major}.")
