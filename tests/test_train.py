"Whole commands: what a user types, what lies in the folder afterwards, what a mistake says."
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import torch
from accelerate.utils import DistributedType
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clip_nbdev import load
from clip_nbdev import report as report_module
from clip_nbdev import train as train_module
from clip_nbdev.clip import create_model, to_released
from clip_nbdev.core import UserError
from clip_nbdev.export import export_hf
from clip_nbdev.glyphs import GlyphPairs
from clip_nbdev.resume import Stopped
from clip_nbdev.train import TrainConfig, build_model, train

ACCELERATE = Path(sys.executable).parent/"accelerate"


def tiny(out, **options): return TrainConfig(**dict(out=Path(out), preset="tiny", precision="no", steps=4, batch_size=8, evals=0, threads=1) | options)


@pytest.fixture
def small_suite(monkeypatch): monkeypatch.setattr(report_module, "SUITE", ("dice", "cards_unseen"))


def test_scenes_are_evaluated_where_they_were_trained_on(tmp_path, small_suite, monkeypatch):
    monkeypatch.setattr(report_module, "SCENE_SUITE", ("scenes_count",))
    assert set(train(tiny(tmp_path/"run", scenes=0.5))["suite"]) == {"dice", "cards_unseen", "scenes_count"}


def last_record(run): return json.loads((Path(run)/"metrics.jsonl").read_text().splitlines()[-1])


def test_run_folder_opens_in_open_clip(tmp_path, small_suite):
    run = tmp_path/"run"
    train(tiny(run))
    names = {p.name for p in run.iterdir()}
    assert names >= {"open_clip_config.json", "open_clip_model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json",
                     "metrics.jsonl", "report.md", "figures"}
    last = last_record(run)
    assert set(last["suite"]) == {"dice", "cards_unseen"} and last["steps"] == 4 and "seconds" in last
    assert all(0 <= v <= 1 for v in last["suite"].values())

    model, preprocess, tokenizer = load(run)
    theirs, _, their_preprocess = open_clip.create_model_and_transforms(f"local-dir:{run}")
    their_tokenizer = open_clip.get_tokenizer(f"local-dir:{run}")
    theirs.eval()
    captions = ["a red heart", "Playing card &amp; queen of hearts", "domino tile horizontal-03-05 in blue", ""]
    ours_ids, their_ids = tokenizer(captions), their_tokenizer(captions)
    for ours, other in zip(ours_ids.tolist(), their_ids.tolist()):
        end = ours.index(tokenizer.eos_id) + 1
        assert ours[:end] == other[:end]
    img, _ = GlyphPairs(32, groups=("dice",)).batch(4)
    images = [Image.fromarray((i.permute(1, 2, 0)*255).byte().numpy()).resize((50, 41)) for i in img]
    ours_img, their_img = (torch.stack([p(x) for x in images]) for p in (preprocess, their_preprocess))
    torch.testing.assert_close(ours_img, their_img)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(ours_img), theirs.encode_image(their_img), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.encode_text(ours_ids), theirs.encode_text(their_ids), rtol=1e-5, atol=1e-5)


def test_same_seed_same_weights(tmp_path, small_suite):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)): train(tiny(tmp_path/name, seed=seed))
    a, b, c = ((tmp_path/n/"open_clip_model.safetensors").read_bytes() for n in "abc")
    assert a == b and a != c


