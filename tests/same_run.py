"One training, shared out over processes: each takes its rows of the same global batches."
import os
from pathlib import Path

import torch
import torch.distributed as dist

from clip_nbdev.clip import create_model
from clip_nbdev.core import seed_all
from clip_nbdev.glyphs import GlyphPairs
from clip_nbdev.tokenizer import BPETokenizer
from clip_nbdev.train import Source, Trainer, TrainConfig

N_GLOBAL, STEPS = 32, 20


def run(rank, world, port, out, preset, options):
    "Twenty steps of the trainer in one of `world` processes; each writes losses and weights."
    torch.set_num_threads(1)
    options = dict(options)
    if world > 1: os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="localhost", MASTER_PORT=str(port))
    pairs, mine = GlyphPairs(32, seed=5), slice(rank*N_GLOBAL//world, (rank+1)*N_GLOBAL//world)
    tokenizer = BPETokenizer.train(GlyphPairs(32).batch(500)[1], 1000, ctx_len=40)
    seed_all(0)
    model = create_model(preset, vocab_size=len(tokenizer), logit_bias=-10. if options.get("loss") == "siglip" else None)
    def batches():
        while True:
            images, captions = pairs.batch(N_GLOBAL)
            yield images[mine], captions[mine]
    cfg = TrainConfig(steps=STEPS, batch_size=N_GLOBAL//world, preset=preset, precision=options.pop("precision", "no"), threads=1, warmup=5, out=Path("nowhere"), **options)
    trainer = Trainer(cfg, model, tokenizer, Source(batches(), [], None, pairs))
    losses = [trainer.train_step(k/STEPS)["loss"] for k in range(STEPS)]
    torch.save(dict(losses=losses, weights=trainer.model.state_dict()), f"{out}-{world}.pt" if rank == 0 else f"{out}-{world}-rank{rank}.pt")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
