"Other towers, and starting from trained ones: whole commands, what moves and what does not, what open_clip opens."
import json
import os
import signal
from dataclasses import replace
from itertools import product
from pathlib import Path

import open_clip
import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from test_train import at_step
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from clip_nbdev import load
from clip_nbdev.checkpoint import save_model
from clip_nbdev.clip import CLIP, create_model, to_released
from clip_nbdev.core import UserError
from clip_nbdev.export import export_hf, export_onnx
from clip_nbdev.loss import clip_loss
from clip_nbdev.recipe import TrainConfig
from clip_nbdev.resume import Stopped
from clip_nbdev.tokenizer import BPETokenizer, base_pieces
from clip_nbdev.towers import HFTokenizer, padded_with_eos
from clip_nbdev.train import Trainer, train
from clip_nbdev.zeroshot import evaluate_suite

TEXTS = ["a red dog on a beach", "two cats !", ""]
COLOURS = ["red", "lime", "blue", "yellow", "cyan", "magenta", "white", "black"]
BERT = dict(model_type="bert", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, max_position_embeddings=64, vocab_size=1000)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    "56 images of two colours side by side, each with its caption."
    folder = tmp_path_factory.mktemp("pairs")
    for left in COLOURS:
        for right in set(COLOURS) - {left}:
            img = Image.new("RGB", (72, 64), left)
            img.paste(right, (36, 0, 72, 64))
            img.save(folder/f"{left}-{right}.png")
            (folder/f"{left}-{right}.txt").write_text(f"{left} left of {right}\nsomething {right}")
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    "A text model as transformers saves it: configuration, weights, tokenizer."
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "!", *COLOURS, *"left of something a dog on beach two cat ##s".split()]
    fast = Tokenizer(models.WordPiece({w:i for i, w in enumerate(words)}, unk_token="[UNK]"))
    fast.normalizer, fast.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    fast.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", model_max_length=64).save_pretrained(folder)
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**{k: v for k, v in BERT.items() if k != "model_type"} | dict(vocab_size=len(words)))).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    "An image network's weights in a file."
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("trunk")/"net.pth"
    net = timm.create_model("test_convnext")
    torch.save(net.state_dict(), path)
    return path


def options(out, pairs, **more):
    return TrainConfig(**dict(out=Path(out), preset="tiny", data=str(pairs), precision="no", steps=4, batch_size=8, evals=0, threads=1, img_size=32, crop_scale=1.) | more)


def opened_by_open_clip(run):
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{run}")
    return model.eval(), preprocess, open_clip.get_tokenizer(f"local-dir:{run}")


def check_equal(run):
    "The run's embeddings, and those that open_clip makes from pixels and words to the end by itself."
    model, preprocess, tokenizer = load(run)
    theirs, their_preprocess, their_tokenizer = opened_by_open_clip(run)
    img = Image.effect_noise((90, 70), 80).convert("RGB")
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(preprocess(img)[None]), theirs.encode_image(their_preprocess(img)[None]), rtol=1e-4, atol=1e-5)
        texts = TEXTS[:2]
        torch.testing.assert_close(model.encode_text(tokenizer(texts)), theirs.encode_text(their_tokenizer(texts)), rtol=1e-4, atol=1e-5)
        emb = model.encode_text(tokenizer(texts))
        assert emb.std(0).max() > 1e-3*emb.abs().max() # the texts differ
    return model


TOWERS = {
    "ConvNeXt with BERT (OpenCLIP's image tower)": dict(vision_cfg=dict(timm_model_name="test_convnext"), text_cfg=dict(hf_config=BERT)),
    "EfficientNet with BERT (ALIGN)": dict(vision_cfg=dict(timm_model_name="test_efficientnet", timm_pool="avg", timm_proj="mlp"), text_cfg=dict(hf_config=BERT, hf_pooler_type="cls_pooler", hf_proj_type="mlp")),
    "NFNet with BERT (Flamingo)": dict(vision_cfg=dict(timm_model_name="test_nfnet"), text_cfg=dict(hf_config=BERT, hf_pooler_type="cls_last_hidden_state_pooler")),
    "ViT with attention pooling (SigLIP)": dict(vision_cfg=dict(timm_model_name="test_vit", timm_pool="map", timm_proj="none"), text_tower="siglip", quick_gelu=False, img_size=160, embed_dim=64),
}


