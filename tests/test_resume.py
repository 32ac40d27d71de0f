"Runs that are killed at random moments go on, and end with the weights of the run that was never killed, to the bit."
import json
import os
import random
import re
import shutil
import signal
import socket
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


ACCELERATE = Path(sys.executable).parent/"accelerate"
LONG = ["-m", "clip_nbdev.train", "--preset", "tiny", "--steps", 100_000, "--batch-size", 16, "--threads", 1, "--evals", 0, "--checkpoint-every", 0, "--precision", "no"]


def wait_for_first_step(folder, run):
    for _ in range(2400):
        path = folder/"run"/"metrics.jsonl"
        if path.exists() and path.stat().st_size: return
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.05)
    raise AssertionError("no first step in two minutes")


def alive(pid):
    try: return "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0]
    except FileNotFoundError: return False


def children(pid): return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for child processes in /proc")
@pytest.mark.parametrize("launcher", [["launch", "-q"], ["launch", "-q", "--multi_gpu", "--num_processes", 2]], ids=["one process", "two processes"])
def test_sigterm_to_the_launcher_alone_saves_and_stops(tmp_path, module_shards, launcher):
    run = start(tmp_path, "--data", module_shards, run=[ACCELERATE, *launcher, *LONG])
    wait_for_first_step(tmp_path, run)
    trainers = children(run.pid)
    os.kill(run.pid, signal.SIGTERM)
    said = run.communicate(timeout=120)[0]
    for _ in range(600):
        if not any(alive(pid) for pid in trainers): break
        time.sleep(0.1)
    assert trainers and not any(alive(pid) for pid in trainers), "a trainer lives on"
    found = re.search(r"stopped by (the end of its launcher|SIGTERM|a signal to another process) after step (\d+); saved as (run/checkpoints/step-\d+): the same command with --resume goes on", said)
    assert found, said
    assert (tmp_path/found[3]/"shared.pt").is_file()


def test_sigterm_then_resume_is_as_if_nothing_had_happened(tmp_path, module_shards, whole):
    run = start(tmp_path, "--data", module_shards)
    wait_for_first_step(tmp_path, run)
    run.send_signal(signal.SIGTERM)
    said = run.communicate(timeout=120)[0]
    assert run.returncode == 143 and "stopped by SIGTERM after step" in said and "Traceback" not in said
    code, said = finish(tmp_path, "--data", module_shards, "--resume")
    assert code == 0 and "resumed from step" in said
    assert same(weights(tmp_path), weights(whole[0]))
    code, said = finish(tmp_path, "--data", module_shards, "--resume")
    assert code == 0 and said.strip().startswith(f"run is finished ({STEPS} steps): nothing to resume.")


def launch_two(program, *options, cwd):
    command = [ACCELERATE, "launch", "-q", "--multi_gpu", "--num_processes", 2, program, *options]
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, timeout=300, env=os.environ | dict(PYTHONPATH=str(Path(__file__).parents[1])))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_fsdp_is_data_parallel_training_and_resumes(tmp_path, loss):
    program = Path(__file__).with_name("fsdp_run.py")
    launch_two(program, "run", "fsdp", loss, cwd=tmp_path)
    (tmp_path/"plain").mkdir()
    launch_two(program, "run", loss, cwd=tmp_path/"plain")
    split, plain = weights(tmp_path), weights(tmp_path/"plain")
    assert split.keys() == plain.keys() and ("logit_bias" in plain) == (loss == "siglip")
    assert max((split[k].float()-plain[k].float()).abs().max().item() for k in plain) < 1e-6
    for name in ("step-00000006", "step-00000004"): shutil.rmtree(tmp_path/"run"/"checkpoints"/name, ignore_errors=True)
    records = (tmp_path/"run"/"metrics.jsonl").read_text().splitlines()
    (tmp_path/"run"/"metrics.jsonl").write_text("\n".join(records[:-1])+"\n") # as if it had been killed before the end
    assert "resumed from step" in launch_two(program, "run", "fsdp", loss, "resume", cwd=tmp_path)
    assert same(weights(tmp_path), split)


def test_an_error_in_one_process_is_said_once_and_stops_all(tmp_path, module_shards):
    program = tmp_path/"program.py"
    program.write_text("""
import os
from clip_nbdev import train as t
from clip_nbdev.core import UserError
plain = t.file_source
def source(*args):
    made = plain(*args)
    def batches(whole=made.batches):
        for k, batch in enumerate(whole):
            if k == 6 and os.environ["RANK"] == "1": raise UserError("a shard has vanished")
            yield batch
    made.batches = batches()
    return made
t.file_source = source
t.main()
""")
    run = start(tmp_path, "--data", module_shards, run=[ACCELERATE, "launch", "-q", "--multi_gpu", "--num_processes", 2, program, *RUN[3:]])
    said = run.communicate(timeout=300)[0]
    assert run.returncode != 0
    assert said.count("error: a shard has vanished. Last good checkpoint: run/checkpoints/step-00000004; --resume goes on from it") == 1, said


def test_two_launchers_as_on_two_machines(tmp_path, module_shards):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    common = [ACCELERATE, "launch", "-q", "--multi_gpu", "--num_machines", 2, "--num_processes", 2, "--main_process_ip", "127.0.0.1", "--main_process_port", port]
    both = [start(tmp_path, "--data", module_shards, run=[*common, "--machine_rank", rank, *RUN[1:]]) for rank in range(2)]
    said = [run.communicate(timeout=300)[0] for run in both]
    assert [run.returncode for run in both] == [0, 0], said
    assert "16 pairs a process, 32 a step, each contrasted with 31 others" in said[0] and "pairs a process" not in said[1]
    assert json.loads((tmp_path/"run"/"metrics.jsonl").read_text().splitlines()[-1])["pairs"] == 32*STEPS