def test_photographs_are_read_and_broken_ones_counted(tmp_path, shards):
    run = tmp_path/"run"
    train(tiny(run, data=shards, epochs=2., steps=None, eval_data=shards))
    last = last_record(run)
    assert last["steps"] == 12 and last["broken_images"] >= 1 and last["empty_captions"] >= 1
    assert set(last["retrieval"]) >= {f"{way}@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    assert last["retrieval"]["n_images"] == 46 and last["retrieval"]["broken_images"] == 1
    assert f"{last['broken_images']} images that did not decode" in (run/"report.md").read_text()


def test_vision_transformer_with_a_language_model_loss(tmp_path, small_suite):
    run = tmp_path/"run"
    train(tiny(run, preset="tiny-vit", lm_weight=0.5, steps=40, warmup=5))
    records = [json.loads(line) for line in (run/"metrics.jsonl").read_text().splitlines()]
    first, later = (next(r["lm_loss"] for r in records if r.get("step") == step) for step in (1, 40))
    assert later < first - 0.3
    assert load(run)[0].config.patch_size == 8


def test_warns_at_the_floor(tmp_path, small_suite, capsys, monkeypatch):
    monkeypatch.setattr(train_module, "GlyphPairs", NoisePairs)
    train(tiny(tmp_path/"run", steps=130, warmup=20, batch_size=8, lr=3e-3))
    out = capsys.readouterr()
    assert "within 2% of ln 8" in out.out + out.err


def test_does_not_warn_when_learning(tmp_path, small_suite, capsys):
    train(tiny(tmp_path/"run", steps=310, warmup=200, batch_size=64, lr=5e-3, evals=2))
    out = capsys.readouterr()
    assert "within 2%" not in out.out + out.err
    watched = [json.loads(line) for line in (tmp_path/"run"/"metrics.jsonl").read_text().splitlines() if "suite" in line]
    assert [r.get("step") for r in watched] == [155, None] and "symbols" in watched[0]["suite"]


def test_overwrite_replaces_a_run(tmp_path, small_suite):
    train(tiny(tmp_path/"run", seed=1))
    before = (tmp_path/"run"/"open_clip_model.safetensors").read_bytes()
    train(tiny(tmp_path/"run", seed=2, overwrite=True))
    assert (tmp_path/"run"/"open_clip_model.safetensors").read_bytes() != before


def at_step(monkeypatch, number, act):
    "Do something after a step of the run."
    plain = train_module.Meter.step
    def step(meter, values):
        plain(meter, values)
        if meter.trainer.step == number: act(meter.trainer)
    monkeypatch.setattr(train_module.Meter, "step", step)


def weights(run): return (Path(run)/"open_clip_model.safetensors").read_bytes()


def test_stopped_glyph_run_goes_on_to_the_same_weights(tmp_path, small_suite, monkeypatch, capsys):
    options = dict(steps=8, checkpoint_every=3, evals=2, batch_size=16)
    train(tiny(tmp_path/"whole", **options))
    with monkeypatch.context() as patch:
        at_step(patch, 5, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped, match="stopped by SIGTERM after step 6; saved as .*step-00000006: the same command with --resume goes on"):
            train(tiny(tmp_path/"run", **options))
    capsys.readouterr()
    train(tiny(tmp_path/"run", **options, resume=True))
    assert "resumed from step 6" in capsys.readouterr().out
    assert weights(tmp_path/"run") == weights(tmp_path/"whole")
    losses = [[r["loss"] for r in map(json.loads, (tmp_path/name/"metrics.jsonl").read_text().splitlines()) if "loss" in r] for name in ("run", "whole")]
    assert losses[0] == losses[1]
    assert train(tiny(tmp_path/"run", **options, resume=True))["steps"] == 8
    assert "is finished (8 steps): nothing to resume" in capsys.readouterr().out
    with pytest.raises(UserError, match="already holds a run: choose another --out, go on with it by --resume"): train(tiny(tmp_path/"run", **options))


def test_checkpoints_keep_the_last_and_the_best(tmp_path, small_suite, monkeypatch):
    scores = iter((0.9, 0.1, 0.2))
    monkeypatch.setattr(train_module, "score", lambda found: next(scores))
    train(tiny(tmp_path/"run", steps=16, evals=4, checkpoint_every=1, keep=2))
    names = [p.name for p in sorted((tmp_path/"run"/"checkpoints").iterdir())]
    assert names == ["step-00000004", "step-00000015", "step-00000016"] # the evaluation of step 4 was the best


def test_resume_starts_afresh_where_there_is_nothing(tmp_path, small_suite, capsys):
    train(tiny(tmp_path/"run", resume=True))
    assert "starting afresh" in capsys.readouterr().out


def test_resume_refuses_another_model_and_says_other_options(tmp_path, small_suite, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped): train(tiny(tmp_path/"run"))
    with pytest.raises(UserError, match=r"had other options \(batch_size 8 -> 4\)"): train(tiny(tmp_path/"run", batch_size=4, resume=True))
    train(tiny(tmp_path/"run", lr=1e-5, resume=True))
    assert "with other options: lr 0.002 -> 1e-05" in capsys.readouterr().out


def break_weights(trainer):
    with torch.no_grad(): trainer.model.visual.conv1.weight.fill_(float("nan"))


def test_a_loss_that_is_no_number_names_the_last_good_checkpoint(tmp_path, small_suite, monkeypatch):
    at_step(monkeypatch, 3, break_weights)
    with pytest.raises(UserError, match="the loss is nan at step 4: it comes again unless something changes, so give a lower --lr. Last good checkpoint: .*step-00000002; --resume goes on from it"):
        train(tiny(tmp_path/"run", steps=8, checkpoint_every=2))


def test_a_shard_that_vanishes_names_the_last_good_checkpoint(tmp_path, shards, monkeypatch):
    at_step(monkeypatch, 3, lambda trainer: (tmp_path/"pairs-0001.tar").unlink())
    with pytest.raises(UserError, match="pairs-0001.tar .*No such file.* Last good checkpoint: .*step-0000000"):
        train(tiny(tmp_path/"run", data=shards, steps=40, checkpoint_every=2))


def test_a_full_disk_names_the_last_good_checkpoint(tmp_path, small_suite, monkeypatch):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda trainer: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1])))
        try:
            with pytest.raises(UserError, match="the checkpoint of step 4 can't be written .* Last good checkpoint: .*step-00000002"):
                train(tiny(tmp_path/"run", steps=8, checkpoint_every=2))
        finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    train(tiny(tmp_path/"run", steps=8, checkpoint_every=2, resume=True)) # and with space again it goes on


