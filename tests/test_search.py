"Search: the command, a build that is killed, mistakes."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import image

from clip_nbdev import search as module
from clip_nbdev.core import UserError
from clip_nbdev.search import PhotoIndex, build, read_rows


@pytest.fixture
def photos(tmp_path):
    (tmp_path/"photos"/"more").mkdir(parents=True)
    for k in range(30): image(k).save(tmp_path/"photos"/("more" if k % 2 else ".")/f"{k:02d}.png")
    return tmp_path/"photos"


def command(*args, cwd): return subprocess.run([sys.executable, "-m", "clip_nbdev.search", *map(str, args)], cwd=cwd, capture_output=True, text=True)


def test_build_and_query(tmp_path, photos):
    done = command("build", photos, "--index", "index", "--threads", "1", cwd=tmp_path)
    assert done.returncode == 0 and "30 pictures, 30 of them embedded now, 0 gone" in done.stdout, done.stderr
    done = command("query", "a red heart", "--index", "index", "--n", "5", cwd=tmp_path)
    assert done.returncode == 0 and len([line for line in done.stdout.splitlines() if ".png" in line and "photos" in line]) == 5, done.stderr
    assert (tmp_path/"index"/"sheet.png").stat().st_size > 1000 and (tmp_path/"index"/"sheet.html").read_text().count("<figure>") == 5
    done = command("query", "--like", photos/"04.png", "--index", "index", "--n", "1", "--sheet", "one.png", cwd=tmp_path)
    assert "04.png" in done.stdout and "1.000" in done.stdout
    again = command("build", photos, "--index", "index", cwd=tmp_path)
    assert "30 pictures, 0 of them embedded now" in again.stdout


def test_a_killed_build_goes_on(tmp_path, photos, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 8)
    program = ("import clip_nbdev.search as s, time; s.PIECE = 8; plain = s.write_piece\n"
               f"def slow(*a): plain(*a); print('written', flush=True); time.sleep(1)\ns.write_piece = slow; s.build({str(photos)!r}, index={str(tmp_path/'index')!r})")
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    for _ in range(2): child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert len(read_rows(tmp_path/"index")[0]) == 16
    seen = []
    plain = module.embed_files
    monkeypatch.setattr(module, "embed_files", lambda model, preprocess, paths: seen.extend(paths) or plain(model, preprocess, paths))
    assert build(photos, index=tmp_path/"index")["pictures"] == 30 and len(seen) == 14
    assert len(PhotoIndex(tmp_path/"index")) == 30 and not list((tmp_path/"index").glob("piece-*"))


def test_a_picture_that_changed_has_its_new_embedding(tmp_path, photos):
    build(photos, index=tmp_path/"index")
    image(77).save(photos/"00.png")
    os.utime(photos/"00.png", ns=(1, time.time_ns()))
    assert build(photos, index=tmp_path/"index")["new"] == 1
    found = PhotoIndex(tmp_path/"index").search(photos/"00.png", 1)
    assert Path(found.path[0]).name == "00.png" and found.cosine[0] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("args, said", [
    (["build", "empty"], "no picture in empty"),
    (["build", "nowhere"], "no folder nowhere"),
    (["build", "photos", "--model", "nothing"], "no model in nothing"),
    (["query", "a dog", "--index", "nowhere"], "no index in nowhere"),
    (["query", "--index", "index"], "give a text or --like"),
    (["query", "  ", "--index", "index"], "the query is empty"),
    (["query", "a dog", "--like", "x.png", "--index", "index"], "give a text or --like"),
    (["query", "--like", "x.png", "--index", "index"], "no such file"),
    (["query", "a dog", "--index", "index", "--n", "0"], "--n must be at least 1"),
    (["query", "a dog", "--index", "index", "--sheet", "none/sheet.png"], "can't be written"),
    (["build", "photos", "--index", "/proc/index"], "can't be written to"),
    (["build", "photos", "--index", "other"], "holds files of something else"),
    (["build", "copy", "--index", "index"], "give another --index"),
])
def test_mistakes_are_said_in_one_line(tmp_path, photos, monkeypatch, capsys, args, said):
    monkeypatch.chdir(tmp_path)
    build("photos", index="index")
    for name in ("empty", "other", "copy"): Path(name).mkdir()
    Path("other/mine.txt").write_text("mine")
    image(3).save("copy/3.png")
    monkeypatch.setattr(sys, "argv", ["search", *args])
    with pytest.raises(SystemExit) as stop: module.main()
    err = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and err[-1].startswith("error: ") and said in err[-1] and len([e for e in err if "error" in e]) == 1


def test_an_index_of_another_model_is_refused(tmp_path, photos):
    build(photos, index=tmp_path/"index")
    about = json.loads((tmp_path/"index"/"index.json").read_text())
    (tmp_path/"index"/"index.json").write_text(json.dumps(about | dict(fingerprint="0"*64)))
    with pytest.raises(UserError, match="was made with another model"): build(photos, index=tmp_path/"index")
    with pytest.raises(UserError, match="has changed since"): PhotoIndex(tmp_path/"index")
