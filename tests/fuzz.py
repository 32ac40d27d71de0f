"""Feed damaged and odd inputs to what reads files and texts of others: nothing but UserError may come out.

    python tests/fuzz.py tables --minutes 30      also: shards, checkpoints, tokenizer, or all
    python tests/fuzz.py tables --input FILE      one input again

Each input is a valid one with bytes changed, cut, doubled or mixed with another's. With `pip install atheris` the changes are
steered by which lines they reach; without it they are drawn at random. An input that crashes, hangs for 20 seconds or raises
anything else is kept in the folder --found, and the run ends with status 1."""
import argparse
import contextlib
import io
import json
import os
import random
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save as save_safetensors

if "--steered" in sys.argv:
    import atheris
    watched = atheris.instrument_imports(include=[f"clip_nbdev.{name}" for name in ("files", "data", "labelled", "sources", "formats", "foreign", "tokenizer")])
else: watched = contextlib.nullcontext()

with watched:
    from clip_nbdev.clip import CLIP, PRESETS, CLIPConfig, to_released
    from clip_nbdev.core import UserError
    from clip_nbdev.data import open_pairs
    from clip_nbdev.foreign import open_foreign
    from clip_nbdev.formats import to_hf
    from clip_nbdev.labelled import LabelledOptions, open_shards, open_table
    from clip_nbdev.stream import decode
    from clip_nbdev.tokenizer import BPETokenizer

HANGS = 20 # seconds


def as_bytes(write):
    write(buffer := io.BytesIO())
    return buffer.getvalue()


def small_image(): return as_bytes(lambda b: Image.new("RGB", (4, 3), "red").save(b, "PNG"))


def tar_of(members):
    def write(buffer):
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return as_bytes(write)


class Tables:
    "The first byte says under which ending the rest is read."
    ENDINGS = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".CSV")

    def __init__(self, folder): self.folder = folder

    def seeds(self):
        import pandas as pd
        frame = pd.DataFrame(dict(filepath=["a.png", "b.png", "c d.png"], caption=["a red wall, wet", 'he said "oh"', "ein Größe\nzwei"], label=["red", "2", ""]))
        texts = [frame.to_csv(index=False), frame.to_csv(index=False, sep=";"), frame.to_csv(index=False, sep="\t"), "filepath\tcaption\na.png\ta \"quote\n", frame.to_json(orient="records", lines=True),
                 frame.to_json(orient="records"), 'filepath,caption\na.png,"[\'one\', \'two\']"\n', "a.png,b\n", "\ufefffilepath,caption\r\na.png,NULL\r\n"]
        yield from (bytes([k]) + t.encode() for t in texts for k in range(len(self.ENDINGS)))
        yield from (bytes([0]) + t.encode("utf-16") for t in texts[:3])
        with contextlib.suppress(ImportError): yield bytes([4]) + as_bytes(frame.to_parquet)

    def __call__(self, data):
        path = self.folder/f"table{self.ENDINGS[data[0] % len(self.ENDINGS)]}" if data else self.folder/"table.csv"
        path.write_bytes(data[1:])
        with contextlib.suppress(UserError): assert all(isinstance(c, str) and c.strip() for _, _, captions in open_pairs(str(path)).samples() for c in captions)
        with contextlib.suppress(UserError): open_table(LabelledOptions(), path)


class Shards:
    def __init__(self, folder): self.path = folder/"shard.tar"

    def seeds(self):
        image = small_image()
        yield tar_of([("0.png", image), ("0.txt", b"a red wall"), ("1.jpg", image), ("1.json", b'{"caption": "two", "label": "red"}'), ("1.txt", "größe\u2028drei".encode())])
        yield tar_of([("0.input.png", image), ("0.output.txt", b"x"), ("./a/b.png", image), ("./a/b.cls", b"1"), ("._0.png", b"")])
        yield tar_of([("0.cls", b"red"), ("0.png", image), ("1.png", b"no image"), ("1.cls", b"blue")])
        yield tar_of([])

    def __call__(self, data):
        self.path.write_bytes(data)
        tally, why = torch.zeros(3, dtype=torch.long), []
        with contextlib.suppress(UserError):
            pairs = open_pairs(str(self.path))
            len(pairs)
            for name, open_image, captions in pairs.samples():
                assert all(isinstance(c, str) for c in captions)
                decode(open_image, tally, why, name)
        with contextlib.suppress(UserError): open_shards(LabelledOptions(), str(self.path))


class Checkpoints:
    def __init__(self, folder):
        self.path, self.tokenizer = folder/"weights", BPETokenizer.train(["a red wall"]*3, 516)
        config = CLIPConfig(4, 4, 1, 4, 4, 1, 1, patch_size=2, vision_head_width=4, ctx_len=8, vocab_size=len(self.tokenizer))
        PRESETS["nano"] = config # small files are damaged more
        torch.manual_seed(0)
        self.state = dict(to_released(CLIP(config).half().state_dict()))

    def seeds(self):
        for state in (self.state, {f"model.{k}": v for k, v in self.state.items()}, dict(state_dict=self.state, epoch=3), dict(model=self.state, loss=torch.ones(())),
                      self.state | {"visual.lora_A.weight": torch.ones(1)}, to_hf(self.state)):
            yield as_bytes(lambda b: torch.save(state, b))
        yield as_bytes(lambda b: torch.save(self.state, b, _use_new_zipfile_serialization=False))
        yield save_safetensors({k: v.contiguous() for k, v in self.state.items()})
        yield b"PK\x03\x04"
        yield b"<html>"

    def __call__(self, data):
        self.path.write_bytes(data)
        for name in (None, "nano"):
            with contextlib.suppress(UserError): open_foreign(self.path, name, None if name else True, self.tokenizer)


