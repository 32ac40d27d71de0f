"""Two CPU processes under FSDP. accelerate offers it for GPUs alone, so this program claims it on CPU's behalf; splitting, gathering and saving are torch's and accelerate's own."""
import sys
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

import clip_nbdev.report as report_module
import clip_nbdev.train as train_module

PLUGIN = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["ResidualAttentionBlock"],
                                        reshard_after_forward=True, state_dict_type="SHARDED_STATE_DICT")


class FSDPOnCPU(Accelerator):
    is_fsdp2 = property(lambda self: True)
    distributed_type = property(lambda self: DistributedType.FSDP)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.state.__dict__["fsdp_plugin"] = PLUGIN


if __name__ == "__main__":
    out, fsdp, resume = Path(sys.argv[1]), "fsdp" in sys.argv, "resume" in sys.argv
    report_module.SUITE = ("dice",)
    if fsdp: train_module.Accelerator = FSDPOnCPU
    cfg = train_module.TrainConfig(preset="tiny-vit", steps=6, batch_size=16, threads=1, evals=2, checkpoint_every=2, out=out, precision="no", resume=resume,
                                   loss="siglip" if "siglip" in sys.argv else "clip")
    train_module.train(replace(cfg, keep=10))
