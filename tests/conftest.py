"Small real data for the tests: images that tests draw, in the formats that users have."
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

os.environ.setdefault("OMP_NUM_THREADS", "1")
REPO = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def repo(): return REPO


def image(seed, side=48):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)).resize((side, side), Image.Resampling.NEAREST)


def as_bytes(img):
    buffer = io.BytesIO()
    img.save(buffer, "PNG")
    return buffer.getvalue()


def pytest_addoption(parser): parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_configure(config): config.addinivalue_line("markers", "slow: takes many minutes, runs with --slow alone")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"): item.add_marker(pytest.mark.skip(reason="runs with --slow"))


def write_shards(folder):
    "Two shards of 24 pairs; pair 5 has a broken image, pair 7 an empty caption, each other two captions."
    for shard in range(2):
        with tarfile.open(folder/f"pairs-{shard:04d}.tar", "w") as tar:
            for i in range(24*shard, 24*shard + 24):
                data = b"not an image" if i == 5 else as_bytes(image(i))
                text = " \n" if i == 7 else f"image number {i}\nthe {i}th square"
                for name, content in ((f"{i:05d}.png", data), (f"{i:05d}.txt", text.encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return f"{folder}/pairs-{{0000..0001}}.tar"


@pytest.fixture
def shards(tmp_path): return write_shards(tmp_path)


@pytest.fixture(scope="module")
def module_shards(tmp_path_factory): return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(autouse=True)
def quiet_threads(): torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
