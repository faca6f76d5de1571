"""Image towers from files: three layouts, several formats, real models of both libraries, and files that are not what they seem."""
import importlib
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tsv_nb import StateDictKeyError, task_arithmetic, task_vector, tsv_merge, weight_average
from tsv_nb.lazy import LazyTaskVector, SafetensorsFile, TorchFile
from tsv_nb.task_vectors import named_vectors
from tsv_nb.vision import checkpoints
from tsv_nb.vision.checkpoints import (checkpoint_path, convert_tower, find_checkpoints, hf_to_open_clip, lazy_vectors, load_tower, open_clip_to_hf,
                                       open_tower)
from tsv_nb.vision.clip import image_state
from tsv_nb.vision.layouts import Tower, check_config, tower_names, tower_sources

transformers = pytest.importorskip("transformers")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

WIDTH, LAYERS, HEADS, IMAGE, PATCH, EMBED = 24, 3, 3, 16, 4, 10
ATTENTION = "vision_model.encoder.layers.{}.self_attn.{}_proj.{}"


def clip(quick_gelu=True, heads=HEADS, seed=0):
    torch.manual_seed(seed)
    vision = dict(image_size=IMAGE, patch_size=PATCH, width=WIDTH, layers=LAYERS, head_width=WIDTH // heads)
    model = open_clip.CLIP(EMBED, vision, dict(context_length=8, vocab_size=40, width=24, heads=3, layers=2), quick_gelu=quick_gelu).eval()
    return randomize(model, seed)


def randomize(model, seed=0):
    "Every entry random, of a plausible size: with fresh models, biases are zero and two of them swapped would not be noticed."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters(): p.copy_(torch.randn(p.shape, generator=g) * (.3 if p.ndim > 1 else .5))
    return model


def vision_config(act="quick_gelu"):
    return transformers.CLIPVisionConfig(hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, image_size=IMAGE,
                                         patch_size=PATCH, projection_dim=EMBED, hidden_act=act)


def hf_model(kind="CLIPVisionModelWithProjection", act="quick_gelu", seed=0):
    if kind == "CLIPModel":
        text = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=1, num_attention_heads=3, vocab_size=40, max_position_embeddings=8)
        config = transformers.CLIPConfig(vision_config=vision_config(act).to_dict(), text_config=text, projection_dim=EMBED)
    else: config = vision_config(act)
    return randomize(getattr(transformers, kind)(config).eval(), seed)


@pytest.fixture
def hf(): return {k: v.clone() for k, v in hf_model().state_dict().items()}


@pytest.fixture
def tower(): return image_state(clip())


def same(a, b): return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


class Published(nn.Module):
    "What the published code saves: `torch.save(ImageEncoder(...).state_dict(), path)`, the text transformer deleted."
    def __init__(self, model):
        super().__init__()
        self.model = model
        if hasattr(model, "transformer"): del model.transformer


def publish(model, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(Published(model).state_dict(), path)
    return path


# --- conversion

@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-5), (torch.float64, 1e-13)])
@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("kind", ["CLIPVisionModelWithProjection", "CLIPModel", "CLIPVisionModel"])
def test_real_models_give_the_same_features(kind, act, dtype, bound):
    theirs, ours = hf_model(kind, act).to(dtype), clip(act == "quick_gelu", seed=1).to(dtype)
    images = torch.randn(5, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(2), dtype=dtype)
    proj = torch.randn(WIDTH, EMBED, generator=torch.Generator().manual_seed(3), dtype=dtype) if kind == "CLIPVisionModel" else None
    ours.visual.load_state_dict(hf_to_open_clip(theirs.state_dict(), proj))
    with torch.no_grad():
        got = ours.visual(images)
        if kind == "CLIPVisionModel": want = theirs(pixel_values=images).pooler_output @ proj
        elif kind == "CLIPModel": want = theirs.visual_projection(theirs.vision_model(pixel_values=images).pooler_output)
        else: want = theirs(pixel_values=images).image_embeds
    error = ((got - want).abs().max() / want.abs().max()).item()
    print(f"{kind} {act} {dtype}: largest feature error {error:.1e}")
    assert want.abs().max() > .1 and error < bound


