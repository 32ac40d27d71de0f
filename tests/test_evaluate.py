"The evaluation command as users start it: on images that nobody prepared, on shards, on torchvision's layouts, and with mistakes."
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from conftest import as_bytes, image
from PIL import Image
from safetensors.torch import load_file

from clip_nbdev.core import UserError
from clip_nbdev.evaluate import EvalConfig, evaluate
from clip_nbdev.labelled import CONSTRUCTORS, LabelledOptions, open_set


def command(*options, cwd):
    "The command with random weights of the smallest preset, as a process of its own."
    return subprocess.run([sys.executable, "-m", "clip_nbdev.evaluate", *map(str, options)], cwd=cwd, capture_output=True, text=True,
                          env=os.environ | dict(OMP_NUM_THREADS="1"))


TINY = ("--model", "tiny", "--random-weights", "--device", "cpu")


@pytest.fixture(scope="module")
def mess(tmp_path_factory):
    "Three classes of images in all modes, and everything else that lies about in folders."
    folder = tmp_path_factory.mktemp("data")/"images"
    for k, name in enumerate(("red_fox", "polar-bear", "owl")):
        for i, mode in enumerate(("RGB", "L", "CMYK", "P", "RGBA", "LA", "1", "RGB", "RGB", "RGB")):
            path = folder/name/("deep/deeper" if i == 8 else "")/f"{i}.{'jpg' if mode in ('RGB', 'L', 'CMYK') else 'png'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            image(100*k + i, 20 + 5*i).convert(mode).save(path)
        Image.fromarray(np.random.default_rng(k).integers(0, 65535, (30, 40), dtype=np.uint16)).save(folder/name/"sixteen.png")
        Image.new("RGB", (1, 1)).save(folder/name/"dot.png")
    (folder/"owl"/"broken.jpg").write_bytes(b"not an image")
    (folder/"owl"/"cut.png").write_bytes(as_bytes(image(1))[:200])
    (folder/"owl"/"Thumbs.db").write_bytes(b"x")
    (folder/"readme.txt").write_text("hello")
    (folder/"empty").mkdir()
    for hidden in (".git", "__MACOSX", "owl/.thumbs"):
        (folder/hidden).mkdir()
        image(1).save(folder/hidden/"x.png")
    image(2).save(folder/"stray.png")
    return folder