def test_gradient_caching_is_the_plain_step(tmp_path, small_suite):
    for name, micro in (("plain", None), ("cached", 3)): train(tiny(tmp_path/name, preset="tiny-vit", micro_batch=micro, steps=5))
    ours, cached = (load_file(tmp_path/name/"open_clip_model.safetensors") for name in ("plain", "cached"))
    for k, v in ours.items(): torch.testing.assert_close(cached[k], v, rtol=0, atol=1e-5, msg=k)


def test_gradient_checkpointing_is_the_plain_step(tmp_path, small_suite):
    for name, on in (("plain", False), ("checkpointed", True)): train(tiny(tmp_path/name, grad_checkpointing=on, steps=5))
    assert weights(tmp_path/"plain") == weights(tmp_path/"checkpointed")


def test_half_precision_storage_trains_and_resumes(tmp_path, small_suite, monkeypatch):
    options = dict(adam_stats="bfloat16", text_weights="bfloat16", precision="bf16", steps=6)
    train(tiny(tmp_path/"whole", **options))
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped): train(tiny(tmp_path/"run", **options))
    train(tiny(tmp_path/"run", **options, resume=True))
    assert weights(tmp_path/"run") == weights(tmp_path/"whole")
    state = load_file(tmp_path/"run"/"open_clip_model.safetensors")
    assert state["token_embedding.weight"].dtype == torch.bfloat16 and state["visual.conv1.weight"].dtype == torch.float32
    assert load(tmp_path/"run")[0].text.token_embedding.weight.dtype == torch.float32 # weights load in float32


def test_sigmoid_loss_run_opens_in_open_clip(tmp_path, small_suite):
    train(tiny(tmp_path/"run", loss="siglip", steps=30, batch_size=16, lr=3e-3))
    records = [json.loads(line) for line in (tmp_path/"run"/"metrics.jsonl").read_text().splitlines()]
    assert records[1]["loss"] < records[0]["loss"]
    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path/'run'}")
    ours = load(tmp_path/"run")[0]
    torch.testing.assert_close(theirs.logit_bias, ours.logit_bias)
    assert -11 < ours.logit_bias.item() < -9 and ours.logit_bias.item() != -10


def test_second_run_at_a_higher_resolution(tmp_path, small_suite, capsys):
    "FixRes, as ViT-L/14 went from 224 to 336 pixels."
    train(tiny(tmp_path/"first", preset="tiny-vit", steps=6))
    train(tiny(tmp_path/"second", preset=None, init=tmp_path/"first", img_size=48, lr=1e-9, warmup=0, steps=1))
    first, second = (load(tmp_path/name)[0] for name in ("first", "second"))
    assert second.config.img_size == 48 and len(second.visual.positional_embedding) == 37
    torch.testing.assert_close(second.text.token_embedding.weight, first.text.token_embedding.weight, rtol=0, atol=1e-6)
    assert weights(tmp_path/"first") != weights(tmp_path/"second")


