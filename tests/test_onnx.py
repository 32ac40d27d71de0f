"Both towers leave as ONNX, with integer ids of 32 bits and any batch size, and another runtime gives the same embeddings."
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clip_nbdev.clip import create_model


class ImageTower(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x): return self.model.encode_image(x, normalize=True)


class TextTower(ImageTower):
    "The tower on a rectangle of ids, without the cutting and sorting that depends on their values."
    def forward(self, x): return F.normalize(self.model.text.read(x, (x == self.model.config.vocab_size-1).int().argmax(1)), dim=-1)


def ids(n):
    tokens = torch.randint(0, 1000, (n, 12), dtype=torch.int32)
    tokens[range(n), torch.arange(n) % 11 + 1] = 1023
    return tokens


@pytest.mark.parametrize("preset", ["tiny", "tiny-vit"])
@pytest.mark.parametrize("tower, inputs, kind", [(ImageTower, lambda n: torch.randn(n, 3, 32, 32), "tensor(float)"), (TextTower, ids, "tensor(int32)")], ids=["image", "text"])
def test_towers_run_elsewhere(tmp_path, preset, tower, inputs, kind):
    torch.manual_seed(0)
    module = tower(create_model(preset)).eval()
    torch.onnx.export(module, (inputs(3),), dynamo=True, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), verbose=False).save(tmp_path/"tower.onnx")
    session = onnxruntime.InferenceSession(tmp_path/"tower.onnx")
    x = inputs(5)
    theirs, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert session.get_inputs()[0].type == kind
    ours = module.model.encode_image(x, normalize=True) if tower is ImageTower else module.model.encode_text(x, normalize=True)
    torch.testing.assert_close(torch.from_numpy(theirs), ours.detach(), rtol=0, atol=1e-5)
