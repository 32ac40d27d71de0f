"The loss over several processes, in two real ones."
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.multiprocessing import spawn

from clip_nbdev.clip import create_model
from clip_nbdev.loss import ClipLoss, clip_loss
from clip_nbdev.text import lm_loss

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


def texts_and_pictures():
    gen = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 1000, (8, 10), generator=gen)
    tokens[:, -1] = 1023
    return torch.randn(8, 3, 32, 32, generator=gen).double(), tokens


def loss_of_both_kinds(wrapped, model, images, tokens): return ClipLoss()(*wrapped(images, tokens)) + 0.3*lm_loss(model.text, tokens)


def towers():
    torch.manual_seed(0)
    return create_model("tiny-vit").double().train()


def towers_worker(rank, world, store, out):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    model = towers()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    images, tokens = (x.chunk(world)[rank] for x in texts_and_pictures())
    loss_of_both_kinds(wrapped, model, images, tokens).backward()
    torch.save({k: p.grad for k, p in model.named_parameters()}, f"{out}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_data_parallel_towers_with_a_language_model_have_the_gradients_of_one_process(tmp_path):
    spawn(towers_worker, (2, tmp_path/"store", tmp_path/"out"), nprocs=2)
    model = towers()
    loss_of_both_kinds(model, model, *texts_and_pictures()).backward()
    for rank in range(2):
        for name, grad in torch.load(tmp_path/f"out-{rank}.pt").items():
            torch.testing.assert_close(grad, model.get_parameter(name).grad, rtol=1e-9, atol=1e-12, msg=name)
