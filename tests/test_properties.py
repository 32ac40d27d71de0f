"""What went in comes out, or one line says why not: never a third thing. PROPERTY_EXAMPLES=5000 looks further than the usual run."""
import csv
import io
import json
import os
import subprocess
import sys
import tarfile

import fuzz
import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from clip_nbdev.core import UserError
from clip_nbdev.data import image_transform, open_pairs
from clip_nbdev.files import EMPTY, read_table
from clip_nbdev.tokenizer import BPETokenizer

N = int(os.environ.get("PROPERTY_EXAMPLES", 40))
often = settings(max_examples=N, derandomize=N == 40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

CAPTION = st.one_of(st.text(max_size=30), st.text("ab ,;\t\"'|\n[]{}é♥", min_size=1, max_size=20), st.sampled_from(("a red wall, wet", 'he said "no"', "nan", "NULL", "", " ", "1", "0.0", "a\tb", "a;b;c", "it's", "['one', 'two']")))
CAPTION = CAPTION.filter(lambda t: "\x00" not in t and t == t.encode("utf-8", "ignore").decode())


def right(caption):
    "What a cell means by itself: white space is folded, and what stands for nothing is no caption."
    text = " ".join(caption.split())
    return [] if text in EMPTY else [text]


def by_csv(rows, sep, quoting, end):
    out = io.StringIO()
    csv.writer(out, delimiter=sep, quoting=quoting, lineterminator=end).writerows([("filepath", "caption"), *rows])
    return out.getvalue()


def by_pandas(rows, sep, quoting, end): return pd.DataFrame(rows, columns=["filepath", "caption"]).to_csv(index=False, sep=sep, quoting=quoting, lineterminator=end)


@often
@given(captions=st.lists(CAPTION, min_size=1, max_size=6), sep=st.sampled_from((",", ";", "\t")), quoting=st.sampled_from((csv.QUOTE_MINIMAL, csv.QUOTE_ALL)), end=st.sampled_from(("\n", "\r\n")),
       write=st.sampled_from((by_csv, by_pandas)), encoding=st.sampled_from(("utf-8", "utf-8-sig", "utf-16")), ending=st.sampled_from((".csv", ".tsv", ".CSV")))
def test_tables(tmp_path, captions, sep, quoting, end, write, encoding, ending):
    assume(not any(c.strip().startswith(("[", "(")) for c in captions))
    path = tmp_path/f"table{ending}"
    path.write_bytes(write([(f"{i}.png", c) for i,c in enumerate(captions)], sep, quoting, end).encode(encoding))
    try: found = read_table(path, "filepath", "caption")
    except UserError as e:
        assert "\n" not in str(e)
        return
    assert found == {f"{i}.png":right(c) for i,c in enumerate(captions)}


@often
@given(captions=st.lists(CAPTION, min_size=1, max_size=6))
def test_json_lines(tmp_path, captions):
    assume(not any(c.strip().startswith(("[", "(")) for c in captions))
    path = tmp_path/"table.jsonl"
    pd.DataFrame(dict(filepath=[f"{i}.png" for i in range(len(captions))], caption=captions)).to_json(path, orient="records", lines=True)
    assert read_table(path, "filepath", "caption") == {f"{i}.png":right(c) for i,c in enumerate(captions)}


def png(i):
    Image.new("RGB", (3, 3), (i, 255-i, 7)).save(out := io.BytesIO(), "PNG")
    return out.getvalue()


PART = st.from_regex(r"[a-zA-Z0-9é_][a-zA-Z0-9é_ .\-]{0,7}", fullmatch=True).filter(lambda p: p.strip(" .") == p)
STEM = st.lists(PART, min_size=1, max_size=3).map("/".join)
STEMS = st.lists(STEM, min_size=1, max_size=6, unique_by=str.lower)
LINE = st.text(min_size=1, max_size=20).map(lambda t: " ".join(t.split())).filter(lambda t: t and t == t.encode("utf-8", "ignore").decode() and "\x00" not in t)


def comes_back(data, pairs):
    "Every image with its own caption, or a refusal."
    try:
        source = open_pairs(str(data))
        found = sorted((image().convert("RGB").getpixel((0, 0))[0], captions) for _,image,captions in source.samples())
    except UserError as e:
        assert "\n" not in str(e)
        return
    assert found == sorted((i, [c]) for i,(_,c) in enumerate(pairs)) and len(source) == len(found)


@often
@given(stems=STEMS, data=st.data())
def test_names_in_tars(tmp_path, stems, data):
    pairs = [(stem, data.draw(LINE)) for stem in stems]
    members = [m for i,(stem,c) in enumerate(pairs) for m in ((f"{stem}.{data.draw(st.sampled_from(('png', 'PNG', 'jpg')))}", png(i)), (f"{stem}.txt", c.encode()))]
    with tarfile.open(tmp_path/"shard.tar", "w") as tar:
        for name,content in data.draw(st.permutations(members)) if data.draw(st.booleans()) else members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    comes_back(tmp_path/"shard.tar", pairs)


@often
@given(names=st.lists(PART, min_size=1, max_size=6, unique_by=str.lower), data=st.data())
def test_names_in_folders(tmp_path_factory, names, data):
    folder,pairs = tmp_path_factory.mktemp("pairs"),[(name, data.draw(LINE)) for name in names]
    for i,(name,c) in enumerate(pairs):
        (folder/f"{name}.png").write_bytes(png(i))
        (folder/f"{name}.txt").write_text(c, encoding="utf-8")
    comes_back(folder, pairs)


AVERAGED = ("RGB", "L", "LA", "RGBA", "CMYK", "YCbCr", "LAB", "RGBX") # the released code resizes these as they are


@pytest.mark.parametrize("mode", [*AVERAGED, "1", "P", "PA", "HSV", "RGBa", "I;16", "I", "F"])
@often
@given(width=st.integers(1, 40), height=st.integers(1, 40), n=st.sampled_from((8, 17)), seed=st.integers(0, 9), through=st.sampled_from((None, "PNG", "TIFF", "WEBP")))
def test_image_modes(mode, width, height, n, seed, through):
    grey = np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)
    colours = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8), "RGBA")
    deep = {"I;16":grey.astype(np.uint16)*256 + 77, "I":grey.astype(np.int32)*256 + 77, "F":grey.astype(np.float32)/255}
    if mode in deep: img = Image.fromarray(deep[mode])
    else: img = (colours if mode in ("RGBA", "LA", "RGBa", "PA") else colours.convert("RGB")).convert(mode)
    if through:
        try: img.save(out := io.BytesIO(), through, **dict(lossless=True) if through == "WEBP" else {})
        except (OSError, KeyError, ValueError): return # a format that has no such images
        img = Image.open(out)
    if img.mode in AVERAGED: like = img
    elif img.mode[0] in "IF": like = Image.fromarray(grey)
    else: like = img.convert("RGBA" if img.has_transparency_data else "RGB")
    if img.mode == "I" and grey.max() == 0: return
    torch.testing.assert_close(image_transform(n)(img), open_clip.image_transform(n, is_train=False)(like), rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def small_tokenizer(): return BPETokenizer.train(["a photo of a red heart, größe don't 123"]*4, 600)


@often
@given(text=st.text(max_size=60))
def test_texts(small_tokenizer, text):
    try: row = small_tokenizer(text, truncate=True)[0].tolist()
    except UserError as e:
        assert "\n" not in str(e)
        return
    ids = row[1:row.index(small_tokenizer.eos_id)]
    assert ids == small_tokenizer.encode(text)[:75]


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_odd_inputs_that_are_known(tmp_path, name):
    "What the fuzzer begins with; `python tests/fuzz.py all --minutes 30` goes on from there."
    target = fuzz.TARGETS[name](tmp_path)
    for data in target.seeds(): target(data)


@pytest.mark.slow
@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_half_an_hour_of_odd_inputs(tmp_path, name):
    found = subprocess.run([sys.executable, fuzz.__file__, name, "--minutes", "30", "--found", tmp_path], stdout=subprocess.PIPE, text=True)
    assert found.returncode == 0 and json.loads(found.stdout)["inputs"] > 10_000