@pytest.mark.parametrize("vision_cfg", [dict(timm_model_name="test_vit"), dict(timm_model_name="test_vit", timm_pool="avg"), dict(timm_model_name="test_resnet", timm_proj_bias=True, timm_drop=0.3)])
@pytest.mark.parametrize("text_cfg", [dict(), dict(hf_pooler_type="cls_pooler", hf_proj_type="mlp"), None])
def test_words_that_are_left_out_mean_the_same_in_open_clip(tmp_path, vision_cfg, text_cfg):
    "Our defaults are not open_clip's, so a run says every word."
    words = padded_with_eos(BPETokenizer.train([f"{a} left of {b}" for a in COLOURS for b in COLOURS], 600, 20))
    texts = {} if text_cfg is None else dict(text_cfg=text_cfg | dict(hf_config=BERT))
    model = create_model("tiny", vocab_size=len(words), ctx_len=20, img_size=64, vision_cfg=vision_cfg, quick_gelu=False, **texts)
    if text_cfg is None: words.pad_id = 0
    elif not text_cfg: model = CLIP(replace(model.config, text_cfg=dict(hf_config=model.config.text_cfg["hf_config"]))).eval() # as a user may write it
    save_model(model, words, tmp_path/"run")
    check_equal(tmp_path/"run")


def test_other_towers_are_written_as_onnx(tmp_path):
    words = padded_with_eos(BPETokenizer.train([f"{a} left of {b}" for a in COLOURS for b in COLOURS], 600, 20))
    for name, more in (("bert", TOWERS["ConvNeXt with BERT (OpenCLIP's image tower)"]), ("siglip", dict(text_tower="siglip", quick_gelu=False))):
        save_model(create_model("tiny", vocab_size=len(words), ctx_len=20, img_size=64, resize="squash", **more), words, tmp_path/name)
        gaps = export_onnx(tmp_path/name, tmp_path/f"{name}-onnx")
        assert max(gaps.values()) < 1e-5
        assert json.loads((tmp_path/f"{name}-onnx"/"preprocessor_config.json").read_text())["size"] == dict(height=64, width=64)
    save_model(create_model("tiny", vocab_size=len(words), ctx_len=20, resize="longest"), words, tmp_path/"padded")
    with pytest.raises(UserError, match="no padding to a square"): export_onnx(tmp_path/"padded", tmp_path/"onnx")
    with pytest.raises(UserError, match="no image tower of timm's"): export_hf(tmp_path/"bert", tmp_path/"hf")


