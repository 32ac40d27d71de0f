"Losses over several processes, in real ones: values and gradients are those of one process with all pairs."
import socket

import open_clip
import pytest
import same_run
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from torch.multiprocessing import spawn

from clip_nbdev.clip import create_model
from clip_nbdev.loss import ClipLoss, SigLipLoss, clip_loss, siglip_loss
from clip_nbdev.text import lm_loss

N, E = 24, 8


def pairs():
    gen = torch.Generator().manual_seed(0)
    return [torch.randn(N, E, dtype=torch.float64, generator=gen) for _ in range(2)]


def scalars(): return [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (14.3, -3.)]


def result(loss_of, leaves):
    "The loss and the gradients of images, texts, scale and bias."
    leaves, numbers = [x.clone().requires_grad_() for x in leaves], scalars()
    loss = loss_of(*(F.normalize(x, dim=-1) for x in leaves), *numbers)
    loss.backward()
    return [loss.detach(), *(x.grad if x.grad is not None else torch.zeros_like(x) for x in (*leaves, *numbers))]


def without_bias(loss): return lambda img, txt, scale, bias: loss(img, txt, scale)


OURS = {f"clip local={local} grad={grad} chunk={chunk}": (local, grad, chunk)
        for local, grad in ((True, True), (False, True), (False, False)) for chunk in (None, 3, 64)}
SIGMOID = {f"siglip chunk={chunk}": chunk for chunk in (None, 3, 64)}


def losses():
    found = {name: without_bias(ClipLoss(*how)) for name, how in OURS.items()} | {name: SigLipLoss(chunk) for name, chunk in SIGMOID.items()}
    rank, world = dist.get_rank(), dist.get_world_size()
    return found | {"open_clip siglip": open_clip.loss.SigLipLoss(rank=rank, world_size=world, dist_impl="bidir")}


def worker(rank, world, store, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    mine = [x.chunk(world)[rank] for x in pairs()]
    found = {name: result(loss, mine) for name, loss in losses().items()}
    torch.save(found, f"{out}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def found(request, tmp_path_factory):
    "What each process found, as data-parallel training combines it: losses and gradients of scalars as means, those of rows joined and divided."
    world, folder = request.param, tmp_path_factory.mktemp("processes")
    spawn(worker, (world, folder/"store", folder/"out"), nprocs=world)
    every = [torch.load(folder/f"out-{rank}.pt") for rank in range(world)]
    def combine(parts):
        loss, img, txt, scale, bias = zip(*parts)
        return [torch.stack(loss).mean(), torch.cat(img)/world, torch.cat(txt)/world, torch.stack(scale).mean(), torch.stack(bias).mean()]
    return world, {name: combine([r[name] for r in every]) for name in every[0]}


@pytest.mark.parametrize("name", OURS)
def test_sharded_losses_and_gradients_are_those_of_one_process(found, name):
    world, by_processes = found
    loss, img, txt, scale, _ = result(without_bias(clip_loss), pairs())
    if not OURS[name][1]: img, txt = img/world, txt/world # as open_clip's: the direction is right, the length is not
    torch.testing.assert_close(by_processes[name][:4], [loss, img, txt, scale], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", [*SIGMOID, "open_clip siglip"])
def test_sigmoid_losses_and_gradients_are_those_of_one_process(found, name):
    torch.testing.assert_close(found[1][name], result(siglip_loss, pairs()), rtol=1e-12, atol=1e-13)


def gather_worker(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    x = torch.ones(2, 3, requires_grad=True)
    assert not Accelerator(cpu=True).gather(x).requires_grad
    dist.destroy_process_group()


def test_accelerates_own_gather_drops_the_graph(tmp_path, monkeypatch):
    for name, value in dict(WORLD_SIZE="2", MASTER_ADDR="localhost").items(): monkeypatch.setenv(name, value)
    spawn(gather_worker, (tmp_path/"store",), nprocs=2)


def texts_and_images():
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
    images, tokens = (x.chunk(world)[rank] for x in texts_and_images())
    loss_of_both_kinds(wrapped, model, images, tokens).backward()
    torch.save({k: p.grad for k, p in model.named_parameters()}, f"{out}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_data_parallel_towers_with_a_language_model_have_the_gradients_of_one_process(tmp_path):
    spawn(towers_worker, (2, tmp_path/"store", tmp_path/"out"), nprocs=2)
    model = towers()
    loss_of_both_kinds(model, model, *texts_and_images()).backward()
    for rank in range(2):
        for name, grad in torch.load(tmp_path/f"out-{rank}.pt").items():
            torch.testing.assert_close(grad, model.get_parameter(name).grad, rtol=1e-9, atol=1e-12, msg=name)


@pytest.fixture
def port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize("world, options", [(2, {}), (4, {}), (2, dict(local_loss=False)), (2, dict(micro_batch=4)), (2, dict(loss="siglip", chunk_size=5))],
                         ids=["2", "4", "2 whole matrix", "2 cached", "2 siglip"])
def test_runs_in_several_processes_are_the_run_of_one(tmp_path, port, world, options):
    "The same global batches, twenty steps, float32: losses and weights to 1e-4."
    spawn(same_run.run, (world, port, tmp_path/"run", "tiny-vit", options), nprocs=world)
    same_run.run(0, 1, port, tmp_path/"run", "tiny-vit", {k: v for k, v in options.items() if k == "loss"})
    one, several = (torch.load(tmp_path/f"run-{n}.pt") for n in (1, world))
    torch.testing.assert_close(several["losses"], one["losses"], rtol=0, atol=1e-4)
    assert one["losses"][0] - one["losses"][-1] > 0.3 # it moved
    for name, weight in one["weights"].items(): torch.testing.assert_close(several["weights"][name], weight, rtol=0, atol=1e-4, msg=name)


def test_weights_that_are_rounded_by_lot_are_the_same_in_every_process(tmp_path, port):
    options = dict(adam_stats="bfloat16", text_weights="bfloat16", precision="bf16")
    spawn(same_run.run, (2, port, tmp_path/"run", "tiny-vit", options), nprocs=2)
    first, second = (torch.load(tmp_path/f"run-2{rank}.pt")["weights"] for rank in ("", "-rank1"))
    assert first["text.token_embedding.weight"].dtype == torch.bfloat16
    for name, weight in first.items(): assert torch.equal(weight, second[name]), name