def test_real_models_the_other_way():
    ours, theirs = clip(seed=4), hf_model(seed=5)
    theirs.load_state_dict(open_clip_to_hf(image_state(ours)), strict=True)
    images = torch.randn(5, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(2))
    with torch.no_grad(): torch.testing.assert_close(theirs(pixel_values=images).image_embeds, ours.visual(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_round_trips_keep_every_bit(hf, tower, dtype):
    hf, tower = ({k: v.to(dtype) for k, v in s.items()} for s in (hf, tower))
    copies = [{k: v.clone() for k, v in s.items()} for s in (hf, tower)]
    assert same(open_clip_to_hf(hf_to_open_clip(hf)), hf)
    back = hf_to_open_clip(open_clip_to_hf(tower))
    assert same(back, tower) and list(back) == list(tower)
    assert all(t.is_contiguous() for t in back.values())
    assert same(hf, copies[0]) and same(tower, copies[1])


def test_bits_of_special_values_survive(hf):
    "NaN payloads, infinities, subnormal numbers and minus zero: nothing is computed with them."
    bits = torch.randint(-2**31, 2**31 - 1, hf["visual_projection.weight"].shape, generator=torch.Generator().manual_seed(0), dtype=torch.int64).int()
    for name in ("visual_projection.weight", ATTENTION.format(1, "k", "weight")):
        hf[name] = bits.flatten().repeat(10)[:hf[name].numel()].view(hf[name].shape).view(torch.float32).clone()
    back = open_clip_to_hf(hf_to_open_clip(hf))
    assert all(torch.equal(back[k].view(torch.int32), hf[k].view(torch.int32)) for k in hf)


def test_fused_rows_are_q_then_k_then_v(hf):
    got = hf_to_open_clip(hf)
    for i in range(LAYERS):
        for kind in ("weight", "bias"):
            fused = got[f"transformer.resblocks.{i}.attn.in_proj_{kind}"].numpy()
            for row, part in enumerate("qkv"): assert (fused[row * WIDTH:(row + 1) * WIDTH] == hf[ATTENTION.format(i, part, kind)].numpy()).all()
    assert (got["proj"].numpy() == hf["visual_projection.weight"].numpy().T).all()


def test_the_table_covers_real_models(hf, tower):
    table = tower_names(LAYERS)
    assert list(table) == list(tower) and {n for names in table.values() for n in names} == hf.keys()
    deep = tower_names(12)
    assert len(deep) == 152 and deep["transformer.resblocks.11.mlp.c_fc.bias"] == ("vision_model.encoder.layers.11.mlp.fc1.bias",) # ViT-B


def test_what_is_outside_the_tower_is_left_out(hf):
    want = hf_to_open_clip(hf)
    extra = {"vision_model.embeddings.position_ids": torch.arange(17)[None], "text_model.embeddings.position_ids": torch.arange(8)[None],
             "text_model.final_layer_norm.weight": torch.ones(3), "logit_scale": torch.ones(()), "text_projection.weight": torch.ones(2, 2), "classifier.weight": torch.ones(2, 2)}
    assert same(hf_to_open_clip(hf | extra), want)
    bare = {k.removeprefix("vision_model."): v for k, v in hf.items()} # as transformers 5 names a CLIPVisionModel's
    assert same(hf_to_open_clip(bare | {"embeddings.position_ids": torch.arange(17)[None]}), want)
    assert same(hf_to_open_clip({f"model.{k}": v for k, v in (hf | extra).items()}), want)


def test_plain_vision_models_need_a_projection(hf):
    proj = hf.pop("visual_projection.weight").T
    with pytest.raises(ValueError, match=r"no visual_projection.weight.*Pass proj=.*load_tower\(base\)\['proj'\]"): hf_to_open_clip(hf)
    got = hf_to_open_clip(hf, proj)
    assert torch.equal(got["proj"], proj) and "visual_projection.weight" in open_clip_to_hf(got)
    with pytest.raises(ValueError, match=r"'proj': expected shape \(24, any\)"): hf_to_open_clip(hf, proj.T)


def test_a_projection_in_the_file_wins(hf):
    assert torch.equal(hf_to_open_clip(hf, torch.zeros(WIDTH, EMBED))["proj"], hf["visual_projection.weight"].T)


def test_parts_of_a_split_do_not_share_memory(tower):
    before, got = {k: v.clone() for k, v in tower.items()}, open_clip_to_hf(tower)
    for part in "qkv": got[ATTENTION.format(0, part, "weight")].zero_()
    got["visual_projection.weight"].zero_()
    assert same(tower, before)


def drop(*names): return lambda s: {k: v for k, v in s.items() if k not in names}
def without(part): return lambda s: {k: v for k, v in s.items() if part not in k}
def put(**entries): return lambda s: s | {k.replace("__", "."): v for k, v in entries.items()}


def uneven(s):
    "q, k and v of different heights which together have the right one."
    q, k = (ATTENTION.format(0, o, "weight") for o in "qk")
    return s | {q: s[q][:12], k: torch.cat([s[k], s[q][12:]])}


MALFORMED = {
    "missing": (drop("vision_model.pre_layrnorm.weight"), StateDictKeyError, r"1 missing \('vision_model.pre_layrnorm.weight'\)"),
    "extra": (put(vision_model__adapter=torch.ones(1)), StateDictKeyError, r"1 unexpected \('vision_model.adapter'\)"),
    "extra block": (put(**{"vision_model__encoder__layers__1__self_attn__q_norm__weight": torch.ones(1)}), StateDictKeyError, "1 unexpected"),
    "one layer": (without("layers.1."), StateDictKeyError, r"16 missing \('vision_model.encoder.layers.1"),
    "two layers": (lambda s: without("layers.0.")(without("layers.1.")(s)), StateDictKeyError, r"32 missing \('vision_model.encoder.layers.0"),
    "no layers": (without("layers."), StateDictKeyError, "16 missing"),
    "huge layer": (put(vision_model__encoder__layers__999999999__mlp__fc1__bias=torch.ones(1)), StateDictKeyError, "missing"),
    "fc1": (put(vision_model__encoder__layers__2__mlp__fc1__weight=torch.ones(96, 25)), ValueError, r"2.mlp.c_fc.weight': expected shape \(96, 24\).*got \(96, 25\)"),
    "fc2": (put(vision_model__encoder__layers__2__mlp__fc2__weight=torch.ones(24, 95)), ValueError, r"2.mlp.c_proj.weight': expected shape \(24, 96\)"),
    "norm": (put(vision_model__post_layernorm__bias=torch.ones(25)), ValueError, r"'ln_post.bias': expected shape \(24\).*got \(25,\)"),
    "positions": (put(vision_model__embeddings__position_embedding__weight=torch.ones(17, 23)), ValueError, r"'positional_embedding': expected shape \(any, 24\)"),
    "patches": (put(vision_model__embeddings__patch_embedding__weight=torch.ones(24, 48)), ValueError, r"'conv1.weight'"),
    "projection": (put(visual_projection__weight=torch.ones(10, 25)), ValueError, r"'proj': expected shape \(24, any\)"),
    "uneven": (uneven, ValueError, r"k_proj.weight': expected shape \(12, 24\), got \(36, 24\)"),
    "types": (lambda s: s | {(n := ATTENTION.format(1, "v", "bias")): s[n].half()}, ValueError, "v_proj.bias' is torch.float16, but .*q_proj.bias' is torch.float32"),
    "two towers": (lambda s: s | {f"student.{k}": v for k, v in s.items()}, ValueError, "2 tensors called embeddings.class_embedding"),
    "nothing": (lambda s: {}, ValueError, "0 tensors called"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_hugging_face_states(hf, case, tmp_path):
    change, error, message = MALFORMED[case]
    bad = change(hf)
    with pytest.raises(error, match=message): hf_to_open_clip(bad)
    if not bad: return
    save_file({k: v.clone() for k, v in bad.items()}, tmp_path / "bad.safetensors")
    with pytest.raises(error, match=message) as e: open_tower(tmp_path / "bad.safetensors") # from the headers alone
    assert "bad.safetensors" in str(e.value)


@pytest.mark.parametrize("case", ["missing", "extra", "shape", "layer", "fused"])
def test_malformed_open_clip_towers(tower, case):
    name = "transformer.resblocks.1.attn.in_proj_weight"
    bad = {"missing": drop("ln_pre.bias"), "extra": put(adapter=torch.ones(1)), "shape": lambda s: s | {"ln_post.bias": torch.ones(3)}, "layer": without("resblocks.1."),
           "fused": lambda s: s | {name: s[name][:71]}}[case](tower)
    with pytest.raises((StateDictKeyError, ValueError), match="open_clip image tower"): open_clip_to_hf(bad)


# --- what weights do not say

def test_the_wrong_activation_loads_and_is_noticed(tmp_path):
    hf_model().save_pretrained(tmp_path)
    right, wrong, state = clip(True), clip(False), load_tower(tmp_path)
    images = torch.randn(5, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(2))
    for m in (right, wrong): m.visual.load_state_dict(state, strict=True)
    with torch.no_grad(): a, b = right.visual(images), wrong.visual(images)
    assert (a - b).abs().max() > 1e-3 * a.abs().max()
    check_config(right, tmp_path)
    with pytest.raises(ValueError, match="hidden_act = 'quick_gelu', the model has 'gelu'.*force_quick_gelu"): check_config(wrong, tmp_path)
    with pytest.raises(ValueError, match="num_attention_heads = 3, the model has 6"): check_config(clip(heads=6), tmp_path)


def test_config_of_a_whole_model_and_of_an_old_one(tmp_path):
    hf_model("CLIPModel", "gelu").save_pretrained(tmp_path / "whole")
    check_config(clip(False), tmp_path / "whole")
    with pytest.raises(ValueError, match="hidden_act = 'gelu'"): check_config(clip(True), tmp_path / "whole")
    config = json.loads((tmp_path / "whole" / "config.json").read_text())["vision_config"]
    del config["hidden_act"] # left out where it is the default
    (tmp_path / "config.json").write_text(json.dumps(config))
    check_config(clip(True), tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json' is damaged"): check_config(clip(), tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="no config.json in"): check_config(clip(), tmp_path)


def test_a_folder_with_fewer_layers_than_its_config(tmp_path, hf):
    hf_model().save_pretrained(tmp_path)
    save_file({k: v for k, v in hf.items() if "layers.2." not in k}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="has 2 layers, its config.json says 3"): load_tower(tmp_path)


# --- files

def test_every_format_of_every_layout(tmp_path, tower):
    model, theirs = clip(), hf_model()
    theirs.load_state_dict(open_clip_to_hf(tower))
    raw = theirs.state_dict()
    torch.save(model.state_dict(), tmp_path / "whole.pt")
    torch.save({"epoch": 3, "name": "run", "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}, "optimizer": {"state": {}}}, tmp_path / "training.pt")
    torch.save(model.visual.state_dict(), tmp_path / "bare.pth")
    torch.save({k: nn.Parameter(v) for k, v in tower.items()}, tmp_path / "parameters.pt")
    torch.save(raw, tmp_path / "hf.bin")
    torch.save(raw, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    save_file(tower, tmp_path / "own.safetensors")
    theirs.save_pretrained(tmp_path / "folder")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for name in ("bin", "binshards", "openclip"): (tmp_path / name).mkdir()
    torch.save(raw, tmp_path / "bin/pytorch_model.bin")
    names = sorted(raw)
    for i, part in enumerate((names[::2], names[1::2])): torch.save({n: raw[n] for n in part}, tmp_path / f"binshards/pytorch_model-{i}.bin")
    (tmp_path / "binshards/pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {n: f"pytorch_model-{i % 2}.bin" for i, n in enumerate(names)}}))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "openclip/open_clip_model.safetensors")
    publish(clip(), tmp_path / "published.pt")
    for name in ("own.safetensors", "hf.bin", "legacy.pt"): (tmp_path / f"{name}.renamed").write_bytes((tmp_path / name).read_bytes()) # known by their first bytes
    paths = sorted(tmp_path.iterdir())
    assert len(paths) == 16
    for path in paths:
        assert same(load_tower(path), tower), path
        lazy = open_tower(path)
        assert isinstance(lazy, Tower) and set(lazy) == set(tower), path
        for name in tower:
            assert torch.equal(lazy[name], tower[name]), (path, name)
            h = lazy.header(name)
            assert (h.shape, h.dtype, h.device) == (tower[name].shape, tower[name].dtype, tower[name].device) and h.untyped_storage().nbytes() <= 8


def test_the_published_layout_in_detail(tmp_path):
    model = clip()
    text = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith(("visual.", "transformer."))}
    want = image_state(model)
    saved = torch.load(publish(model, tmp_path / "t.pt"), weights_only=True)
    assert {f"model.{k}" for k in text} == {k for k in saved if "visual" not in k} and "model.positional_embedding" in saved
    got = load_tower(tmp_path / "t.pt")
    assert same(got, want) and list(got) == list(want)
    assert got["positional_embedding"].shape != text["positional_embedding"].shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types_are_kept(tmp_path, tower, dtype):
    state = {k: v.to(dtype) for k, v in tower.items()}
    torch.save(state, tmp_path / "t.pt")
    for layout in ("open_clip", "huggingface"): assert same(load_tower(convert_tower(tmp_path / "t.pt", tmp_path / f"{layout}.safetensors", layout)), state)


def test_towers_of_other_architectures_are_left_as_they_are(tmp_path):
    "A modified ResNet: no vision transformer, but read under its own names."
    torch.manual_seed(0)
    resnet = open_clip.CLIP(8, dict(image_size=32, layers=[1, 1, 1, 1], width=8), dict(context_length=8, vocab_size=40, width=24, heads=3, layers=1)).eval()
    torch.save(Published(resnet).state_dict(), tmp_path / "t.pt")
    assert same(load_tower(tmp_path / "t.pt"), image_state(resnet))
    with pytest.raises(StateDictKeyError, match="open_clip image tower"): convert_tower(tmp_path / "t.pt", tmp_path / "x.safetensors", "huggingface")
    assert not (tmp_path / "x.safetensors").exists()


def test_names_that_are_no_tower():
    with pytest.raises(ValueError, match="x.pt: no image tower found.*got 'fc.bias', 'fc.weight'"): tower_sources(["fc.weight", "fc.bias"], where="x.pt")
    with pytest.raises(ValueError, match="more than one image tower .a.visual., b.visual.."): tower_sources(["a.visual.proj", "b.visual.proj"])


class Evil:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain", "module", "folder", "shard", "nested", "unmasked"])
def test_code_is_never_run(tmp_path, kind, tower):
    trap, path = tmp_path / "the trap went off", tmp_path / "x.pt"
    evil = dict(tower, extra=Evil(trap))
    if kind == "zip": torch.save(evil, path)
    elif kind == "legacy": torch.save(evil, path, _use_new_zipfile_serialization=False)
    elif kind == "plain": path.write_bytes(pickle.dumps(Evil(trap), protocol=2))
    elif kind == "module": torch.save(clip().visual, path)
    elif kind == "nested": torch.save({"state_dict": evil}, path)
    elif kind == "unmasked": # named as if nothing could be in it
        torch.save(evil, path); path = path.rename(tmp_path / "x.safetensors")
    else:
        path = tmp_path / "folder"
        path.mkdir()
        torch.save(evil, path / "pytorch_model.bin")
        if kind == "shard":
            (path / "pytorch_model.bin").rename(path / "a.bin")
            (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"proj": "a.bin"}}))
    with pytest.raises(ValueError, match="is damaged" if kind == "unmasked" else "holds Python objects .*torch.save.model.state_dict"): load_tower(path)
    with pytest.raises(ValueError): open_tower(path)
    assert not trap.exists()
    torch.load(path, weights_only=False) if kind == "zip" else None
    assert trap.exists() == (kind == "zip") # the trap itself works


def test_torchscript_is_refused(tmp_path):
    "OpenAI's own files are of this kind."
    with pytest.warns(): torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(tmp_path / "x.pt"))
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="holds Python objects .TorchScript"): load_tower(tmp_path / "x.pt")


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors"])
def test_damaged_files(tmp_path, tower, suffix):
    path = tmp_path / f"x{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(tower, path)
    data = path.read_bytes()
    for cut in (0, 1, 7, 100, len(data) // 2, len(data) - 10):
        path.write_bytes(data[:cut])
        with pytest.raises(ValueError, match=f"x{suffix}' is damaged, incomplete or not a checkpoint"): load_tower(path)
    path.write_bytes(b"<html>404 Not Found</html>\n")
    with pytest.raises(ValueError, match="is damaged, incomplete or not a checkpoint"): load_tower(path)
    with zipfile.ZipFile(path, "w") as z: z.writestr("notes/a.txt", "hello")
    with pytest.raises(ValueError, match="is damaged, incomplete or not a checkpoint"): load_tower(path)


def test_random_damage_gives_values_or_a_clear_error(tmp_path, tower):
    small, g = {"conv1.weight": torch.ones(2, 3), "b": torch.ones(4)}, torch.Generator().manual_seed(0)
    outcomes = {"read": 0, "refused": 0}
    for suffix, save in ((".pt", torch.save), (".safetensors", save_file)):
        path = tmp_path / f"x{suffix}"
        save(small, path)
        data = path.read_bytes()
        for _ in range(150):
            broken = bytearray(data)
            for at in torch.randint(len(data), (4,), generator=g).tolist(): broken[at] = int(torch.randint(256, (), generator=g))
            path.write_bytes(bytes(broken))
            try: state = load_tower(path)
            except (ValueError, KeyError) as e:
                assert str(e)
                outcomes["refused"] += 1
            else:
                assert all(isinstance(v, torch.Tensor) for v in state.values())
                outcomes["read"] += 1
    assert min(outcomes.values()) > 20, outcomes


@pytest.mark.parametrize("content", [[torch.ones(2)], {}, {"a": 1}, torch.ones(3), {"state_dict": {"a": "b"}}])
def test_files_without_a_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="holds no state dict but a"): load_tower(tmp_path / "x.pt")


def test_paths_that_lead_nowhere(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*nothing.pt"): load_tower(tmp_path / "nothing.pt")
    (tmp_path / "x.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match="x.ckpt' is damaged, incomplete or not a checkpoint"): load_tower(tmp_path / "x.ckpt")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="no weights in folder .*expected one of model.safetensors"): load_tower(tmp_path)


@pytest.mark.parametrize("index, error, message", [
    ("{", ValueError, "index.json' is damaged"), ("[]", ValueError, "is damaged"), ('{"weight_map": 3}', ValueError, "is damaged"), ('{"weight_map": {"a": ["x"]}}', ValueError, "is damaged"),
    ('{"weight_map": {"a": "model.safetensors.index.json"}}', ValueError, "the index names files of another kind"), ('{"weight_map": {"a": ".."}}', ValueError, "files of another kind"),
    ('{"weight_map": {"a": "none.safetensors"}}', FileNotFoundError, "no checkpoint at .*none.safetensors"),
    ('{"weight_map": {"conv1.weight": "1.safetensors", "b": "1.safetensors"}}', ValueError, "tensor 'b' should be in '1.safetensors' and is not"),
    ('{"weight_map": {"a": "../outside.safetensors"}}', FileNotFoundError, "folder.outside.safetensors")])
def test_bad_indexes_of_shards(tmp_path, index, error, message):
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file({"conv1.weight": torch.ones(2)}, folder / "1.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "outside.safetensors") # must not be reachable
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(error, match=message): load_tower(folder)


# --- conversion on disk

def test_converted_files_are_read_by_transformers(tmp_path, tower):
    publish(clip(), tmp_path / "t.pt")
    convert_tower(tmp_path / "t.pt", tmp_path / "new/model.safetensors", layout="huggingface")
    vision_config().save_pretrained(tmp_path / "new")
    model, info = transformers.CLIPVisionModelWithProjection.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not any(info.values()) and same(dict(model.state_dict()), open_clip_to_hf(tower))
    plain = transformers.CLIPVisionModel.from_pretrained(tmp_path / "new")
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="Pass proj="): load_tower(tmp_path / "plain")
    assert same(load_tower(tmp_path / "plain", proj=tower["proj"]), tower)
    assert same(load_tower(convert_tower(tmp_path / "plain", tmp_path / "back.safetensors", proj=tower["proj"])), tower)


def test_conversion_is_atomic(tmp_path, tower, monkeypatch):
    torch.save(tower, tmp_path / "t.pt")
    out = convert_tower(tmp_path / "t.pt", tmp_path / "out.safetensors")
    before = out.read_bytes()
    def fails(tensors, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")
    monkeypatch.setattr(importlib.import_module("tsv_nb.compress"), "save_file", fails)
    with pytest.raises(OSError, match="disk full"): convert_tower(tmp_path / "t.pt", out, "huggingface")
    assert out.read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == ["out.safetensors", "t.pt"]


def test_conversion_in_place(tmp_path, tower):
    save_file(tower, tmp_path / "t.safetensors")
    convert_tower(tmp_path / "t.safetensors", tmp_path / "t.safetensors", "huggingface")
    assert load_file(tmp_path / "t.safetensors").keys() == open_clip_to_hf(tower).keys() and same(load_tower(tmp_path / "t.safetensors"), tower)


def test_conversion_options(tmp_path, tower):
    torch.save(tower, tmp_path / "t.pt")
    with pytest.raises(ValueError, match="unknown layout 'hf'; known: 'open_clip', 'huggingface'"): convert_tower(tmp_path / "t.pt", tmp_path / "x.safetensors", "hf")
    with pytest.raises(ValueError, match="has to end in .safetensors"): convert_tower(tmp_path / "t.pt", tmp_path / "x.pt")


# --- folders of checkpoints

def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_paths_of_the_published_layout(tmp_path):
    want = tmp_path / "ViT-B-32/MNISTVal/nonlinear_finetuned.safetensors"
    assert checkpoint_path(tmp_path, "ViT-B-32", "MNIST") == checkpoint_path(str(tmp_path), "ViT-B-32", "MNISTVal") == want
    assert checkpoint_path(tmp_path, "ViT-B-32", "MNIST", "zeroshot").name == "nonlinear_zeroshot.safetensors"
    with pytest.raises(ValueError, match="unknown kind 'linear'"): checkpoint_path(tmp_path, "m", "MNIST", "linear")


def test_checkpoints_are_found(tmp_path):
    m = tmp_path / "ViT-B-32"
    a, b, c = touch(m / "MNISTVal/nonlinear_finetuned.pt"), touch(m / "SVHN/nonlinear_finetuned.safetensors"), touch(m / "DTDVal/nonlinear_finetuned.pt")
    base = touch(m / "DTDVal/nonlinear_zeroshot.pt")
    touch(m / "AVal/nonlinear_zeroshot.json") # not a checkpoint
    assert find_checkpoints(tmp_path, "ViT-B-32", ["MNIST", "SVHNVal", "DTD"]) == (base, {"MNIST": a, "SVHNVal": b, "DTD": c})
    assert find_checkpoints(tmp_path, "ViT-B-32", ("MNIST",)) == (base, {"MNIST": a}) # a base in any folder will do
    own = touch(m / "MNISTVal/nonlinear_zeroshot.safetensors")
    tuned = touch(m / "MNISTVal/nonlinear_finetuned.safetensors")
    assert find_checkpoints(str(tmp_path), "ViT-B-32", ["MNIST", "DTD"]) == (own, {"MNIST": tuned, "DTD": c}) # safetensors first


def test_one_error_lists_all_missing_checkpoints(tmp_path):
    tasks = [f"task{i}" for i in range(20)]
    touch(checkpoint_path(tmp_path, "m", "task3"))
    with pytest.raises(FileNotFoundError) as e: find_checkpoints(tmp_path, "m", tasks)
    text = str(e.value)
    assert "20 checkpoints missing" in text and all(f"task{i}Val/nonlinear_finetuned" in text for i in range(20) if i != 3) and "task3Val/nonlinear_finetuned" not in text
    assert "nonlinear_zeroshot" in text and "MODEL/TASKVal/nonlinear_finetuned.pt" in text
    for bad in ("MNIST", [], ()):
        with pytest.raises(ValueError, match="tasks must be a list"): find_checkpoints(tmp_path, "m", bad)


# --- merging from files

@pytest.fixture
def published(tmp_path):
    "A base and three fine-tuned towers in the published layout; the text's leftovers do not move."
    towers = {"base": image_state(clip())}
    g = torch.Generator().manual_seed(1)
    for task in ("MNIST", "SVHN", "DTD"):
        towers[task] = {k: v + .05 * torch.randn(v.shape, generator=g) if "ln_pre" not in k else v for k, v in towers["base"].items()}
        model = clip()
        model.visual.load_state_dict(towers[task])
        publish(model, checkpoint_path(tmp_path, "m", task).with_suffix(".pt"))
    publish(clip(), checkpoint_path(tmp_path, "m", "SVHN", "zeroshot").with_suffix(".pt"))
    return tmp_path, towers


@pytest.mark.parametrize("mixed", [False, True])
def test_merging_from_files_gives_the_same_bits(published, mixed):
    folder, towers = published
    base, paths = find_checkpoints(folder, "m", ["MNIST", "SVHN", "DTD"])
    if mixed: # one task as this library's file, one as Hugging Face's
        paths["SVHN"] = convert_tower(paths["SVHN"], folder / "svhn.safetensors", "huggingface")
        paths["DTD"] = convert_tower(paths["DTD"], folder / "dtd.safetensors")
    lazy, eager = lazy_vectors(base, paths), {t: task_vector(towers["base"], towers[t]) for t in paths}
    for method, options in ((tsv_merge, {}), (tsv_merge, dict(split="qkv")), (task_arithmetic, {}), (weight_average, {})):
        got, want = method(lazy, **options), method(eager, **options)
        assert same(got, want), (method, options)
    assert not tsv_merge(lazy)["ln_pre.weight"].any()


def test_opening_and_planning_read_no_numbers(published, monkeypatch):
    "Names, shapes and types come from the headers; membership, key views and comparisons, too."
    folder, _ = published
    base, paths = find_checkpoints(folder, "m", ["MNIST", "SVHN"])
    paths["HF"] = convert_tower(base, folder / "hf.safetensors", "huggingface")
    reads = []
    for kind in (TorchFile, SafetensorsFile):
        def counted(self, names, original=kind._read):
            reads.extend(names)
            return original(self, names)
        monkeypatch.setattr(kind, "_read", counted)
    vectors = named_vectors(lazy_vectors(base, paths))
    assert "proj" in vectors["HF"] and "proj" in open_tower(paths["HF"]) and "nothing" not in open_tower(base)
    assert not vectors["HF"].keys() ^ vectors["MNIST"].keys() and len(LazyTaskVector(base, paths["MNIST"])) > len(vectors["HF"]) and not reads
    assert vectors["HF"]["transformer.resblocks.0.attn.in_proj_weight"].shape == (72, 24) and len(reads) == 4 # one of the base, q, k, v


def test_lazy_vectors_of_vision_models_without_projection(tmp_path, tower):
    theirs = hf_model()
    theirs.load_state_dict(open_clip_to_hf(tower)); theirs.save_pretrained(tmp_path / "base")
    hf_model("CLIPVisionModel", seed=7).save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match="a.model.safetensors'?: no visual_projection.weight"): lazy_vectors(tmp_path / "base", {"a": tmp_path / "a"})
    vector = lazy_vectors(tmp_path / "base", {"a": tmp_path / "a"}, proj=load_tower(tmp_path / "base")["proj"])["a"]
    assert not vector["proj"].any() and vector["conv1.weight"].any() and set(vector) == set(tower)


def test_lazy_vectors_of_files_that_do_not_fit(published):
    folder, towers = published
    base, paths = find_checkpoints(folder, "m", ["MNIST"])
    def saved(state):
        save_file(state, folder / "x.safetensors")
        return {"x": folder / "x.safetensors"}
    with pytest.raises(StateDictKeyError, match="x.safetensors': keys differ.*1 missing .'proj'"): lazy_vectors(base, saved(drop("proj")(towers["MNIST"])))
    with pytest.raises(ValueError, match=r"x.safetensors': tensor 'proj': expected shape \(24, 10\), got \(24, 9\)"): lazy_vectors(base, saved(towers["MNIST"] | {"proj": torch.ones(24, 9)}))
    broken = lazy_vectors(base, saved(towers["MNIST"] | {"proj": torch.full((24, 10), float("inf"))}))
    with pytest.raises(ValueError, match="x.safetensors': fine-tuned tensor 'proj' has 240 of 240"): tsv_merge(broken)


MEASURE = """
import sys, torch
from pathlib import Path
from tsv_nb import task_arithmetic, task_vector
from tsv_nb.lazy import TorchFile
from tsv_nb.vision.checkpoints import lazy_vectors, load_tower
TorchFile.keep = 2**21 # for towers this small
def peak(): return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
how, base, *paths = sys.argv[1:]
Path("/proc/self/clear_refs").write_text("5")
start = peak()
if how == "lazy": vectors = lazy_vectors(base, dict(enumerate(paths)))
else: vectors = [task_vector(load_tower(base), load_tower(p)) for p in paths]
norm = sum(float(v.double().square().sum()) for v in task_arithmetic(vectors).values())
print(peak() - start, norm)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured as Linux reports it")
def test_towers_stay_on_disk(tmp_path):
    "Thirteen towers of 16 MiB: lazily, little more than the result and a few entries of 2."
    paths = [tmp_path / f"{i}.pt" for i in range(13)]
    for i, path in enumerate(paths):
        state = {"conv1.weight": torch.ones(4)} | {f"transformer.resblocks.{j}.mlp.c_fc.weight": torch.full((512, 1024), float(i + j)) for j in range(8)}
        torch.save({f"model.visual.{k}": v for k, v in state.items()} | {"model.token_embedding.weight": torch.ones(1024, 1024)}, path)
    results = {how: subprocess.run([sys.executable, "-c", MEASURE, how, *map(str, paths)], capture_output=True, text=True, check=True).stdout.split() for how in ("lazy", "eager")}
    assert results["lazy"][1] == results["eager"][1]
    lazy, eager = (float(results[how][0]) for how in ("lazy", "eager"))
    assert eager > 12 * 16 and lazy < 6 * 16, (lazy, eager)


def test_importing_needs_no_heavy_package():
    code = "import sys, tsv_nb.vision.checkpoints; print([m for m in ('transformers', 'open_clip', 'torchvision', 'datasets', 'scipy', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    assert set(checkpoints.__all__) >= {"load_tower", "hf_to_open_clip", "open_clip_to_hf", "find_checkpoints", "checkpoint_path", "lazy_vectors", "convert_tower"}
