"The loss over several processes, in two real ones."
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.multiprocessing import spawn

from clip_nbdev.loss import ClipLoss, clip_loss

N, E = 12, 8


def pairs():
    gen = torch.Generator().manual_seed(0)
    return [torch.randn(N, E, dtype=torch.float64, generator=gen) for _ in range(2)]


def worker(rank, world, store, out):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    leaves = [x.chunk(world)[rank].clone().requires_grad_() for x in pairs()]
    scale = torch.tensor(14.3, dtype=torch.float64, requires_grad=True)
    loss = ClipLoss()(*(F.normalize(x, dim=-1) for x in leaves), scale)
    loss.backward()
    torch.save([loss.detach(), *[x.grad for x in leaves], scale.grad], f"{out}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_gathered_loss_and_gradients_are_those_of_one_process(tmp_path):
    world = 2
    spawn(worker, (world, tmp_path/"store", tmp_path/"out"), nprocs=world)
    leaves = [x.clone().requires_grad_() for x in pairs()]
    scale = torch.tensor(14.3, dtype=torch.float64, requires_grad=True)
    loss = clip_loss(*(F.normalize(x, dim=-1) for x in leaves), scale)
    loss.backward()
    for rank in range(world):
        their_loss, img, txt, s = torch.load(tmp_path/f"out-{rank}.pt")
        torch.testing.assert_close(their_loss, loss.detach())
        torch.testing.assert_close(s, scale.grad)
        # data-parallel training takes the mean over the processes: what one sends is `world` times its share
        torch.testing.assert_close(img/world, leaves[0].grad.chunk(world)[rank])
        torch.testing.assert_close(txt/world, leaves[1].grad.chunk(world)[rank])