@pytest.mark.parametrize("layout", ["open_clip", "transformers", "file", "shipped"])
def test_init_takes_what_load_takes(tmp_path, small_suite, layout):
    "The start's weights, vocabulary and activation; the run is one of ours, which open_clip opens and --resume knows."
    train(tiny(tmp_path/"first", preset="tiny-vit", steps=2))
    model, _, tokenizer = load(tmp_path/"first")
    told = dict(init=str(tmp_path/"start"))
    if layout == "transformers": export_hf(tmp_path/"first", tmp_path/"start")
    elif layout == "open_clip":
        (tmp_path/"start").mkdir()
        for name in ("open_clip_config.json", "open_clip_model.safetensors", "tokenizer.json", "tokenizer_config.json"): (tmp_path/"start"/name).write_bytes((tmp_path/"first"/name).read_bytes())
    elif layout == "file":
        torch.save(dict(epoch=1, state_dict={f"module.{k}": v for k, v in to_released(model.state_dict()).items()}), tmp_path/"epoch_1.pt")
        told = dict(init="tiny-vit", weights=str(tmp_path/"epoch_1.pt"), merges=str(tmp_path/"first"))
    else: told, (model, _, tokenizer) = dict(init="pocket"), load("pocket")
    train(tiny(tmp_path/"second", preset=None, **told, lr=1e-9, warmup=0, steps=1))
    after, _, kept = load(tmp_path/"second")
    assert (after.config, kept.merges) == (model.config, tokenizer.merges)
    torch.testing.assert_close(after.text.state_dict(), model.text.state_dict(), rtol=0, atol=1e-6)
    open_clip.create_model_and_transforms(f"local-dir:{tmp_path/'second'}")


def test_resume_never_removes_a_finished_model(tmp_path, small_suite):
    train(tiny(tmp_path/"run", checkpoint_every=0))
    (tmp_path/"run"/"metrics.jsonl").unlink()
    before = weights(tmp_path/"run")
    with pytest.raises(UserError, match="holds a model and no checkpoint to go on from"): train(tiny(tmp_path/"run", resume=True))
    assert weights(tmp_path/"run") == before


def test_leftovers_of_a_kill_do_not_stop_a_resume(tmp_path, small_suite, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped): train(tiny(tmp_path/"run"))
    for name in ("open_clip_model.aside", "config.json.aside", "metrics.aside"): (tmp_path/"run"/name).write_text("half")
    (tmp_path/"run"/"unfinished").mkdir()
    train(tiny(tmp_path/"run", resume=True))
    assert not list((tmp_path/"run").glob("*.aside")) and not (tmp_path/"run"/"unfinished").exists()


def test_a_failed_evaluation_does_not_lose_the_model(tmp_path, small_suite, monkeypatch):
    def fail(*args): raise UserError("no images")
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "evaluate", fail)
        with pytest.raises(UserError, match="no images. Last good checkpoint: .*step-00000004"): train(tiny(tmp_path/"run"))
    load(tmp_path/"run")
    assert train(tiny(tmp_path/"run", resume=True))["steps"] == 4


def test_rows_that_share_their_image_are_reported(tmp_path):
    Path(tmp_path/"data").mkdir()
    for i in range(20): Image.new("RGB", (32, 32), "red").save(tmp_path/"data"/f"{i}.png"), (tmp_path/"data"/f"{i}.txt").write_text(f"red square {i}")
    last = train(tiny(tmp_path/"run", data=str(tmp_path/"data")))
    assert last["repeated_images"] == 4*7 and "in a batch twice all the same, for want of others: 28" in (tmp_path/"run"/"report.md").read_text()


def test_init_refuses_what_it_would_ignore(tmp_path, small_suite):
    train(tiny(tmp_path/"first"))
    for options, said in ((dict(text_tower="bow"), "give --text-tower transformer"), (dict(preset="tiny-vit"), "is no tiny-vit: leave --preset out")):
        with pytest.raises(UserError, match=said): train(tiny(tmp_path/"second", init=tmp_path/"first", **options))