@pytest.mark.parametrize("name", TOWERS)
def test_each_tower_goes_forward_and_backward(name):
    torch.manual_seed(0)
    model = create_model("tiny", **dict(img_size=64, ctx_len=16, vocab_size=600) | TOWERS[name]).train()
    tokens = torch.randint(1, 599, (8, 16))
    tokens[:, 9:] = 599
    images = torch.randn(8, 3, model.config.img_size, model.config.img_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    losses = []
    for _ in range(6):
        loss = clip_loss(*model(images, tokens))
        optimizer.zero_grad()
        loss.backward()
        missing = [k for k, p in model.named_parameters() if p.grad is None]
        assert not [k for k in missing if "pooler" not in k], missing
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_convnext_and_bert_through_the_whole_command(tmp_path, pairs, bert):
    "New weights, vocabulary learned from the captions; resumed; opened by open_clip."
    (tmp_path/"bert").mkdir()
    (tmp_path/"bert"/"config.json").write_text((bert/"config.json").read_text())
    more = dict(image_tower="timm:test_convnext", text_tower=f"hf:{tmp_path/'bert'}", eval_data=str(pairs), img_size=64)
    train(options(tmp_path/"run", pairs, **more, checkpoint_every=2))
    model = check_equal(tmp_path/"run")
    assert type(model.visual.trunk).__name__ == "ConvNeXt" and type(model.text.transformer).__name__ == "BertModel"
    retrieval = json.loads((tmp_path/"run"/"metrics.jsonl").read_text().splitlines()[-1])["retrieval"]
    assert retrieval["n_images"] == 56
    train(options(tmp_path/"second", pairs, preset=None, img_size=None, init=str(tmp_path/"run"), lr=1e-9, warmup=0, steps=1))
    torch.testing.assert_close(load(tmp_path/"second")[0].text.state_dict(), model.text.state_dict(), rtol=0, atol=1e-6)


def lit(out, pairs, bert, trunk, **more):
    return options(out, pairs, image_tower="timm:test_convnext", image_weights=str(trunk), text_tower=f"hf:{bert}", lock_image=True, lock_text=True, **dict(img_size=64) | more)


def test_locked_towers_keep_their_bits(tmp_path, pairs, bert, trunk):
    before = torch.load(trunk), transformers.AutoModel.from_pretrained(bert).state_dict()
    train(lit(tmp_path/"run", pairs, bert, trunk, lr=0.01, keep_embeddings=False)) # the towers run in every step
    model = check_equal(tmp_path/"run")
    for k, v in model.visual.trunk.state_dict().items(): assert torch.equal(v, before[0][k]), k
    for k, v in model.text.transformer.state_dict().items(): assert torch.equal(v, before[1][k]), k
    fresh = Trainer(lit(tmp_path/"fresh", pairs, bert, trunk)).model
    assert not torch.equal(model.visual.head.proj.weight, fresh.visual.head.proj.weight) and not torch.equal(model.text.proj.weight, fresh.text.proj.weight)


def losses_of(cfg):
    trainer = Trainer(cfg)
    return [trainer.train_step(k/12)["loss"] for k in range(12)], trainer


def test_kept_features_change_nothing(tmp_path, pairs, bert, trunk, monkeypatch):
    "The same losses with features of locked towers computed once as with towers that run in every step."
    (tmp_path/"data").mkdir()
    for p in pairs.iterdir(): (tmp_path/"data"/p.name).write_bytes(p.read_bytes())
    (tmp_path/"data"/"broken.png").write_bytes(b"no image")
    (tmp_path/"data"/"broken.txt").write_text("nothing to see")
    more = dict(kept=tmp_path/"kept", lr=0.01, warmup=0)
    (kept, trainer), (computed, other) = (losses_of(lit(tmp_path/"run", tmp_path/"data", bert, trunk, keep_embeddings=on, **more)) for on in (True, False))
    assert max(abs(a-b) for a, b in zip(kept, computed)) < 1e-5 and kept[-1] < kept[0] - 0.1
    assert trainer.source.position.counts.tolist() == other.source.position.counts.tolist() and trainer.source.position.counts[1] > 0
    files = sorted(p.name.split("-")[0] for p in (tmp_path/"kept").iterdir())
    assert files == ["images", "texts"]
    # a second run computes nothing: the towers are not asked
    monkeypatch.setattr("clip_nbdev.kept.features", None)
    assert losses_of(lit(tmp_path/"run", tmp_path/"data", bert, trunk, **more))[0] == kept
    # other weights are other features
    with pytest.raises(TypeError): Trainer(lit(tmp_path/"run", tmp_path/"data", bert, trunk, img_size=96, **more))


def test_features_that_were_damaged_are_computed_again(tmp_path, pairs, bert, trunk):
    more = dict(kept=tmp_path/"kept")
    before, _ = losses_of(lit(tmp_path/"run", pairs, bert, trunk, **more))
    for p in (tmp_path/"kept").iterdir(): p.write_bytes(p.read_bytes()[:-1000])
    assert losses_of(lit(tmp_path/"run", pairs, bert, trunk, **more))[0] == before


def changed(before, after):
    "The parts of two models whose weights differ."
    a, b = before.state_dict(), after.state_dict()
    return {k for k in a if not torch.equal(a[k], b[k])}


@pytest.fixture(scope="module")
def start(tmp_path_factory, pairs):
    run = tmp_path_factory.mktemp("start")/"run"
    train(options(run, pairs, preset="tiny-vit", steps=2))
    return run


def moved(tmp_path, pairs, start, **more):
    train(options(tmp_path/"run", pairs, preset=None, init=str(start), lr=0.01, warmup=0, **more))
    return changed(load(start)[0], load(tmp_path/"run")[0])


def interrupted(tmp_path, monkeypatch, cfg):
    "A run that is stopped by a signal at its third step and goes on, beside one that is not: the same weights."
    train(replace(cfg, out=tmp_path/"whole"))
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped): train(cfg)
    train(replace(cfg, resume=True))
    whole, run = load(tmp_path/"whole")[0], load(cfg.out)[0]
    assert not changed(whole, run)
    return run