class Tokenizer:
    "Texts in UTF-8, broken or not; a first byte below 32 makes the rest a tokenizer.json."
    def __init__(self, folder):
        self.folder, self.tokenizer = folder, BPETokenizer.train(["a photo of a red heart, größe don't 123"]*4, 600, ctx_len=20)
        self.tokenizer.save(folder)
        self.saved = (folder/"tokenizer.json").read_bytes()

    def seeds(self):
        for text in ("a photo of a cat.", "it's 3,000 naïve &amp;amp; café", "ΟΔΥΣΣΕΥΣ İ ſ \u0345 \u212a", "猫 😀👍🏽 \u0378 \U0001e4d0\U00016ea0", "Ð¿Ñ\x80Ð¸Ð²ÐµÑ‚ â€œx", "\x00 \x1b[31m \u2028\u0085", "<|endoftext|>", "ab"*60):
            yield b" " + text.encode()
        yield b"!a photo"
        small = BPETokenizer.train(["red"]*3, 516)
        small.save(self.folder)
        yield bytes([1]) + (self.folder/"tokenizer.json").read_bytes()
        self.tokenizer.save(self.folder)

    def __call__(self, data):
        if data and data[0] < 32:
            (self.folder/"tokenizer.json").write_bytes(data[1:])
            with contextlib.suppress(UserError): BPETokenizer.load(self.folder)("a red heart", truncate=True)
            return
        text, tok = data[1:].decode("utf-8", "replace"), self.tokenizer
        if data[:1] == b"!": text = text[:3] + "\ud83d" + text[3:] # half of a character
        with contextlib.suppress(UserError):
            row = tok(text, truncate=True)[0].tolist()
            slow = tok.encode(text)
            assert row[:row.index(tok.eos_id)] == [tok.sos_id, *slow[:tok.ctx_len-2]], "the two tokenizers differ"
            tok.decode(row)


TARGETS = dict(tables=Tables, shards=Shards, checkpoints=Checkpoints, tokenizer=Tokenizer)


def changed(data, other, rng):
    "A damaged copy."
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        kind, i = rng.randrange(7), rng.randrange(len(data)+1)
        j = min(len(data), i + rng.choice((1, 2, 4, 16, 64, 512)))
        if kind == 0 and i < len(data): data[i] = rng.randrange(256)
        elif kind == 1 and i < len(data): data[i] ^= 1 << rng.randrange(8)
        elif kind == 2: del data[i:j]
        elif kind == 3: data[i:i] = data[i:j]
        elif kind == 4: data[i:i] = other[(k := rng.randrange(len(other)+1)):k+rng.choice((1, 8, 64, 512))]
        elif kind == 5: data[i:j] = rng.choice((b"\x00", b"\xff", b'"', b"'", b"\n", b"\r", b"\t", b",", b";", b"[", b"{", b"\\", b"NaN", b"-1", b"\xe2\x80\xa8"))
        elif kind == 6: del data[i:]
    return bytes(data)


def hang(*_): raise TimeoutError(f"no answer in {HANGS} seconds")


def guarded(target, data, found):
    "Run one input; what should not come out is kept, and raised."
    signal.alarm(HANGS)
    try: target(data)
    except BaseException as e:
        signal.alarm(0)
        if isinstance(e, KeyboardInterrupt): raise
        found.mkdir(parents=True, exist_ok=True)
        path = found/f"{type(target).__name__.lower()}-{abs(hash(data)):x}"
        path.write_bytes(data)
        print(f"{type(e).__name__}: {e}\ninput kept in {path}", file=sys.stderr)
        raise
    finally: signal.alarm(0)


def by_chance(target, seconds, found, seed):
    "How many inputs were tried, none of which did what it should not."
    rng, pool, n, end = random.Random(seed), list(target.seeds()), 0, time.time() + seconds
    for data in pool: guarded(target, data, found)
    while time.time() < end:
        data = changed(rng.choice(pool), rng.choice(pool), rng)
        guarded(target, data, found)
        n += 1
        if rng.random() < 0.02 and len(pool) < 3000 and len(data) < 100_000: pool.append(data)
    return n


def steered(target, seconds, found, seed):
    corpus = found/"corpus"/type(target).__name__.lower()
    corpus.mkdir(parents=True, exist_ok=True)
    for i, data in enumerate(target.seeds()): (corpus/f"seed-{i}").write_bytes(data)
    atheris.Setup(["fuzz", str(corpus), f"-max_total_time={int(seconds)}", f"-timeout={HANGS+10}", "-rss_limit_mb=8000", f"-seed={seed+1}",
                   "-max_len=200000", "-print_final_stats=1", f"-artifact_prefix={found}/"], lambda data: guarded(target, data, found))
    atheris.Fuzz()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=[*TARGETS, "all"])
    parser.add_argument("--minutes", type=float, default=1, help="for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--found", type=Path, default=Path("fuzz"), help="folder for inputs that broke something")
    parser.add_argument("--input", type=Path, help="run this input alone")
    parser.add_argument("--steered", action="store_true", help="by atheris, one target")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, hang)
    status = 0
    for name in TARGETS if args.target == "all" else [args.target]:
        with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder, open(os.devnull, "w") as nothing:
            target = TARGETS[name](Path(folder))
            if args.input:
                guarded(target, args.input.read_bytes(), args.found)
                continue
            try:
                with contextlib.redirect_stdout(nothing):
                    if args.steered: steered(target, 60*args.minutes, args.found, args.seed)
                    n = by_chance(target, 60*args.minutes, args.found, args.seed)
                print(json.dumps(dict(target=name, minutes=args.minutes, inputs=n)), flush=True)
            except Exception:
                traceback.print_exc()
                status = 1
    return status


if __name__ == "__main__": sys.exit(main())