def test_a_vision_transformer_has_no_statistics_to_freeze(tmp_path):
    with pytest.raises(UserError, match="no BatchNorm"): build_model(tiny(tmp_path, preset="tiny-vit", freeze_bn=True), 600, create_model("tiny-vit", vocab_size=600))

@pytest.mark.parametrize("freeze", [False, True])
def test_frozen_statistics_stay_and_weights_move(tmp_path, small_suite, freeze):
    train(tiny(tmp_path/"first"))
    train(tiny(tmp_path/"second", init=tmp_path/"first", freeze_bn=freeze, lr=1e-3, warmup=1))
    before, after = (load_file(tmp_path/name/"open_clip_model.safetensors") for name in ("first", "second"))
    statistics = [k for k in before if "running" in k]
    assert statistics and all(torch.equal(before[k], after[k]) == freeze for k in statistics)
    assert not torch.equal(before["visual.conv1.weight"], after["visual.conv1.weight"])


@pytest.mark.parametrize("options", [dict(lm_weight=0.1), dict(adam_stats="bfloat16"), dict(text_weights="bfloat16", precision="bf16")], ids=lambda o: next(iter(o)))
def test_fsdp_refuses_what_it_cannot_do(tmp_path, options):
    acc = SimpleNamespace(distributed_type=DistributedType.FSDP)
    with pytest.raises(UserError, match="do not work with FSDP"): train_module.prepare(acc, tiny(tmp_path, **options), None)


def test_tracker_is_written(tmp_path, small_suite):
    train(tiny(tmp_path/"run", tracker="tensorboard", steps=20))
    found = EventAccumulator(str(tmp_path/"run"/"logs"/"clip_nbdev")).Reload()
    assert [e.step for e in found.Scalars("loss")] == [1, 20]


class NoisePairs(GlyphPairs):
    "Pairs whose images say nothing."
    def batch(self, n):
        images, captions = super().batch(n)
        return torch.full_like(images, 0.5), captions


@pytest.mark.parametrize("options, said", [
    (["--data", "missing-{0000..0003}.tar"], "no shard matches missing-0000.tar"),
    (["--data", "missing.csv"], "no file missing.csv"),
    (["--data", "no such thing"], "can't tell what"),
    (["--data", "words.csv"], "has no column 'caption'"),
    (["--data", "blank.csv"], "no image has a caption"),
    (["--preset", "nope"], "no preset 'nope': there are"),
    (["--steps", "3", "--minutes", "2"], "--minutes and --steps contradict each other"),
    (["--epochs", "2"], "--epochs has no meaning for glyphs"),
    (["--scenes", "2"], "--scenes is a share"),
    (["--data", "table.csv", "--caption-col", "text", "--scenes", "0.5"], "belong to --data glyphs"),
    (["--batch-size", "1"], "--batch-size 1 has nothing to contrast"),
    (["--eval-data", "missing.tar", "--steps", "2"], "no shard matches missing.tar"),
    (["--out", "old"], "already holds a run"),
    (["--out", "other", "--overwrite"], "holds files of something else (mine.txt)"),
    (["--out", "one.png"], "is a file"),
    (["--beta2", "1"], "--beta2 must be"),
    (["--lm-weight", "0.1", "--text-tower", "bow"], "a bag of words has no next word"),
    (["--lm-weight", "-1"], "--lm-weight must not be below 0"),
    (["--no-gather-with-grad"], "points the wrong way"),
    (["--out", "/proc/run"], "can't be made or written to"),
    (["--preset", "tiny", "--batch-size", "16", "--micro-batch", "5"], "leaves a part of one pair"),
    (["--seed", "99999999999999999999"], "--seed must be"),
    (["--data", "table.csv", "--caption-col", "text", "--batch-size", "2"], "needs others to be contrasted with"),
    (["--data", "table.csv", "--caption-col", "text", "--eval-data", "broken.csv"], "no usable pair"),
    (["--resume", "--overwrite"], "--resume and --overwrite contradict each other"),
    (["--text-weights", "bfloat16", "--precision", "no"], "--text-weights bfloat16 needs --precision bf16"),
    (["--lm-weight", "0.1", "--micro-batch", "2"], "can't be used together"),
    (["--freeze-bn"], "--freeze-bn needs --init"),
    (["--init", "nowhere"], "no model in nowhere"), (["--init", "ViT-B/32"], "is a name without weights"), (["--weights", "x.pt"], "--weights needs --init"),
    (["--init", "old"], "was not written by a run"),
    (["--tracker", "nonsense", "--steps", "1"], "--tracker nonsense"),
    (["--data", "table.csv", "--caption-col", "text", "--batch-size", "4"], "fewer than one batch"),
])
def test_mistakes_are_said_in_one_line(tmp_path, monkeypatch, capsys, options, said):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32)).save("one.png")
    Path("table.csv").write_text("filepath,text\none.png,an image\n")
    Path("words.csv").write_text("filepath,words\none.png,an image\n")
    Path("blank.csv").write_text("filepath,caption\none.png,  \n")
    Path("bad.png").write_text("no image")
    Path("broken.csv").write_text("filepath,text\nbad.png,an image\n")
    Path("old").mkdir()
    Path("old/config.json").write_text("{}")
    Path("other").mkdir()
    Path("other/mine.txt").write_text("mine")
    Path("other/config.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["train", "--threads", "1", *options])
    with pytest.raises(SystemExit) as stop: train_module.main()
    err = capsys.readouterr().err.strip().splitlines()
    assert Path("other/mine.txt").exists() and Path("old/config.json").exists()
    assert stop.value.code == 2 and len(err) == 1 and err[0].startswith("error: ") and said in err[0]


def launch(*options, cwd, **env):
    command = [ACCELERATE, "launch", "-q", *options]
    return subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, env=os.environ | env)