def sides(names): return {k.split(".")[0] for k in names}


@pytest.mark.parametrize("more, expected", [
    (dict(lock_image=True), {"text", "logit_scale"}),
    (dict(lock_text=True), {"visual", "logit_scale"}),
    (dict(lock_image=True, crop_scale=0.5), {"text", "logit_scale"}),
    (dict(lr_image=0.), {"text", "logit_scale"}),
    (dict(lr_text=0.), {"visual", "logit_scale"}),
    (dict(lr_image=0.5, layer_decay=0.5), {"visual", "text", "logit_scale"}),
])
def test_what_moves(tmp_path, pairs, start, more, expected): assert sides(moved(tmp_path, pairs, start, **more)) == expected


def test_the_top_of_a_locked_tower_can_stay_free(tmp_path, pairs, start):
    found = {k for k in moved(tmp_path, pairs, start, lock_image=True, unlock_blocks=1) if k.startswith("visual.")}
    assert found >= {"visual.proj", "visual.transformer.resblocks.1.mlp.c_fc.weight", "visual.ln_post.weight"}
    assert not [k for k in found if "resblocks.0" in k or "embedding" in k or "conv1" in k or "ln_pre" in k]


def test_a_locked_batchnorm_keeps_its_statistics(tmp_path, pairs):
    train(options(tmp_path/"start", pairs, steps=2))
    train(options(tmp_path/"run", pairs, preset=None, init=str(tmp_path/"start"), lr=0.01, warmup=0, lock_image=True, keep_embeddings=False))
    assert sides(changed(load(tmp_path/"start")[0], load(tmp_path/"run")[0])) == {"text", "logit_scale"}


def test_lower_blocks_move_less(pairs, start, tmp_path):
    before, trainer = load(start)[0], Trainer(options(tmp_path/"run", pairs, preset=None, init=str(start), lr=1e-3, warmup=0, layer_decay=0.1, weight_decay=0.))
    trainer.train_step(0.)
    step = lambda name: (trainer.model.state_dict()[name] - before.state_dict()[name]).abs().max().item()
    top, block, bottom = (step(f"visual.{name}") for name in ("proj", "transformer.resblocks.1.mlp.c_fc.weight", "conv1.weight"))
    assert top == pytest.approx(1e-3, rel=0.01) and block == pytest.approx(1e-4, rel=0.05) and bottom == pytest.approx(1e-6, rel=0.2)


def test_lora_is_added_up_and_resumes(tmp_path, pairs, start, monkeypatch):
    run = interrupted(tmp_path, monkeypatch, options(tmp_path/"run", pairs, preset=None, init=str(start), lora=2, lr=0.01, warmup=0, steps=6))
    check_equal(tmp_path/"run")
    before = load(start)[0].state_dict()
    assert list(run.state_dict()) == list(before)
    found = changed(load(start)[0], run)
    assert "visual.transformer.resblocks.0.mlp.c_fc.weight" in found and "text.token_embedding.weight" not in found
    name = "text.transformer.resblocks.0.mlp.c_fc.weight"
    assert torch.linalg.matrix_rank(run.state_dict()[name] - before[name], rtol=1e-3) == 2


