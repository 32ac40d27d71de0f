"Programs that others wrote evaluate a model of ours, and find what we find."
import io
import json
import os
import random
import subprocess
import sys
import tarfile

import pytest
import torch
from PIL import Image

from clip_nbdev.checkpoint import shipped
from clip_nbdev.glyphs import eval_set


def write_set(folder, samples, **texts):
    "clip-benchmark's layout of a local webdataset: one shard, and text files beside it."
    (folder/"test").mkdir(parents=True)
    (folder/"test"/"nshards.txt").write_text("1")
    for name, text in texts.items(): (folder/f"{name}.txt").write_text(text)
    with tarfile.open(folder/"test"/"0.tar", "w") as tar:
        for i, (image, ending, text) in enumerate(samples):
            png = io.BytesIO()
            Image.fromarray(image).save(png, "PNG")
            for name, data in (("png", png.getvalue()), (ending, text.encode())):
                info = tarfile.TarInfo(f"{i:05d}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder


def run(*command, cwd):
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def their_metrics(name, folder, tmp_path, task):
    "clip-benchmark's command line, as it comes: it knows nothing of us."
    run("-m", "clip_benchmark.cli", "eval", "--model", f"local-dir:{shipped()['pocket']}", "--pretrained", "", "--dataset", f"wds/{name}", "--dataset_root", folder, "--task", task,
        "--recall_k", 1, 5, 10, "--num_workers", 0, "--no_amp", "--batch_size", 100, "--output", tmp_path/"theirs.json", cwd=tmp_path)
    return json.loads((tmp_path/"theirs.json").read_text())["metrics"]


def our_metrics(data, tasks, tmp_path, *options):
    run("-m", "clip_nbdev.evaluate", "--model", "pocket", "--data", data, "--tasks", tasks, "--out", tmp_path/"ours", "--device", "cpu", *options, cwd=tmp_path)
    return json.loads((tmp_path/"ours"/"results.json").read_text())["rows"]


@pytest.fixture(scope="module")
def drawings():
    "Each symbol of the corpus once, at 80 pixels, so that both programs have to resize it; its class; the class names."
    data = eval_set("symbols", 80, 1)
    everything = data.labels.tolist()
    first = [i for i, label in enumerate(everything) if label not in everything[:i]] # two like images would be each other's answers
    images, labels = data.images[first], [everything[i] for i in first]
    images = images if images.dtype == torch.uint8 else (255*images).round().byte()
    return images.permute(0, 2, 3, 1).numpy(), labels, data.classnames


def test_classification_agrees_with_clip_benchmark(drawings, tmp_path):
    images, labels, names = drawings
    template = "a small type of {}, blurred" # unlike any sentence that the model has read
    folder = write_set(tmp_path/"set", [(img, "cls", str(label)) for img, label in zip(images, labels)], classnames="\n".join(names), zeroshot_classification_templates=template.replace("{}", "{c}"))
    theirs = their_metrics("symbols", folder, tmp_path, "zeroshot_classification")
    ours = our_metrics(folder, "zeroshot", tmp_path)[-1] # the folder brings names and template; bare names come first
    assert 0.1 < theirs["acc1"] < 0.99 # a set on which agreement means something
    assert abs(theirs["acc1"] - ours["score"]) <= 1e-3, (theirs, ours)


def test_retrieval_agrees_with_clip_benchmark(drawings, tmp_path):
    images, labels, names = drawings
    rng = random.Random(0)
    captions = ["\n".join(f"{start} {names[label]}" for start in rng.sample(["a drawing of", "the sign", "a black", "here is"], 2)) for label in labels]
    folder = write_set(tmp_path/"set", [(img, "txt", said) for img, said in zip(images, captions)], dataset_type="retrieval")
    theirs = their_metrics("symbols", folder, tmp_path, "zeroshot_retrieval")
    ours = {(row["how"], row["metric"]): row["score"] for row in our_metrics(folder/"test"/"0.tar", "retrieval", tmp_path)}
    for how, their_name in (("image to text", "text_retrieval"), ("text to image", "image_retrieval")):
        for k in (1, 5, 10): assert abs(theirs[f"{their_name}_recall@{k}"] - ours[how, f"recall@{k}"]) <= 1e-3, (how, k, theirs, ours)
    assert 0.1 < ours["text to image", "recall@1"] < 0.99