def test_launcher_says_a_mistake_without_a_traceback(tmp_path):
    done = launch("-m", "clip_nbdev.train", "--preset", "nope", cwd=tmp_path)
    assert done.returncode != 0 and "error: no preset 'nope'" in done.stderr and "Traceback" not in done.stdout + done.stderr


def test_help_answers(tmp_path):
    done = launch("-m", "clip_nbdev.train", "--help", cwd=tmp_path)
    assert done.returncode == 0
    for option in ("--data", "--preset", "--out", "--batch-size", "--minutes", "--steps", "--epochs", "--eval-data", "--threads", "--precision", "--checkpoint-every", "--resume", "--micro-batch", "--tracker"):
        assert option in done.stdout


def test_launcher_that_starts_fewer_processes_is_seen(tmp_path, shards):
    options = ["-m", "clip_nbdev.train", "--data", shards, "--preset", "tiny", "--steps", "1", "--batch-size", "8", "--threads", "1", "--out"]
    said = {n:launch("--cpu", "--num_processes", n, *options, f"run{n}", cwd=tmp_path).stdout for n in "12"}
    assert "was asked for 2 processes and started 1" in said["2"] and "was asked for" not in said["1"]


def test_two_processes_run_to_the_end(tmp_path, shards):
    done = launch("--multi_gpu", "--num_processes", "2", "-m", "clip_nbdev.train", "--data", shards, "--preset", "tiny", "--steps", "4",
                  "--batch-size", "8", "--out", "run", "--threads", "1", "--eval-data", shards, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 pairs a process, 16 a step, each contrasted with 15 others" in done.stdout
    assert last_record(tmp_path/"run")["pairs"] == 64
    model, _, tokenizer = load(tmp_path/"run")
    alone = train_module.evaluate(TrainConfig(data=shards, eval_data=shards), model, tokenizer)
    assert alone["retrieval"] == last_record(tmp_path/"run")["retrieval"] # two processes measured what one does


def test_two_processes_agree_when_time_is_up(tmp_path, shards):
    done = launch("--multi_gpu", "--num_processes", "2", "-m", "clip_nbdev.train", "--data", shards, "--preset", "tiny", "--minutes", "0.05",
                  "--batch-size", "8", "--out", "run", "--threads", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    last = last_record(tmp_path/"run")
    assert last["pairs"] == 16*last["steps"] and last["broken_images"] >= 1 # whichever process meets the broken one, it is counted