def test_average_with_the_start_lies_between(tmp_path, pairs, start):
    more = dict(preset=None, init=str(start), lr=0.01, warmup=0)
    for name, alpha in (("end", None), ("half", 0.5), ("none", 0.)): train(options(tmp_path/name, pairs, **more, average_with_init=alpha))
    a, b, half, none = (load(p)[0].state_dict() for p in (start, tmp_path/"end", tmp_path/"half", tmp_path/"none"))
    for k in a:
        torch.testing.assert_close(half[k], (a[k]+b[k])/2, rtol=0, atol=1e-6)
        assert torch.equal(none[k], a[k])


def test_running_mean_of_the_weights_resumes(tmp_path, pairs, start, monkeypatch):
    more = dict(preset=None, init=str(start), lr=0.01, warmup=0, steps=6)
    run = interrupted(tmp_path, monkeypatch, options(tmp_path/"run", pairs, **more, ema=0.5))
    trainer, mean = Trainer(options(tmp_path/"hand", pairs, **more)), None
    for k in range(6):
        trainer.train_step(k/6)
        now = trainer.model.text.text_projection.detach().clone()
        mean = now if mean is None else 0.5*mean + 0.5*now
    torch.testing.assert_close(run.text.text_projection, mean, rtol=0, atol=1e-6)


def test_kept_features_stay_in_the_run_and_a_resume_uses_them(tmp_path, pairs, bert, trunk, monkeypatch):
    cfg = lit(tmp_path/"run", pairs, bert, trunk, lr=0.01, warmup=0, steps=6)
    interrupted(tmp_path, monkeypatch, cfg)
    for name in ("whole", "run"): assert len(list((tmp_path/name/"kept").iterdir())) == 2
    monkeypatch.setattr("clip_nbdev.kept.features", None)
    train(replace(cfg, overwrite=True)) # nothing is computed again


def test_watching_changes_nothing(tmp_path, pairs, start):
    more = dict(preset=None, init=str(start), evals=2)
    for name, watched in (("plain", ()), ("watched", ("glyphs:dice",))): train(options(tmp_path/name, pairs, **more, eval_classes=watched))
    assert not changed(load(tmp_path/"plain")[0], load(tmp_path/"watched")[0])


def test_average_where_weights_are_stored_in_half(tmp_path, pairs, start):
    train(options(tmp_path/"run", pairs, preset=None, init=str(start), precision="bf16", text_weights="bfloat16", average_with_init=0.5))
    load(tmp_path/"run")


def test_a_released_file_is_tuned_and_stays_one_that_open_clip_opens(tmp_path, pairs):
    "OpenAI's format, ViT-B/32's names and sizes, random weights: started, locked, trained, saved, resumed."
    torch.manual_seed(0)
    state = {k: v.half() if v.is_floating_point() and v.ndim else v for k, v in to_released(create_model("ViT-B/32").state_dict()).items()}
    torch.save(state, tmp_path/"ViT-B-32.pt")
    words = BPETokenizer(list(product(base_pieces()[:256], repeat=2))[:49408-514]) # a vocabulary of the released size
    words.save(tmp_path/"words")
    more = dict(preset=None, img_size=None, init="ViT-B/32", weights=str(tmp_path/"ViT-B-32.pt"), merges=str(tmp_path/"words"), batch_size=4, lr=1e-4, warmup=0, lock_image=True)
    last = train(options(tmp_path/"run", pairs, **more, steps=2, checkpoint_every=1))
    assert last["steps"] == 2
    saved = load_file(tmp_path/"run"/"open_clip_model.safetensors")
    assert all(torch.equal(saved[k], v.float()) for k, v in state.items() if k.startswith("visual."))
    assert not torch.equal(saved["text_projection"], state["text_projection"].float())
    assert load(tmp_path/"run")[0].config.quick_gelu
    opened_by_open_clip(tmp_path/"run")
    again = train(options(tmp_path/"run", pairs, **more, steps=2, checkpoint_every=1, resume=True))
    assert again == last


