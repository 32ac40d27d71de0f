"Runs that are killed at random moments go on, and end with the weights of the run that was never killed, to the bit."
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

STEPS = 24
RUN = [sys.executable, "-m", "clip_nbdev.train", "--preset", "tiny", "--steps", STEPS, "--batch-size", 16, "--threads", 1, "--evals", 0, "--checkpoint-every", 4, "--precision", "no"]


def start(folder, *options, run=RUN, **env):
    command = [str(x) for x in (*run, "--out", "run", *options)]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | dict(PYTHONPATH=str(Path(__file__).parents[1])) | env)


def finish(folder, *options, **how):
    run = start(folder, *options, **how)
    said = run.communicate(timeout=300)[0]
    return run.returncode, said


def weights(folder): return load_file(folder/"run"/"open_clip_model.safetensors")


def losses(folder):
    records = [json.loads(line) for line in (folder/"run"/"metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r["loss"] for r in records if "loss" in r}


def same(a, b):
    assert a.keys() == b.keys()
    return all(a[k].equal(b[k]) for k in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, module_shards):
    "The run that nobody disturbed, and how long its training took."
    folder = tmp_path_factory.mktemp("whole")
    code, said = finish(folder, "--data", module_shards)
    assert code == 0, said
    last = json.loads((folder/"run"/"metrics.jsonl").read_text().splitlines()[-1])
    return folder, last["seconds"]


def kill(run, folder, moment):
    "SIGKILL so many seconds after the first step, or while a checkpoint is being written where no number is given; False where the run was over before."
    begun = time.monotonic()
    while run.poll() is None and time.monotonic() - begun < 120:
        if moment is None and (folder/"run"/"checkpoints"/"unfinished").exists(): break
        if moment is not None and (folder/"run"/"metrics.jsonl").exists() and (folder/"run"/"metrics.jsonl").stat().st_size:
            time.sleep(moment)
            break
    if run.poll() is not None: return False
    run.kill()
    run.wait()
    return True


@pytest.mark.parametrize("seed", [0, 1, 2, *(pytest.param(k, marks=pytest.mark.slow) for k in range(3, 20))])
def test_killed_runs_end_with_the_same_weights(tmp_path, module_shards, whole, seed):
    rng = random.Random(seed)
    moments = [None] if seed == 0 else [rng.choice([None, rng.uniform(0, 1.5*whole[1])]) for _ in range(rng.randint(1, 3))]
    killed = [kill(start(tmp_path, "--data", module_shards, "--resume"), tmp_path, moment) for moment in moments]
    assert seed or killed == [True] # the first case is sure to be killed within a write
    before = losses(tmp_path)
    code, said = finish(tmp_path, "--data", module_shards, "--resume")
    assert code == 0, said
    assert re.search(r"resumed from step \d+|starting afresh|is finished", said)
    assert same(weights(tmp_path), weights(whole[0]))
    after = losses(tmp_path)
    assert after == losses(whole[0]) and all(after[k] == v for k, v in before.items() if k in after)
    assert not any(p.name.endswith("aside") for p in (tmp_path/"run").rglob("*"))