def test_a_folder_that_nobody_prepared(mess, tmp_path):
    done = command(*TINY, "--data", mess, "--tasks", "zeroshot,probe,fewshot", "--shots", 1, 2, "--workers", 2, "--batch-size", 7, "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = pd.read_csv(tmp_path/"out"/"results.csv")
    assert list(found.columns) == ["data", "task", "how", "metric", "score", "sd", "chance", "n"]
    assert found.how.tolist() == ["bare names", "“a photo of a {}.”", "all 18 examples", "1 of each class", "2 of each class"]
    assert set(found.n) == {18} and np.allclose(found.chance, 1/3) and found.score.between(0, 1).all()
    about = json.loads((tmp_path/"out"/"results.json").read_text())
    assert about["sets"]["images"]["classes"] == [["owl"], ["polar bear"], ["red fox"]]
    said = done.stderr.replace("\n", " ")
    for note in ("class folders without an image are left out: empty", "1 images lie beside the class folders", "2 of 38 images (all) can't be used", "one half (seed 0)"): assert note in said, note
    assert "zero-shot" in done.stdout and "chance %" in done.stdout and "red fox" not in done.stderr
    assert sorted(p.name for p in (tmp_path/"out"/"figures").iterdir()) == ["classes.png", "few_shot.png", "predictions.png"]
    assert all(f"figures/{p.name}" in (tmp_path/"out"/"report.md").read_text() for p in (tmp_path/"out"/"figures").iterdir())


def test_workers_batches_and_cache_change_nothing(mess, tmp_path):
    how = dict(model="tiny", random_weights=True, data=str(mess), tasks="zeroshot,probe", device="cpu")
    first = evaluate(EvalConfig(**how, out=tmp_path/"a", batch_size=5))
    other = evaluate(EvalConfig(**how, out=tmp_path/"b", batch_size=64, workers=2))
    kept = sorted((tmp_path/"a"/"cache").iterdir())
    ours, theirs = (load_file(next((tmp_path/name/"cache").glob("features-*"))) for name in "ab")
    assert torch.equal(ours["labels"], theirs["labels"])
    torch.testing.assert_close(ours["x"], theirs["x"], atol=1e-5, rtol=1e-3)
    again = evaluate(EvalConfig(**how, out=tmp_path/"a", overwrite=True))
    pd.testing.assert_frame_equal(first, other, atol=0.06) # an image on the edge may fall to the other side
    pd.testing.assert_frame_equal(first, again)
    assert sorted((tmp_path/"a"/"cache").iterdir()) == kept


def test_limit_is_fair_and_repeatable(mess, tmp_path):
    how = dict(model="tiny", random_weights=True, data=str(mess), device="cpu", limit=12)
    a, b = (evaluate(EvalConfig(**how, out=tmp_path/name, workers=n)) for name, n in (("a", 0), ("b", 2)))
    assert 10 <= a.n[0] <= 12 and (a.n == b.n).all()
    classes = json.loads((tmp_path/"a"/"results.json").read_text())["sets"]["images"]["per_class"]
    assert len(classes) == 3 # not the first class alone


def test_shards_with_captions_and_with_labels(shards, tmp_path):
    done = command(*TINY, "--data", shards, "--tasks", "retrieval", "--prefix", "a photo of ", "--out", "captions", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = pd.read_csv(tmp_path/"captions"/"results.csv")
    assert found.metric.tolist() == ["recall@1", "recall@5", "recall@10"]*2 and set(found.n) == {46}
    assert "1 images can't be read and 1 have no caption" in done.stderr
    with tarfile.open(tmp_path/"labels.tar", "w") as tar:
        for i in range(20):
            for name, content in ((f"{i:03d}.png", as_bytes(image(i))), (f"{i:03d}.cls", str(i % 2).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    how = dict(model="tiny", random_weights=True, data=str(tmp_path/"labels.tar"), out=tmp_path/"labels", device="cpu")
    with pytest.raises(UserError, match="are numbers: give the names"): evaluate(EvalConfig(**how))
    (tmp_path/"names.txt").write_text("fox | vulpes\nbear\n")
    found = evaluate(EvalConfig(**how, classnames=tmp_path/"names.txt", tasks="zeroshot,probe", template=("{}", "the {}"), workers=2))
    assert found.how.tolist() == ["bare names", "ensemble of 2", "all 10 examples"] and set(found.n) == {10}


def test_a_table_with_labels_and_captions(tmp_path):
    lines = ["image,kind,text"]
    for i in range(12):
        image(i).save(tmp_path/f"{i}.png")
        lines.append(f"{i}.png,{('red_fox', 'bear')[i % 2]},image number {i}")
    (tmp_path/"table.csv").write_text("\n".join([*lines, "gone.png,bear,nothing"]))
    how = dict(image_col="image", label_col="kind", caption_col="text", out=tmp_path/"out", device="cpu")
    found = evaluate(EvalConfig(model="tiny", random_weights=True, data=str(tmp_path/"table.csv"), tasks="zeroshot,retrieval", **how))
    assert set(found.task) == {"zero-shot", "retrieval"} and set(found.n) == {12}
    with pytest.raises(UserError, match="no column 'label'"):
        evaluate(EvalConfig(model="tiny", random_weights=True, data=str(tmp_path/"table.csv"), **how | dict(label_col="label", overwrite=True)))


def test_a_split_folder_uses_its_split(tmp_path):
    for part, n in (("train", 8), ("test", 3)):
        for i in range(2*n):
            path = tmp_path/"data"/part/("fox", "bear")[i % 2]/f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image(i).save(path)
    found = evaluate(EvalConfig(model="tiny", random_weights=True, data=str(tmp_path/"data"), tasks="zeroshot,probe", out=tmp_path/"out", device="cpu"))
    assert set(found.n) == {6} and "all 16 examples" in found.how.tolist()


@pytest.mark.parametrize("options, said", [
    (("--tasks", "retrieval"), "gives no captions here"),
    (("--tasks", "guess"), "no task 'guess'"),
    (("--template", "a photo"), "has no slot"),
    (("--shots", "16", "--tasks", "fewshot"), "fewer than 16 shots"),
    (("--classnames", "two.txt"), "has 2 names, and the data 4 classes"),
    (("--classnames", "same.txt"), "two classes are named 'fox'"),
    (("--classnames", "hole.txt"), "a class name is empty"),
    (("--prompts", "ImageNut"), "none of the paper's data sets"),
    (("--data", "nowhere/at/all"), "no folder"),
    (("--data", "CIFAR10"), "--download fetches it"),
    (("--data", "glyphs:runes"), "no evaluation set 'runes'"),
    (("--model", "ViT-B/31"), "no preset 'ViT-B/31', did you mean"),
    (("--out", "taken"), "already holds results"),
])
def test_a_mistake_is_one_line(mess, tmp_path, options, said, capsys, monkeypatch):
    from clip_nbdev.evaluate import main
    for name, text in dict(two="a\nb", same="none\nfox\nfox\nbear", hole="fox\n\nowl\nbear").items(): (tmp_path/f"{name}.txt").write_text(text)
    (tmp_path/"taken").mkdir()
    (tmp_path/"taken"/"results.csv").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CLIP_NBDEV_DATA", raising=False)
    monkeypatch.setattr(sys, "argv", ["evaluate", *TINY, "--data", str(mess), "--out", "new", *options])
    with pytest.raises(SystemExit) as end: main()
    out = capsys.readouterr()
    assert end.value.code == 2 and out.err.strip().splitlines()[-1].startswith("error: ") and said in out.err, out.err


def jpeg(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    image(seed).save(path)


def fake_cifar(root, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *a: True)
    folder = root/"cifar-10-batches-py"
    folder.mkdir(parents=True)
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    (folder/"batches.meta").write_bytes(pickle.dumps(dict(label_names=names)))
    for file in ("test_batch", *(f"data_batch_{i}" for i in range(1, 6))):
        data = np.random.default_rng(0).integers(0, 255, (10, 3072), dtype=np.uint8)
        (folder/file).write_bytes(pickle.dumps(dict(data=data, labels=list(range(10)))))


def fake_eurosat(root, monkeypatch):
    for k, name in enumerate("AnnualCrop Forest HerbaceousVegetation Highway Industrial Pasture PermanentCrop Residential River SeaLake".split()):
        for i in range(2): jpeg(root/"eurosat"/"2750"/name/f"{name}_{i}.jpg", 10*k + i)


def fake_dtd(root, monkeypatch):
    meta = root/"dtd"/"dtd"/"labels"
    meta.mkdir(parents=True)
    for part in ("train", "val", "test"):
        names = [f"{c}/{c}_{i}.jpg" for c in ("banded", "crystalline") for i in range(2)]
        (meta/f"{part}1.txt").write_text("\n".join(names) + "\n")
        for i, name in enumerate(names): jpeg(root/"dtd"/"dtd"/"images"/name, i)


def fake_voc(root, monkeypatch):
    folder = root/"VOCdevkit"/"VOC2007" # torchvision puts the test part elsewhere only where it downloads
    (folder/"ImageSets"/"Main").mkdir(parents=True)
    (folder/"Annotations").mkdir()
    for i, things in enumerate((("dog", "person"), ("cat",), ("dog",), ("pottedplant", "cat"))):
        jpeg(folder/"JPEGImages"/f"{i}.jpg", i)
        objects = "".join(f"<object><name>{t}</name><difficult>0</difficult></object>" for t in things)
        (folder/"Annotations"/f"{i}.xml").write_text(f"<annotation><filename>{i}.jpg</filename>{objects}</annotation>")
    for part in ("train", "val", "test"): (folder/"ImageSets"/"Main"/f"{part}.txt").write_text("\n".join("0123") + "\n")


def fake_clevr(root, monkeypatch):
    folder = root/"clevr"/"CLEVR_v1.0"
    for part in ("train", "val"):
        scenes = []
        for i in range(4):
            jpeg(folder/"images"/part/f"CLEVR_{part}_{i:06d}.png", i)
            scenes.append(dict(image_filename=f"CLEVR_{part}_{i:06d}.png", objects=[{}]*(3 + 2*i)))
        (folder/"scenes").mkdir(exist_ok=True)
        (folder/"scenes"/f"CLEVR_{part}_scenes.json").write_text(json.dumps(dict(scenes=scenes)))


FAKES = dict(CIFAR10=(fake_cifar, 10, "accuracy", 10), EuroSAT=(fake_eurosat, 10, "accuracy", 20), DTD=(fake_dtd, 2, "accuracy", 4),
             VOC2007=(fake_voc, 20, "map_11_point", 4), CLEVRCounts=(fake_clevr, 8, "accuracy", 4))


@pytest.mark.parametrize("name", FAKES)
def test_torchvision_sets_in_their_own_layouts(name, tmp_path, monkeypatch):
    make, n_classes, metric, n = FAKES[name]
    make(tmp_path/"data", monkeypatch)
    found = evaluate(EvalConfig(model="tiny", random_weights=True, data=name, root=tmp_path/"data", out=tmp_path/"out", device="cpu"))
    about = next(iter(json.loads((tmp_path/"out"/"results.json").read_text())["sets"].values()))
    assert len(about["classes"]) == n_classes and set(found.metric) == {metric} and set(found.n) == {n}
    if name == "CLEVRCounts": assert [c["class"] for c in sorted(about["per_class"], key=lambda c: int(c["class"]))] == ["3", "5", "7", "9"]
    if name == "EuroSAT": assert about["classes"][2] == ["brushland or shrubland"]
    if name == "VOC2007": assert ["potted plant"] in about["classes"] and found.chance.iloc[0] == pytest.approx(6/80)


def test_names_that_the_prompts_bring_fit_the_labels(tmp_path, monkeypatch):
    "EuroSAT's folders and its prompts are two lists by different people: they must be of the same things in the same order."
    fake_eurosat(tmp_path, monkeypatch)
    data = open_set(LabelledOptions(root=tmp_path), "EuroSAT")
    own = data.parts["all"]().data.classes
    alike = dict(HerbaceousVegetation="brushland", PermanentCrop="permanent", SeaLake="lake", AnnualCrop="annual")
    for folder, words in zip(own, data.classnames): assert alike.get(folder, folder.lower()) in words.lower()
    flowers = getattr(torchvision.datasets.Flowers102, "classes", None) # since torchvision 0.22
    assert flowers is None or flowers[:3] == ["pink primrose", "hard-leaved pocket orchid", "canterbury bells"]


def test_every_constructor_refuses_an_empty_folder_with_one_line(tmp_path):
    for name in CONSTRUCTORS:
        with pytest.raises(UserError, match="can't be read from"): open_set(LabelledOptions(root=tmp_path), name)


@pytest.mark.slow
def test_full_size_in_little_memory(mess, tmp_path):
    for model in ("ViT-B/32", "RN50"):
        process = subprocess.Popen([sys.executable, "-m", "clip_nbdev.evaluate", "--model", model, "--random-weights", "--data", str(mess), "--out", str(tmp_path/model[:2]),
                                    "--device", "cpu", "--batch-size", "16"], env=os.environ | dict(OMP_NUM_THREADS="1"))
        _, status, used = os.wait4(process.pid, 0)
        assert status == 0 and used.ru_maxrss < 8*2**20
        assert pd.read_csv(tmp_path/model[:2]/"results.csv").score.between(0, 0.8).all()