@pytest.mark.parametrize("more, said", [
    (dict(image_tower="timm:convnxt_tiny"), "did you mean convnext_tiny"),
    (dict(image_tower="convnext_tiny"), "give timm:NAME"),
    (dict(image_tower="timm:test_convnext", timm_pool="map"), "can't be built with timm_pool 'map'"),
    (dict(image_tower="timm:vit_tiny_patch16_224"), "takes images of 224 pixels and no others, not 32"),
    (dict(text_tower="hf:nowhere"), "no such folder"),
    (dict(text_tower="hf"), "give hf:FOLDER"),
    (dict(text_tower="tranformer"), "did you mean transformer"),
    (dict(lock_image=True), "--lock-image needs --init or --image-weights"),
    (dict(lock_text=True), "--lock-text needs --init or --text-tower hf:FOLDER"),
    (dict(unlock_blocks=1), "nothing is locked"),
    (dict(lora=4), "--lora needs --init"),
    (dict(average_with_init=0.5), "--average-with-init needs --init"),
    (dict(init="pocket", preset=None, embed_dim=64), "--embed-dim has no meaning with --init"),
    (dict(init="pocket", preset=None, img_size=None, lock_image=True, unlock_blocks=9), "this tower has 4 blocks"),
    (dict(layer_decay=0.), "--layer-decay must be above 0"),
    (dict(image_weights="x.pth"), "--image-weights needs --image-tower"),
    (dict(ema=1.), "--ema must be"),
    (dict(ema=0.9, lora=2, init="pocket", preset=None), "--ema does not go with --lora"),
    (dict(lm_weight=0.1, lock_text=True, init="pocket", preset=None, img_size=None), "--lm-weight trains the text tower"),
    (dict(lock_text=True, lock_image=True, init="pocket", preset=None, img_size=None), "nothing is left to train but the temperature"),
    (dict(image_tower="timm:test_convnext", text_tower="bow", img_size=64, grad_checkpointing=True), "--grad-checkpointing knows the blocks"),
])
def test_mistakes_are_said_in_one_line(tmp_path, pairs, more, said):
    with pytest.raises(UserError) as e: Trainer(options(tmp_path/"run", pairs, **more))
    assert said in str(e.value) and "\n" not in str(e.value)


def test_weights_of_another_network_are_refused(tmp_path, pairs, trunk):
    other = timm.create_model("test_resnet")
    torch.save(other.state_dict(), tmp_path/"other.pth")
    with pytest.raises(UserError, match="of another network than the image tower"):
        Trainer(options(tmp_path/"run", pairs, image_tower="timm:test_convnext", image_weights=str(tmp_path/"other.pth")))


def test_the_same_network_under_other_names(tmp_path, pairs):
    "As the package of EfficientNet-Lite0 has it: other names, the same order."
    net = timm.create_model("test_efficientnet")
    state = {f"_part{i}.{k.rsplit('.', 1)[1]}": v for i, (k, v) in enumerate(net.state_dict().items())}
    torch.save(state, tmp_path/"other_names.pth")
    trainer = Trainer(options(tmp_path/"run", pairs, image_tower="timm:test_efficientnet", image_weights=str(tmp_path/"other_names.pth"), img_size=64))
    for k, v in trainer.model.visual.trunk.state_dict().items(): assert torch.equal(v, net.state_dict()[k])


def test_weights_without_their_vocabulary_are_refused(tmp_path, pairs, bert):
    (tmp_path/"bert").mkdir()
    for name in ("config.json", "model.safetensors"): (tmp_path/"bert"/name).write_bytes((bert/name).read_bytes())
    with pytest.raises(UserError, match="has weights and no tokenizer.json"): Trainer(options(tmp_path/"run", pairs, text_tower=f"hf:{tmp_path/'bert'}"))


def test_a_text_model_without_weights_cannot_be_locked(tmp_path, pairs, bert):
    (tmp_path/"bert").mkdir()
    (tmp_path/"bert"/"config.json").write_text((bert/"config.json").read_text())
    with pytest.raises(UserError, match="holds no weights"): Trainer(options(tmp_path/"run", pairs, text_tower=f"hf:{tmp_path/'bert'}", lock_text=True))


def test_tokenizer_of_another_text_model(bert, tmp_path):
    "The ids that transformers gives, with open_clip's cleaning; what is too long is refused or cut before the last token."
    ours, theirs = HFTokenizer(bert, ctx_len=8), open_clip.tokenizer.HFTokenizer(str(bert), context_length=8)
    texts = [*TEXTS, "A  Red &amp; dogs", "red "*30]
    assert torch.equal(ours(texts, truncate=True), theirs(texts))
    with pytest.raises(UserError, match="has 32 tokens and the context length is 8"): ours(texts)
    ours.save(tmp_path/"copy")
    assert torch.equal(HFTokenizer(tmp_path/"copy")(texts[:4]), ours(texts[:4])) and HFTokenizer(tmp_path/"copy").ctx_len == 8
    with pytest.raises(UserError, match="names no pad_token"):
        about = json.loads((tmp_path/"copy"/"tokenizer_config.json").read_text())
        (tmp_path/"copy"/"tokenizer_config.json").write_text(json.dumps({k: v for k, v in about.items() if k != "pad_token"}))
        HFTokenizer(tmp_path/"copy")


@pytest.mark.parametrize("name", ["convnext_xxlarge", "ViT-bigG-14", "ViT-g-14", "ViT-B-16-SigLIP", "ViT-B-16-SigLIP2", "convnext_base_w"])
def test_open_clips_configurations(name):
    "Names and shapes of all parameters, without memory."
    config = open_clip.get_model_config(name)
    kind = open_clip.model.CustomTextCLIP if config.pop("custom_text", False) else open_clip.model.CLIP
    with torch.device("meta"): ours, theirs = create_model(f"open_clip:{name}"), kind(**config)
    shapes = lambda state: {k: v.shape for k, v in state.items()}
    assert shapes(to_released(ours.state_dict())) == shapes(theirs.state_dict())
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


FOREIGN = {
    "convnext_base": (dict(timm_model_name="test_convnext", image_size=64), dict(width=64, heads=2, layers=1)),
    "ViT-B-16-SigLIP": (dict(timm_model_name="test_vit", image_size=160), dict(width=64, heads=2, layers=1)),
    "roberta-ViT-B-32": (dict(image_size=64, width=64, layers=1), dict(hf_model_pretrained=False)),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_checkpoint_of_open_clip_with_other_towers_is_opened(tmp_path, bert, name):
    "A folder as open_clip's hub has it: configuration with the pixels' mean and deviation, weights, tokenizer."
    config = json.loads((Path(open_clip.__file__).parent/"model_configs"/f"{name}.json").read_text())
    for part, more in zip(("vision_cfg", "text_cfg"), FOREIGN[name]): config[part] |= more
    config["text_cfg"] |= dict(vocab_size=600, context_length=20, hf_tokenizer_name=".")
    if "SigLIP" in name: config["embed_dim"] = 64
    (tmp_path/"start").mkdir()
    BPETokenizer.train([f"{a} left of {b}" for a in COLOURS for b in COLOURS], 600, 20).save(tmp_path/"start")
    vocab_size = len(BPETokenizer.load(tmp_path/"start"))
    config["text_cfg"]["vocab_size"] = vocab_size
    if "roberta" in name:
        for p in bert.iterdir(): (tmp_path/"start"/p.name).write_bytes(p.read_bytes())
        config["text_cfg"]["hf_model_name"] = str(bert)
    mean, std = ([0.5]*3, [0.5]*3) if "SigLIP" in name else ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    about = dict(model_cfg=config, preprocess_cfg=dict(mean=mean, std=std, interpolation="bicubic", resize_mode="shortest"))
    (tmp_path/"start"/"open_clip_config.json").write_text(json.dumps(about))
    torch.manual_seed(0)
    kind = open_clip.model.CustomTextCLIP if config.pop("custom_text", False) or "roberta" in name else open_clip.model.CLIP
    save_file({k: v.contiguous() for k, v in kind(**config).state_dict().items()}, tmp_path/"start"/"open_clip_model.safetensors")
    model = check_equal(tmp_path/"start")
    save_model(model, load(tmp_path/"start")[2], tmp_path/"copy")
    again = check_equal(tmp_path/"copy")
    assert not changed(model, again) and model.config == again.config


@pytest.mark.parametrize("resize", ["longest", "squash"])
def test_the_whole_picture_is_seen(tmp_path, pairs, resize):
    "The run remembers how a picture becomes a square, open_clip does it alike, and so does a second run."
    train(options(tmp_path/"run", pairs, resize=resize, crop_scale=0.8, eval_data=str(pairs)))
    model = check_equal(tmp_path/"run")
    assert model.config.resize == resize
    assert json.loads((tmp_path/"run"/"open_clip_config.json").read_text())["preprocess_cfg"]["resize_mode"] == resize
    train(options(tmp_path/"second", pairs, preset=None, img_size=None, init=str(tmp_path/"run"), steps=1))
    assert load(tmp_path/"second")[0].config.resize == resize


@pytest.mark.parametrize("positions", ["long-clip", "interpolate"])
def test_longer_texts(tmp_path, pairs, start, positions):
    train(options(tmp_path/"run", pairs, preset=None, init=str(start), ctx_len=100, positions=positions, lr=1e-9, warmup=0, steps=1))
    model, _, tokenizer = load(tmp_path/"run")
    before = load(start)[0]
    assert model.config.ctx_len == tokenizer.ctx_len == 100 and len(model.text.positional_embedding) == 100
    same = torch.allclose(model.text.positional_embedding[:20], before.text.positional_embedding[:20], atol=1e-6)
    assert same == (positions == "long-clip")
    check_equal(tmp_path/"run")
    long = " ".join(COLOURS*6)
    with pytest.raises(UserError, match="context length is"): load(start)[2](long)
    assert model.encode_text(tokenizer([long])).shape == (1, 32)


def test_watching_what_the_start_knew(tmp_path, pairs):
    "Zero-shot accuracy on labelled data, before the first step, on the way and at the end; the report draws it."
    for colour in COLOURS[:3]:
        (tmp_path/"classes"/colour).mkdir(parents=True)
        for k in range(4): Image.new("RGB", (40, 40), colour).save(tmp_path/"classes"/colour/f"{k}.png")
    watched = (str(tmp_path/"classes"), "glyphs:dice,chess")
    last = train(options(tmp_path/"run", pairs, preset=None, img_size=None, init="pocket", evals=2, eval_classes=watched, checkpoint_every=2))
    records = [json.loads(line) for line in (tmp_path/"run"/"metrics.jsonl").read_text().splitlines()]
    seen = [(r.get("step", r.get("steps")), set(r["classes"])) for r in records if "classes" in r]
    names = {"classes", "dice", "chess"}
    assert seen == [(0, names), (2, names), (4, names)] and set(last["classes"]) == names
    knew = evaluate_suite(*load("pocket")[::2], 64, ("dice",))["dice"]
    assert next(r for r in records if r.get("step") == 0)["classes"]["dice"] == pytest.approx(knew)
    report = (tmp_path/"run"/"report.md").read_text()
    assert (tmp_path/"run"/"figures"/"classes.png").exists() and "figures/classes.png" in report and "zero-shot %" in report
    with pytest.raises(UserError, match="no folder"): Trainer(options(tmp_path/"other", pairs, eval_classes=("/no/where",)))
