"""LoRA adapters: the core against the dense route of Part I over a grid, against PEFT itself on small models, and every malformed folder that we could think of."""
import json
import logging
import os
import re
import uuid
import warnings
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from tsv_nb.checks import StateDictKeyError
from tsv_nb.compress import CompressedTaskVector, compress
from tsv_nb.interference import interference_by_layer
from tsv_nb.merge import tsv_merge
from tsv_nb.scale import lora_config
from tsv_nb.scale.checkpoints import open_checkpoint
from tsv_nb.scale.lora import Adapter, LoraLayer, product_svd, read_adapter
from tsv_nb.scale.lora_archives import compress_lora, extract_lora, module_kinds
from tsv_nb.scale.lora_base import apply_lora, names_in_base, save_applied
from tsv_nb.scale.lora_command import tsv_lora
from tsv_nb.scale.lora_config import lora_scaling
from tsv_nb.scale.lora_files import adapter_config, save_adapter
from tsv_nb.scale.lora_merge import lora_interference, lora_merge, lora_plan, named_adapters
from tsv_nb.scale.tables import size_text
from tsv_nb.scale.tensor_work import WORK

SHAPES = {"tall": (40, 24), "wide": (20, 64), "square": (32, 32), "row": (12, 200)}
FACTS = dict(base_model_name_or_path="tiny")


def error(a, b): return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


def make_layer(g, shape, r, dtype=torch.float32, kind="linear", scaling=1.5, kernel=()):
    return LoraLayer(torch.randn(shape[0], r, generator=g).to(dtype), (torch.randn(r, shape[1], generator=g) / 8).to(dtype), scaling, kind, kernel)


def make_tasks(g, n_tasks, ranks, dtype=torch.float32, shapes=SHAPES):
    "Adapters with ranks that differ between tasks and weights; each but the first lacks one weight."
    tasks = {}
    for t in range(n_tasks):
        names = [n for i, n in enumerate(shapes) if not (t and i == t % len(shapes))]
        tasks[f"task{t}"] = Adapter({f"{n}.weight": make_layer(g, shapes[n], ranks[(t + i) % len(ranks)], dtype, scaling=.5 + t) for i, n in enumerate(names)}, config=FACTS)
    return tasks


def densified(tasks):
    "Dense task vectors in float64, with zeros for weights that a task lacks."
    every = {n: a.layers[n].matrix_shape for a in tasks.values() for n in a.layers}
    return {t: {n: a.layers[n].scaling * a.layers[n].left.double() @ a.layers[n].right.double() if n in a.layers else torch.zeros(s, dtype=torch.float64) for n, s in every.items()} for t, a in tasks.items()}


# The core against the dense route

@pytest.mark.parametrize("n_tasks,ranks,dtype", list(product((1, 2, 3, 5), ((1,), (4,), (2, 7, 16)), (torch.float32, torch.float64, torch.bfloat16, torch.float16))))
def test_merge_equals_the_dense_one(n_tasks, ranks, dtype, g):
    tasks = make_tasks(g, n_tasks, ranks, dtype)
    vectors = densified(tasks) # bfloat16 factors are exact numbers: their product in float64 is what the core sees
    for rank, method in ((None, "auto"), (2, "svd"), ("full", "auto"), (None, None)):
        ours, dense = lora_merge(tasks, rank, method), tsv_merge(vectors, rank, method, exclude=())
        assert list(ours.layers) == list(ours) and set(ours) == set(dense)
        for name in dense: assert error(ours[name], dense[name]) < 1e-5, (name, rank, method)
        for name, x in ours.layers.items(): assert x.rank == sum(ours.report[name]["rank"].values()) <= sum(ranks) * n_tasks


def test_merge_in_float32_equals_the_dense_one_in_float32(g):
    tasks = make_tasks(g, 3, (4, 6))
    vectors = {t: {n: v.float() for n, v in vector.items()} for t, vector in densified(tasks).items()}
    ours, dense = lora_merge(tasks), tsv_merge(vectors, exclude=())
    assert max(error(ours[n], dense[n]) for n in dense) < 1e-5


@pytest.mark.parametrize("norm", ("entrywise", "nuclear", "operator"))
@pytest.mark.parametrize("n_tasks,rank", ((1, None), (2, None), (4, 3), (5, None)))
def test_interference_equals_the_dense_one(n_tasks, rank, norm, g):
    tasks = make_tasks(g, n_tasks, (4, 9))
    ours, dense = lora_interference(tasks, rank, norm), interference_by_layer(densified(tasks), rank, norm, exclude=())
    assert ours.keys() == dense.keys()
    for name in ours: assert ours[name] == pytest.approx(dense[name], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("rank", (None, 1, 3, 100))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_compress_equals_the_dense_one(rank, dtype, g):
    task = next(iter(make_tasks(g, 1, (4, 6), dtype).values()))
    ours, vector = compress_lora(task, rank).decompress(), densified({"a": task})["a"]
    for name in vector:
        want = compress({name: vector[name].float()}, rank or 16, exclude=()).decompress()[name]
        assert error(ours[name], want) < 1e-5


@pytest.mark.parametrize("m,n,r", ((1, 1, 1), (5, 3, 8), (3, 5, 8), (300, 2, 1), (64, 64, 64)))
def test_svd_of_a_product(m, n, r, g):
    left, right = torch.randn(m, r, generator=g), torch.randn(r, n, generator=g)
    f, whole = product_svd(left, right, -2.), -2. * left.double() @ right.double()
    assert error((f.U * f.S) @ f.Vh, whole) < 1e-12 and f.rank == min(m, n, r)
    assert error(f.U.mT @ f.U, torch.eye(f.rank)) < 1e-12 and (f.S[:-1] >= f.S[1:]).all() and (f.S > 0).all()


def test_components_below_the_noise_of_float32_are_kept_by_the_core(g):
    "5e-5 of the largest is under max(m, n) eps of a 2048-wide float32 matrix, and above r eps of the core."
    U, V = (torch.linalg.qr(torch.randn(d, 2, generator=g, dtype=torch.float64)).Q for d in (2048, 40))
    layer = LoraLayer((U * torch.tensor([1., 5e-5])).float(), V.mT.float())
    assert layer.factors().rank == 2 and product_svd(layer.left * torch.tensor([1., 1e-4]), layer.right).rank == 1
    assert error(lora_merge([Adapter({"w": layer})])["w"], layer.delta()) < 1e-6


def test_one_task_and_weights(g):
    one = make_tasks(g, 1, (4,))
    for name, delta in lora_merge(one).items(): assert error(delta, one["task0"][name]) < 1e-6
    for name, delta in lora_merge(one, weights=[-.5]).items(): assert error(delta, -.5 * one["task0"][name]) < 1e-6
    two = make_tasks(g, 2, (4,))
    ours, dense = lora_merge(two, weights={"task1": -2., "task0": .5}), tsv_merge(densified(two), weights=[.5, -2.], exclude=())
    assert max(error(ours[n], dense[n]) for n in dense) < 1e-5


def test_same_result_for_other_factors_of_the_same_adapter(g):
    tasks, Q = make_tasks(g, 3, (4,)), torch.linalg.inv(torch.randn(4, 4, generator=g))
    other = {t: Adapter({n: x._replace(left=x.left @ torch.linalg.inv(Q), right=Q @ x.right) for n, x in a.layers.items()}, config=FACTS) for t, a in tasks.items()}
    ours, theirs = lora_merge(tasks), lora_merge(other)
    assert max(error(ours[n], theirs[n]) for n in ours) < 1e-5


def test_transposed_layouts_give_the_transposed_result(g):
    tasks = make_tasks(g, 3, (4,))
    turned = {t: Adapter({n: LoraLayer(x.right.mT, x.left.mT, x.scaling, "transposed") for n, x in a.layers.items()}, config=FACTS) for t, a in tasks.items()}
    ours, theirs = lora_merge(tasks), lora_merge(turned)
    assert max(error(ours[n], theirs[n].mT) for n in ours) < 1e-5


def test_inputs_are_untouched_and_order_does_not_matter(g):
    tasks = make_tasks(g, 3, (4, 6))
    before = {(t, n): (x.left.clone(), x.right.clone()) for t, a in tasks.items() for n, x in a.layers.items()}
    first, again = lora_merge(tasks), lora_merge(dict(reversed(tasks.items())))
    for (t, n), (left, right) in before.items(): assert tasks[t].layers[n].left.equal(left) and tasks[t].layers[n].right.equal(right)
    for n in first: assert error(again[n], first[n]) < 1e-5


def test_zero_and_missing_weights(g):
    live, dead = make_layer(g, (20, 16), 4), LoraLayer(torch.zeros(20, 4), torch.randn(4, 16, generator=g))
    merged = lora_merge({"a": Adapter({"w": live, "x": dead}), "b": Adapter({"w": dead}), "c": Adapter({"y": live})})
    assert error(merged["w"], live.delta()) < 1e-6 and not merged["x"].any() and error(merged["y"], live.delta()) < 1e-6
    assert merged.report["w"]["rank"] == {"a": 4, "b": 0, "c": 0} and merged.report["w"]["without"] == ["c"] and merged.report["x"]["how"] == "zero"
    assert lora_interference({"a": Adapter({"w": dead}), "b": Adapter({"w": dead})}) == {"w": 0}


def test_weights_that_are_too_small_for_their_tasks(g):
    tasks = {str(t): Adapter({"w": make_layer(g, (2, 30), 2)}) for t in range(3)}
    with pytest.raises(ValueError, match="3 tasks x 1 components do not fit"): lora_merge(tasks)
    merged = lora_merge(tasks, small="average")
    assert error(merged["w"], sum(a["w"] for a in tasks.values()) / 3) < 1e-6 and merged.report["w"]["how"] == "average"
    assert lora_plan(tasks, small="average")["w"].how == "average"
    for bad in (0, -1, 1.5): 
        with pytest.raises(ValueError, match="rank must be at least 1"): lora_merge(tasks, bad)
    with pytest.raises(ValueError, match="unknown orthogonalize method"): lora_merge(tasks, orthogonalize="qr", small="average")


def test_whole_weights_are_averaged_over_all_tasks(g):
    base = {"head": torch.full((3,), 10.)}
    def task(head=None): return Adapter({"w": make_layer(g, (8, 8), 1)}, saved={} if head is None else {"head": torch.full((3,), head)})
    assert lora_merge([task(1.), task(3.)]).saved["head"].tolist() == [2.] * 3
    assert lora_merge([task(1.), task()], base=base).saved["head"].tolist() == [5.5] * 3
    assert lora_merge([task(1.), task(3.)], weights=[2., 2.], base=base).saved["head"].tolist() == [-6.] * 3 # 10 + (2 * -9 + 2 * -7) / 2
    with pytest.raises(ValueError, match="saved by 1 of 2 tasks"): lora_merge([task(1.), task()])
    with pytest.raises(ValueError, match="different shapes"): lora_merge([task(1.), Adapter({}, saved={"head": torch.ones(4)})])
    assert lora_merge([task(1.), task()], heads="drop").saved == {}


def test_a_module_that_is_adapted_here_and_saved_whole_there_is_refused(g, tmp_path):
    layer, base = make_layer(g, (8, 8), 1), {"h.weight": torch.zeros(8, 8)}
    tasks = {"a": Adapter({"h.weight": layer}), "b": Adapter({"q.weight": layer}, saved={"h.weight": torch.ones(8, 8)})}
    for pair in (tasks, dict(reversed(tasks.items()))):
        with pytest.raises(ValueError, match="module 'h' is adapted by LoRA in 'a' and saved whole in 'b'"): lora_merge(pair, base=base)
        merged = lora_merge(pair, heads="drop")
        assert set(merged) == {"h.weight", "q.weight"} and not merged.saved
    folders = [str(save_adapter(a, tmp_path / t)) for t, a in tasks.items()]
    for argv in (["--plan"], ["--out", str(tmp_path / "c")]):
        with pytest.raises(SystemExit, match="module 'h' .*--heads drop"): tsv_lora([*folders, *argv])
    tsv_lora([*folders, "--plan", "--heads", "drop"])
    with_bias = {"a": Adapter({"h.weight": layer}, biases={"h.bias": torch.ones(8)}), "b": Adapter({"q.weight": layer}, saved={"h.bias": torch.ones(8)})}
    with pytest.raises(ValueError, match="'h.bias'"): lora_merge(with_bias)
    other = Adapter({"h.weight": layer}, saved={"h.weight": torch.ones(8, 8)}) # as a merge of the two would be
    with pytest.raises(ValueError, match="another weight 'h.weight' than the base has"): compress_lora(other, base=base)


# Files

def test_scaling_by_the_rules_of_peft():
    other = pytest.importorskip("peft.utils.other")
    config = dict(r=8, lora_alpha=16, rank_pattern={"q": 4, r"h\.[01]\..*": 2, "a.b": 6}, alpha_pattern={"^h.0.k": 3, "k|v": 5}, use_rslora=False)
    for module in ("q", "x.q", "xq", "h.0.q", "h.0.k", "x.h.0.k", "h.1.v", "h.2.v", "h.10.k", "a.b", "a-b", "x.a.b", "v.k"):
        r = config["rank_pattern"].get(other.get_pattern_key(config["rank_pattern"].keys(), module), 8)
        alpha = config["alpha_pattern"].get(other.get_pattern_key(config["alpha_pattern"].keys(), module), 16)
        assert lora_scaling(config, module) == (r, alpha / r), module


@pytest.mark.parametrize("dtype", (None, torch.bfloat16, torch.float16))
def test_written_and_read_again(dtype, g, tmp_path):
    kinds = {"lin": make_layer(g, (8, 6), 2), "c1d": make_layer(g, (6, 8), 3, kind="transposed"), "emb": make_layer(g, (30, 8), 2, kind="embedding", scaling=.25), "conv": make_layer(g, (8, 3 * 6), 5, kind="conv", kernel=(2, 3))}
    for kind in ("transposed", "linear"): # one flag for all: in its own folder
        chosen = {f"m.{n}.weight": x for n, x in kinds.items() if x.kind in (kind, "embedding", "conv")}
        a = Adapter(chosen, saved={"head.weight": torch.ones(2, 3), "m.conv.bias": torch.ones(8)}, config=FACTS | dict(modules_to_save=["head"]))
        b = read_adapter(save_adapter(a, tmp_path / kind, dtype))
        assert {n: (x.kind, x.weight_shape, x.rank) for n, x in b.layers.items()} == {n: (x.kind, x.weight_shape, x.rank) for n, x in a.layers.items()}
        for n in a: assert error(b[n], a[n]) < (1e-6 if dtype is None else .01 if dtype == torch.bfloat16 else 2e-3)
        assert b.saved["m.conv.bias"].equal(torch.ones(8)) and b.config["base_model_name_or_path"] == "tiny" and b.config["modules_to_save"] == ["head"]


def test_no_half_written_folder(g, tmp_path, monkeypatch):
    a = Adapter({"w.weight": make_layer(g, (8, 6), 2)})
    save_adapter(a, tmp_path / "a")
    with pytest.raises(ValueError, match="exists; choose another name, or overwrite it"): save_adapter(a, tmp_path / "a")
    (tmp_path / "mine").mkdir(); (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="is no adapter"): save_adapter(a, tmp_path / "mine", overwrite=True)
    with pytest.raises(ValueError, match="NaN or infinite"): save_adapter(Adapter({"w.weight": LoraLayer(torch.full((8, 2), 1e6), torch.ones(2, 6))}), tmp_path / "b", torch.float16)
    def full(*args, **kwargs): raise OSError(28, "No space left on device")
    monkeypatch.setattr("tsv_nb.scale.lora_files.save_atomic", full)
    with pytest.raises(OSError): save_adapter(a, tmp_path / "a", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "mine"] and read_adapter(tmp_path / "a")["w.weight"].shape == (8, 6)


def test_an_adapter_that_is_replaced_is_not_lost(g, tmp_path, monkeypatch):
    "The second of two renames fails, or a file of somebody's is in the folder."
    a, b, rename = (*(Adapter({"w.weight": make_layer(g, (8, 6), r)}) for r in (2, 3)), os.replace)
    save_adapter(a, tmp_path / "a")
    def failing(source, target):
        if str(source).endswith(".tmp") and target == tmp_path / "a": raise OSError(5, "Input/output error")
        rename(source, target)
    with monkeypatch.context() as m:
        m.setattr("os.replace", failing)
        with pytest.raises(OSError, match="Input/output"): save_adapter(b, tmp_path / "a", overwrite=True)
    assert read_adapter(tmp_path / "a").layers["w.weight"].rank == 2 and [p.name for p in tmp_path.iterdir()] == ["a"]
    (tmp_path / "a" / "thesis.md").write_text("years of work")
    with pytest.raises(ValueError, match="'thesis.md' would be lost"): save_adapter(b, tmp_path / "a", overwrite=True)
    (tmp_path / "a" / "thesis.md").unlink()
    assert read_adapter(save_adapter(b, tmp_path / "a", overwrite=True)).layers["w.weight"].rank == 3 and [p.name for p in tmp_path.iterdir()] == ["a"]


def folder_with(path, config=None, tensors=None, text=None, name="adapter_model.safetensors"):
    "An adapter folder with one linear layer, changed as wanted."
    path.mkdir(exist_ok=True)
    config = dict(peft_type="LORA", r=2, lora_alpha=4, base_model_name_or_path="tiny") | (config or {})
    (path / "adapter_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}) if text is None else text)
    whole = {"base_model.model.h.q.lora_A.weight": torch.ones(2, 6), "base_model.model.h.q.lora_B.weight": torch.ones(8, 2)} | (tensors or {})
    save_file({k: v for k, v in whole.items() if v is not None}, path / name)
    return path


A, B = "base_model.model.h.q.lora_A.weight", "base_model.model.h.q.lora_B.weight"
BAD_CONFIGS = [(dict(peft_type="IA3"), "peft_type is 'IA3'"), (dict(peft_type=...), "peft_type is None"), (dict(use_dora=True), "use_dora = True is not supported"), (dict(alora_invocation_tokens=[1]), "alora_invocation_tokens"),
    (dict(layer_replication=[[0, 1]]), "layer_replication"), (dict(target_parameters=["x"]), "target_parameters"), (dict(trainable_token_indices=[3]), "trainable_token_indices"), (dict(use_qalora=True), "use_qalora"),
    (dict(init_lora_weights="pissa_niter_4"), "changed the base weights"), (dict(init_lora_weights="olora"), "changed the base weights"), (dict(something_new=1), "unknown option something_new"), (dict(r=...), "r = None"),
    (dict(r=0), "r = 0"), (dict(r=-2), "r = -2"), (dict(r="8"), "r = '8'"), (dict(r=2.5), "r = 2.5"), (dict(r=True), "r = True"), (dict(lora_alpha="x"), "lora_alpha = 'x'"), (dict(lora_alpha=float("inf")), "lora_alpha = inf"),
    (dict(rank_pattern={"q": 0}), "q = 0"), (dict(rank_pattern=[3]), "rank_pattern must map"), (dict(alpha_pattern={"(": 2}), "no regular expression"), (dict(rank_pattern={"q": 4}), "do not fit rank 4"), (dict(r=4), "do not fit rank 4")]


@pytest.mark.parametrize("config,message", BAD_CONFIGS, ids=[str(c)[:40] for c, _ in BAD_CONFIGS])
def test_bad_configurations_are_named(config, message, tmp_path):
    with pytest.raises(ValueError) as e: read_adapter(folder_with(tmp_path / "a", config))
    assert message in str(e.value) and str(tmp_path / "a") in str(e.value)


BAD_TENSORS = [({A: None}, "'h.q' has no lora_A"), ({B: None}, "'h.q' has no lora_B"), ({A: torch.ones(3, 6)}, "do not fit rank 2"), ({B: torch.ones(8, 2, 1)}, "do not fit rank 2"), ({A: torch.tensor([[1., float("nan")]] * 2)}, "NaN"),
    ({B: torch.full((8, 2), float("inf"))}, "infinite"), ({A: torch.ones(2, 6).to(torch.int8)}, "dequantize"), ({B: torch.ones(8, 2).to(torch.float8_e4m3fn)}, "lora_B.weight' is torch.float8_e4m3fn"), ({"base_model.model.head.weight": torch.ones(2).to(torch.float8_e5m2)}, "dequantize"), ({A.replace("A.weight", "magnitude_vector"): torch.ones(8)}, "is no factor of a LoRA"),
    ({A.replace("A.weight", "A.default.weight"): torch.ones(2, 6)}, "is no factor of a LoRA"), ({A: None, B: None, "base_model.model.head.weight": torch.ones(2)}, "holds no LoRA factors"),
    ({A.replace("q.", "c."): torch.ones(2, 4, 3, 3), B.replace("q.", "c."): torch.ones(8, 1, 1, 1)}, "convolution with groups"), ({A.replace("q.", "c."): torch.ones(2, 4, 3, 3), B.replace("q.", "c."): torch.ones(8, 2, 3, 3)}, "do not fit rank 2"),
    ({A.replace("q.", "q.base_layer.out_proj."): torch.ones(2, 6), B.replace("q.", "q.base_layer.out_proj."): torch.ones(8, 2)}, "MultiheadAttention"), ({A: torch.ones(2)}, "do not fit rank 2")]


@pytest.mark.parametrize("tensors,message", BAD_TENSORS, ids=[m for _, m in BAD_TENSORS])
def test_bad_tensors_are_named(tensors, message, tmp_path):
    with pytest.raises(ValueError) as e: read_adapter(folder_with(tmp_path / "a", tensors=tensors))
    assert message in str(e.value) and str(tmp_path / "a") in str(e.value)


@pytest.mark.parametrize("text,message", (("", "no JSON"), ("{", "no JSON"), ("[1]", "holds a list"), ("null", "holds a NoneType"), ("[" * 10**5, "no JSON"), ('{"r": 1e999, "peft_type": "LORA"}', "r = inf")))
def test_broken_json_is_named(text, message, tmp_path):
    with pytest.raises(ValueError, match=message): read_adapter(folder_with(tmp_path / "a", text=text))


def test_broken_files_are_named(tmp_path):
    path = folder_with(tmp_path / "a")
    assert read_adapter(path)["h.q.weight"].unique().tolist() == [4.]
    (path / "adapter_config.json").write_bytes(b'{"r": "\xff"}')
    with pytest.raises(ValueError, match="no JSON"): read_adapter(path)
    weights = folder_with(path) / "adapter_model.safetensors"
    data = weights.read_bytes()
    for broken in (b"", data[:100], data[:-8]):
        weights.write_bytes(broken)
        with pytest.raises(ValueError, match="damaged"): read_adapter(path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="no adapter_model.safetensors"): read_adapter(path)
    (path / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="adapter_config.json is not there"): read_adapter(path)
    with pytest.raises(FileNotFoundError): read_adapter(tmp_path / "nowhere")


class Trap:
    def __init__(self, path): self.path = path
    def __reduce__(self): return open, (self.path, "w")


def test_pickles_are_read_and_never_run(tmp_path):
    path = folder_with(tmp_path / "a")
    tensors = load_file(path / "adapter_model.safetensors")
    (path / "adapter_model.safetensors").unlink()
    torch.save(tensors, path / "adapter_model.bin")
    assert read_adapter(path)["h.q.weight"].unique().tolist() == [4.]
    torch.save(tensors | {"trap": Trap(str(tmp_path / "ran"))}, path / "adapter_model.bin")
    with pytest.raises(ValueError, match="refused"): read_adapter(path)
    assert not (tmp_path / "ran").exists()


def test_weights_are_read_by_the_reader_of_checkpoints(tmp_path, monkeypatch):
    "It never calls torch.load, and refuses bytes in which no tensor lies."
    path = folder_with(tmp_path / "a")
    weights = path / "adapter_model.safetensors"
    tensors, data = load_file(weights), weights.read_bytes()
    weights.write_bytes(data + b"12345678")
    with pytest.raises(ValueError, match=re.escape(str(weights))): read_adapter(path)
    weights.unlink()
    def never(*args, **kwargs): raise AssertionError("torch.load was called")
    for old in (False, True):
        torch.save(tensors, path / "adapter_model.bin", _use_new_zipfile_serialization=not old)
        with monkeypatch.context() as m: m.setattr(torch, "load", never); assert read_adapter(path)["h.q.weight"].unique().tolist() == [4.]


def test_adapters_that_do_not_belong_together(tmp_path):
    a, b = folder_with(tmp_path / "a"), folder_with(tmp_path / "b", dict(base_model_name_or_path="other"))
    with pytest.raises(ValueError, match="name different bases"): lora_merge([a, b])
    assert list(lora_merge([a, b], any_base=True).report["h.q.weight"]["rank"]) == ["a", "b"]
    c = folder_with(tmp_path / "c", tensors={A: torch.ones(2, 7)})
    with pytest.raises(ValueError, match=r"linear \(8, 6\) in 'a' and linear \(8, 7\) in 'c'"): lora_merge([a, c])
    d = folder_with(tmp_path / "d", dict(fan_in_fan_out=True))
    with pytest.raises(ValueError, match="fan_in_fan_out is wrong in one of them"): lora_merge([a, d])
    with pytest.raises(ValueError, match="no adapter given"): lora_merge([])
    (tmp_path / "x").mkdir()
    assert list(named_adapters([a, folder_with(tmp_path / "x" / "a")])) == [str(a), str(tmp_path / "x" / "a")]


# Onto a base

def test_layouts_are_told_by_the_base(g):
    x, s = make_layer(g, (8, 6), 2), make_layer(g, (6, 6), 2)
    base = {"x.weight": torch.zeros(6, 8), "s.weight": torch.zeros(6, 6)} # as Conv1D stores them, whatever the flag says
    assert error(dict(apply_lora(base | {"s.weight": torch.zeros(1)}, Adapter({"x.weight": x})))["x.weight"], x.delta().mT) < 1e-6
    with pytest.raises(ValueError, match="square weights such as 's.weight' cannot be known"): apply_lora(base, Adapter({"x.weight": x, "s.weight": s}))
    for flag, want in ((True, s.delta().mT), (False, s.delta())): assert error(dict(apply_lora(base, Adapter({"x.weight": x, "s.weight": s}), fan_in_fan_out=flag))["s.weight"], want) < 1e-6
    with pytest.raises(ValueError, match="trained on another model"): apply_lora({"x.weight": torch.zeros(6, 9)}, Adapter({"x.weight": x}))
    with pytest.raises(StateDictKeyError, match="trained on another model"): apply_lora(base, Adapter({"y.weight": x}))


def test_names_with_a_prefix_more_or_less():
    assert names_in_base({"a.b": 0, "c.b": 0}, ["a.b"]) == {"a.b": "a.b"}
    assert names_in_base({"model.a": 0, "model.b": 0}, ["a", "b"]) == {"a": "model.a", "b": "model.b"}
    assert names_in_base({"a": 0, "b": 0}, ["model.a", "model.b"]) == {"model.a": "a", "model.b": "b"}
    with pytest.raises(StateDictKeyError): names_in_base({"model.a": 0, "b": 0}, ["a", "b"])
    assert names_in_base({"a": 0}, []) == {}


class OneAtATime(dict):
    "A base that counts what is read, and has headers."
    def __init__(self, tensors): super().__init__(tensors); self.reads = []
    def header(self, name): return super().__getitem__(name)
    def __getitem__(self, name): self.reads.append(name); return super().__getitem__(name)


def test_a_base_is_read_one_tensor_at_a_time(g, tmp_path):
    tensors = {f"h.{i}.weight": torch.randn(16, 16, generator=g).to(torch.bfloat16) for i in range(5)} | {"step": torch.tensor(3), "half": torch.ones(3).half(), "flag": torch.tensor([True])}
    base, adapter = OneAtATime(tensors), Adapter({"h.2.weight": make_layer(g, (16, 16), 2)})
    steps = apply_lora(base, adapter)
    assert base.reads == []
    for i, (name, value) in enumerate(steps): assert base.reads[i:] == [name] and value.dtype == tensors[name].dtype
    save_file(tensors, tmp_path / "base.safetensors")
    base, reads = open_checkpoint(tmp_path / "base.safetensors"), []
    read = base.readers[0].read
    base.readers[0].read = lambda name: reads.append(name) or read(name)
    save_applied(base, adapter, tmp_path / "m.safetensors")
    written = load_file(tmp_path / "m.safetensors")
    assert written.keys() == tensors.keys() and sorted(reads) == sorted(tensors)
    for name in tensors: assert written[name].equal((tensors[name].float() + adapter["h.2.weight"]).bfloat16() if name == "h.2.weight" else tensors[name])
    save_applied(tensors, adapter, tmp_path / "m", shard_bytes=1100) # a dict is as good
    shards = sorted(p.name for p in (tmp_path / "m").iterdir())
    assert len(shards) == 5 and shards[-2:] == ["model.safetensors.index.json", "tsv_report.json"]
    for name, file in json.loads((tmp_path / "m" / shards[-2]).read_text())["weight_map"].items(): assert load_file(tmp_path / "m" / file)[name].equal(written[name])
    with pytest.raises(ValueError, match="exists; .*--overwrite"): save_applied(base, adapter, tmp_path / "m")
    save_applied(base, adapter, tmp_path / "m", alpha=0., overwrite=True)
    assert load_file(tmp_path / "m" / "model.safetensors")["h.2.weight"].equal(tensors["h.2.weight"])
    def broken(name): raise OSError(5, "Input/output error")
    base.readers[0].read = broken
    with pytest.raises(OSError): save_applied(base, adapter, tmp_path / "n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.safetensors", "m", "m.report.json", "m.safetensors", "n.partial"]
    save_applied(tmp_path / "base.safetensors", adapter, tmp_path / "n")
    assert not (tmp_path / "n.partial").exists() and load_file(tmp_path / "n" / "model.safetensors")["h.2.weight"].equal(written["h.2.weight"])


@pytest.mark.parametrize("kind", [str, Path])
def test_outputs_are_not_written_to_an_address(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    adapter = Adapter({"w": LoraLayer(torch.ones(8, 2), torch.ones(2, 6), 1.)})
    for save in (lambda out: save_adapter(adapter, out), lambda out: save_applied({"w": torch.ones(8, 6)}, adapter, out)):
        for out in ("memory://bucket/x", "s3://bucket/x.safetensors"):
            with pytest.raises(ValueError, match="is an address, and outputs are written to this machine's disks"): save(kind(out))
    assert not list(tmp_path.iterdir())


def test_an_ambiguous_prefix_is_not_guessed():
    both = {f"{p}.encoder.layers.0.q.weight": 0 for p in ("vision_model", "text_model")}
    with pytest.raises(ValueError, match="may be 'text_model.encoder.layers.0.q.weight' or 'vision_model.encoder.layers.0.q.weight'"): names_in_base(both, ["encoder.layers.0.q.weight"])
    with pytest.raises(ValueError, match="may be 'h.w' or 'x.model.h.w'"): names_in_base({"h.w": 0, "x.model.h.w": 0}, ["model.h.w"]) # one less, or one more
    assert names_in_base(both | {"encoder.layers.0.q.weight": 0}, ["encoder.layers.0.q.weight"]) == {"encoder.layers.0.q.weight": "encoder.layers.0.q.weight"}
    assert names_in_base(both | {"text_model.norm": 0}, ["encoder.layers.0.q.weight", "norm"])["norm"] == "text_model.norm" # only one has all


BAD_BASES = [(torch.full((8, 6), 6e4).half(), "do not fit into torch.float16"), (torch.full((8, 6), float("nan")), "48 of 48 values that are NaN"), (torch.ones(8, 6).to(torch.int8), "is int8"), (torch.ones(8, 6).to(torch.float8_e4m3fn), "quantized")]


@pytest.mark.parametrize("weight,message", BAD_BASES, ids=[m for _, m in BAD_BASES])
@pytest.mark.parametrize("name", ("w", "w.weight"))
def test_a_base_to_which_nothing_can_be_added(name, weight, message, tmp_path):
    adapter = Adapter({name: LoraLayer(torch.ones(8, 1) * 1e4, torch.ones(1, 6))})
    save_file({name: weight}, tmp_path / "base.safetensors")
    for i, base in enumerate(({name: weight}, open_checkpoint(tmp_path / "base.safetensors"))):
        with pytest.raises(ValueError, match=f"'{name}'.*{message}"): save_applied(base, adapter, tmp_path / f"out{i}")
        with pytest.raises(ValueError, match=f"'{name}'.*{message}"): dict(apply_lora(base, adapter))
    assert not list(tmp_path.glob("out?"))
    if not weight.is_floating_point(): save_applied({"w": weight, "v": torch.zeros(8, 6)}, Adapter({"v": adapter.layers[name]}), tmp_path / "out") # numbers that it does not change


def test_weights_that_are_tied_in_the_base(g, tmp_path):
    wte, layer = torch.randn(12, 8, generator=g), make_layer(g, (12, 8), 2)
    torch.save({"wte.weight": wte, "w": torch.ones(3), "lm.weight": wte}, tmp_path / "base.bin")
    base = open_checkpoint(tmp_path / "base.bin")
    for name in ("wte.weight", "lm.weight"):
        adapter = Adapter({name: layer})
        want = wte + layer.delta()
        assert {n: error(t, want) < 1e-6 for n, t in apply_lora(base, adapter) if n != "w"} == {"wte.weight": True, "lm.weight": True}
        written = load_file(save_applied(base, adapter, tmp_path / f"{name}.safetensors"))
        assert set(written) == {"wte.weight", "w"} and error(written["wte.weight"], want) < 1e-6
    with pytest.raises(ValueError, match="'wte.weight' and 'lm.weight' are one weight in the base"): save_applied(base, Adapter({"wte.weight": layer, "lm.weight": layer}), tmp_path / "out")


def test_whole_weights_and_every_type_are_written_as_they_are(g, tmp_path):
    base = {"flag": torch.tensor([True]), "head": torch.randn(3, 5, generator=g).bfloat16(), "n": torch.tensor(3), "u": torch.arange(3).to(torch.uint16), "w": torch.randn(8, 6, generator=g), "x": torch.randn(2, generator=g).double()}
    head = torch.randn(3, 5, generator=g).bfloat16()
    save_applied(base, Adapter({"w": make_layer(g, (8, 6), 2)}, saved={"head": head, "n": torch.tensor(7)}), tmp_path / "out.safetensors")
    data, written = (tmp_path / "out.safetensors").read_bytes(), load_file(tmp_path / "out.safetensors")
    assert written["head"].equal(head) and written["n"] == 7 and all(written[n].equal(base[n]) for n in ("flag", "u", "x"))
    heads = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])
    assert all(heads[n]["data_offsets"][0] % t.itemsize == 0 for n, t in base.items()) # aligned


def test_a_base_at_an_address(g, tmp_path):
    fs, name = pytest.importorskip("fsspec").filesystem("memory"), f"/{uuid.uuid4().hex}"
    save_file({"w": torch.zeros(8, 6)}, tmp_path / "base.safetensors")
    fs.pipe_file(f"{name}/model.safetensors", (tmp_path / "base.safetensors").read_bytes()); fs.pipe_file(f"{name}/config.json", b"{}")
    layer = make_layer(g, (8, 6), 2)
    folder = save_adapter(Adapter({"w.weight": layer}), tmp_path / "a")
    save_applied(f"memory:/{name}", Adapter({"w": layer}), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == "{}" and error(load_file(tmp_path / "out" / "model.safetensors")["w"], layer.delta()) < 1e-6
    fs.pipe_file(f"{name}/model.safetensors", save({"w.weight": torch.zeros(8, 6)}))
    tsv_lora([str(folder), "--merged", "--base", f"memory:/{name}", "--out", str(tmp_path / "whole"), "--quiet"])
    assert sorted(p.name for p in (tmp_path / "whole").iterdir()) == ["config.json", "model.safetensors", "tsv_report.json"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process that ends in the middle")
def test_a_killed_run_goes_on(g, tmp_path, monkeypatch):
    base, adapter, work = {f"w{i}": torch.randn(8, 6, generator=g) for i in range(6)}, Adapter({"w2": make_layer(g, (8, 6), 2)}), WORK["apply"]["copy"]
    monkeypatch.setattr("tsv_nb.scale.lora_base.cut_units", lambda shards, sizes: tuple((n,) for s in shards for n in s))
    if not (child := os.fork()):
        WORK["apply"]["copy"] = lambda read, planned: os._exit(9) if planned.name == "w4" else work(read, planned)
        try: save_applied(base, adapter, tmp_path / "out", shard_bytes=400)
        finally: os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9 and [p.name for p in tmp_path.iterdir()] == ["out.partial"]
    save_applied(base, adapter, tmp_path / "out", shard_bytes=400)
    assert json.loads((tmp_path / "out" / "tsv_report.json").read_text())["session"]["resumed"] == 4 and [p.name for p in tmp_path.iterdir()] == ["out"]
    written = open_checkpoint(tmp_path / "out")
    for name, want in apply_lora(base, adapter): assert written[name].equal(want)


# Archives

def test_adapter_to_archive_and_back(g, tmp_path):
    kinds = {"lin.weight": "linear", "emb.weight": "embedding", "conv.weight": "conv", "c1d.weight": "transposed"}
    shapes, kernels = {"lin.weight": (40, 30), "emb.weight": (60, 20), "conv.weight": (24, 12 * 9), "c1d.weight": (30, 50)}, {"conv.weight": (3, 3)}
    a = Adapter({n: make_layer(g, shapes[n], 3, kind=k, kernel=kernels.get(n, ())) for n, k in kinds.items()}, biases={"lin.bias": torch.randn(40, generator=g)})
    path = compress_lora(a).save(tmp_path / "a.safetensors")
    b = extract_lora(path, kinds, dense="drop")
    for n in a.layers: assert error(b[n], a[n]) < 1e-5 and b.layers[n].rank == 3 and b.layers[n].kind == kinds[n] and b.layers[n].weight_shape == a.layers[n].weight_shape
    assert b.report == {"lin.bias": {"how": "drop"}} # beside an embedding there is no lora_bias
    del a.layers["emb.weight"]
    assert error(extract_lora(compress_lora(a), kinds).biases["lin.bias"], a.biases["lin.bias"]) < 1e-6
    again = compress_lora(extract_lora(path, kinds, dense="drop"))
    for n, f in CompressedTaskVector.load(path).factors.items(): assert error(again.factors[n].S, f.S) < 1e-5
    assert all(x.rank == 2 for x in extract_lora(path, kinds, 2, dense="drop").layers.values())


def test_archive_of_a_whole_checkpoint(g):
    base = {"w": torch.randn(20, 16, generator=g).bfloat16(), "other": torch.randn(9, 7, generator=g), "norm": torch.ones(4), "step": torch.tensor(1), "head": torch.ones(2, 3)}
    a = Adapter({"w": make_layer(g, (20, 16), 2)}, saved={"head": torch.full((2, 3), 5.)})
    packed = compress_lora(a, base=base)
    tuned = packed.apply_to(base)
    assert tuned["head"].unique().tolist() == [5.] and tuned["other"].equal(base["other"]) and tuned["w"].dtype == torch.bfloat16
    assert error(tuned["w"], dict(apply_lora(base, a))["w"]) < 1e-2 and packed.factors["other"].rank == 0
    with pytest.raises(ValueError, match="pass base="): compress_lora(a)


def test_what_cannot_be_an_adapter_is_named(g):
    change = {"w": torch.randn(20, 16, generator=g), "norm": torch.ones(4)}
    with pytest.raises(ValueError, match="'w', are no weights of a layer"): extract_lora(compress(change, 2), {})
    with pytest.raises(ValueError, match="'norm', have moved and are no LoRA"): extract_lora(compress(change, 2), {"w": "linear"})
    assert extract_lora(compress(change, 2), {"w": "linear"}, base={"norm": torch.ones(4)}).saved["norm"].tolist() == [2.] * 4
    with pytest.raises(ValueError, match="nothing to make an adapter of"): extract_lora(compress({"w": torch.zeros(5, 5)}, 2), {"w": "linear"})


def test_a_base_with_other_names_and_layouts(g):
    a = Adapter({"model.w.weight": make_layer(g, (20, 16), 2)}, saved={"model.head.weight": torch.ones(2)})
    base = {"w.weight": torch.zeros(16, 20), "head.weight": torch.zeros(2)}
    tuned = compress_lora(a, base=base).apply_to(base)
    assert error(tuned["w.weight"], a["model.w.weight"].mT) < 1e-6 and tuned["head.weight"].tolist() == [1., 1.]
    with pytest.raises(StateDictKeyError, match="trained on another model"): compress_lora(a, base={"x": torch.ones(2)})


def test_merged_adapters_are_adapters(g):
    "Also where nothing has moved: rank 0 goes through everything."
    dead = LoraLayer(torch.zeros(20, 4), torch.randn(4, 16, generator=g))
    merged = lora_merge([Adapter({"w": dead, "v": make_layer(g, (9, 8), 2)}), Adapter({"w": dead})])
    assert merged.layers["w"].rank == 0 and lora_interference([merged, merged])["w"] == 0
    again = lora_merge([merged, Adapter({"w": make_layer(g, (20, 16), 3)})])
    assert again.layers["w"].rank == 3 and again.layers["v"].rank == 2 and compress_lora(merged).factors["w"].rank == 0


@pytest.mark.parametrize("rank", (0, -1, 2.5))
def test_ranks_that_cannot_be(rank, g):
    a = Adapter({"w": make_layer(g, (9, 8), 2)})
    for call in (lambda: lora_merge([a], rank), lambda: lora_interference([a], rank), lambda: compress_lora(a, rank), lambda: extract_lora(compress_lora(a), {"w": "linear"}, rank)):
        with pytest.raises(ValueError, match="rank must be at least 1"): call()


# The command

def test_the_command(g, tmp_path, capsys):
    tasks = make_tasks(g, 3, (4, 6))
    folders = [str(save_adapter(a, tmp_path / t)) for t, a in tasks.items()]
    tsv_lora([*folders, "--plan"])
    assert "no adapter on 1 of 4 weights" in capsys.readouterr().out and not (tmp_path / "out").exists()
    tsv_lora([*folders, "--interference", "--json"])
    assert json.loads(capsys.readouterr().out)["sti"].keys() == lora_interference(tasks).keys()
    tsv_lora([*folders, "--out", str(tmp_path / "out"), "--alpha", ".5", "--rank", "3", "--dtype", "bfloat16"])
    merged, written = lora_merge(tasks, 3, weights=[.5] * 3), read_adapter(tmp_path / "out")
    for n in merged: assert error(written[n], merged[n]) < .01 and written.layers[n].left.dtype == torch.bfloat16
    assert json.loads((tmp_path / "out" / "tsv_report.json").read_text()) == json.loads(json.dumps(merged.report))
    with pytest.raises(SystemExit, match="overwrite"): tsv_lora([*folders, "--out", str(tmp_path / "out")])
    tsv_lora([*folders, "--out", str(tmp_path / "out"), "--overwrite", "--orthogonalize", "none", "--quiet"])
    for n in merged: assert error(read_adapter(tmp_path / "out")[n], lora_merge(tasks, orthogonalize=None)[n]) < 1e-6
    save_file({f"{n}.weight": torch.zeros(s) for n, s in SHAPES.items()}, tmp_path / "base.safetensors")
    tsv_lora([*folders, "--merged", "--base", str(tmp_path / "base.safetensors"), "--out", str(tmp_path / "whole")])
    for n, w in load_file(tmp_path / "whole" / "model.safetensors").items(): assert error(w, lora_merge(tasks)[n]) < 1e-5
    into = [*folders, "--merged", "--base", str(tmp_path / "base.safetensors"), "--out", str(tmp_path / "whole")]
    with pytest.raises(SystemExit, match="exists; .*--overwrite"): tsv_lora(into)
    capsys.readouterr()
    tsv_lora([*into, "--overwrite", "--alpha", "2", "--json"])
    assert json.loads(capsys.readouterr().out).keys() == {f"{n}.weight" for n in SHAPES}
    for n, w in load_file(tmp_path / "whole" / "model.safetensors").items(): assert error(w, 2 * lora_merge(tasks)[n]) < 1e-5
    tsv_lora([*into, "--plan"])
    assert capsys.readouterr().out.splitlines()[-1] == f"result: a model of {size_text((tmp_path / 'base.safetensors').stat().st_size)}, with an adapter of rank 8 to 14 in it"
    for argv, message in ((["--merged", "--out", "x"], "needs the base"), (["--merged", "--base", "b", "--out", "x", "--dtype", "bfloat16"], "--dtype is that of an adapter, and with --merged a model is written, in the types of its base"), ([], "nothing to do"), (["--plan", "--heads", "cut"], "unknown value for heads"), (["--plan", "--orthogonalize", "qr"], "unknown orthogonalize method 'qr'; known: .*'none'"), (["--plan", "--rank", "9"], None)):
        if message is None: tsv_lora([*folders, *argv]); continue
        with pytest.raises(SystemExit, match=message): tsv_lora([*folders, *argv])


@pytest.mark.parametrize("options", ([], ["--dtype", "bfloat16"], ["--rank", "2"], ["--heads", "drop"]))
def test_the_plan_says_how_large_the_result_is(options, g, tmp_path, capsys):
    tasks = {t: Adapter({f"h.{n}.weight": make_layer(g, (900, 700), r) for n in "qv"} | {"h.z.weight": LoraLayer(torch.zeros(90, 2), torch.ones(2, 70))}, saved={"head": torch.ones(500, 100)}, config=FACTS) for t, r in (("a", 8), ("b", 12))}
    folders = [str(save_adapter(a, tmp_path / t)) for t, a in tasks.items()]
    tsv_lora([*folders, "--plan", *options])
    said = capsys.readouterr().out.splitlines()[-1]
    tsv_lora([*folders, "--out", str(tmp_path / "out"), *options])
    size = (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    assert re.fullmatch(rf"result: an adapter of rank 0 to {4 if '--rank' in options else 20}, (\S+ \S+)", said)[1] in (size_text(size), size_text(size - 1000)) # a header


def test_numbers_in_words(g, tmp_path, capsys):
    "One rank is no range, all is not 100.0%, and what is at least kept is rounded down."
    layer = make_layer(g, (40, 30), 4)
    folders = [str(save_adapter(Adapter({"w.weight": x}, config=FACTS), tmp_path / t)) for t, x in (("a", layer), ("b", layer._replace(right=layer.right.flip(1))))]
    tsv_lora([*folders, "--plan"]); tsv_lora([*folders, "--out", str(tmp_path / "c")])
    out = capsys.readouterr().out
    assert "result: an adapter of rank 8, " in out and "rank 8; all of the energy of every task is kept" in out
    U, V = (torch.linalg.qr(torch.randn(d, 2, generator=g)).Q for d in (40, 30))
    save_adapter(Adapter({"w.weight": LoraLayer(U * torch.tensor([1., .01]), V.mT)}, config=FACTS), tmp_path / "d") # 99.99 %
    tsv_lora([str(tmp_path / "d"), "--rank", "1", "--out", str(tmp_path / "e")])
    assert "at least 99.9% of the energy" in capsys.readouterr().out


def test_messages_name_the_options_of_the_command(g, tmp_path):
    a, b, c = (Adapter({"w.weight": make_layer(g, (9, 8), 2)}, saved=saved, config=dict(base_model_name_or_path=base)) for saved, base in (({}, "x"), ({}, "y"), ({"head": torch.ones(2)}, "x")))
    folders = {t: str(save_adapter(o, tmp_path / t)) for t, o in dict(a=a, b=b, c=c).items()}
    for pair, message in (("ab", r"any_base=True \(--any-base\)"), ("ac", r"base=… \(--base\), or heads='drop' \(--heads drop\)")):
        with pytest.raises(SystemExit, match=message): tsv_lora([*(folders[t] for t in pair), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=r"--overwrite \(overwrite=True\)"): tsv_lora([folders["a"], "--out", folders["b"]])


def test_what_is_said_after_ctrl_c(g, tmp_path, monkeypatch, capsys):
    folder = str(save_adapter(Adapter({"w.weight": make_layer(g, (9, 8), 2)}), tmp_path / "a"))
    save_file({"w.weight": torch.zeros(9, 8)}, tmp_path / "base.safetensors")
    argv = [folder, "--merged", "--base", str(tmp_path / "base.safetensors"), "--out", str(tmp_path / "out")]
    def stop(*args): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setitem(WORK["apply"], "merge", stop)
        with pytest.raises(SystemExit): tsv_lora(argv)
        assert "out.partial; the same command goes on from there" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="the input 'adapter' is another one.*--restart"): tsv_lora([*argv, "--alpha", "2"])
    tsv_lora([*argv, "--alpha", "2", "--restart"])
    assert (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


# PEFT itself

@pytest.fixture(scope="module")
def peft():
    pytest.importorskip("peft"); pytest.importorskip("transformers")
    import peft
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield peft
    logging.disable(logging.NOTSET)


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel
    return GPT2LMHeadModel(GPT2Config(vocab_size=90, n_positions=32, n_embd=32, n_layer=2, n_head=2, tie_word_embeddings=False))


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM
    return LlamaForCausalLM(LlamaConfig(vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2))


def vit():
    from transformers import ViTConfig, ViTForImageClassification
    return ViTForImageClassification(ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=4, num_labels=3))


class Convolutions(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.three, self.end = torch.nn.Conv1d(2, 6, 3, padding=1), torch.nn.Conv2d(6, 5, (1, 3)), torch.nn.Conv3d(5, 4, 2), torch.nn.Conv2d(4, 3, 1)
    def forward(self, x):
        x = self.two(self.one(x)[:, :, None]).unsqueeze(2).expand(-1, -1, 2, 2, -1)
        return self.end(self.three(x)[:, :, 0])


def inputs(name): return torch.arange(20).reshape(2, 10) if name in ("gpt2", "llama") else torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16) if name == "vit" else torch.linspace(-1, 1, 40).reshape(2, 2, 10)


MODELS = {"gpt2": (gpt2, ["c_attn", "c_proj", "wte"], ["c_attn", "c_fc"]), "llama": (llama, ["q_proj", "v_proj", "embed_tokens"], ["q_proj", "down_proj", "lm_head"]),
          "vit": (vit, ["query", "value", "q_proj", "v_proj", "projection"], ["query", "dense", "q_proj", "fc1", "projection"]), "conv": (Convolutions, ["one", "two"], ["two", "three", "end"])}


def built(name, dtype=torch.float32):
    torch.manual_seed(0)
    return MODELS[name][0]().to(dtype).eval()


def answer(model, name):
    with torch.no_grad(): out = model(inputs(name).to(next(model.parameters()).dtype) if name in ("vit", "conv") else inputs(name))
    return getattr(out, "logits", out).double()


def trained(peft, name, folder, options, which=0, dtype=torch.float32, seed=1):
    "An adapter with random numbers, by PEFT."
    model = built(name, dtype)
    found = {n.rpartition(".")[2] for n, _ in model.named_modules()}
    targets = [t for t in MODELS[name][1 + which] if t in found]
    torch.manual_seed(seed)
    options = dict(r=4, lora_alpha=8, init_lora_weights=False, target_modules=targets, fan_in_fan_out=name == "gpt2") | options
    model = peft.get_peft_model(model, peft.LoraConfig(**options))
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.requires_grad and "lora_" not in n: p.add_(.1 * torch.randn_like(p))
    model.save_pretrained(folder)
    return folder


OPTIONS = {"plain": {}, "rslora": dict(use_rslora=True, r=3), "patterns": dict(rank_pattern={r".*\.0\..*": 2, "one": 1, "two": 3}, alpha_pattern={"q_proj": 1, "c_attn": 3, "query": 2, "two": 5}),
           "bias": dict(bias="lora_only"), "all biases": dict(bias="all")}


@pytest.mark.parametrize("name,options", list(product(MODELS, OPTIONS)))
def test_one_adapter_is_what_peft_merges(peft, name, options, tmp_path):
    folder = trained(peft, name, tmp_path / "a", OPTIONS[options])
    base, theirs = built(name).state_dict(), peft.PeftModel.from_pretrained(built(name), folder).merge_and_unload().state_dict()
    for adapter in (read_adapter(folder), lora_merge([folder])):
        ours = dict(apply_lora(base, adapter))
        assert ours.keys() == theirs.keys() and any(not ours[n].equal(base[n]) for n in ours)
        for n in ours: assert error(ours[n] - base[n], theirs[n] - base[n]) < 1e-5 or error(ours[n], theirs[n]) < 1e-7, n


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rank", (None, 2))
def test_peft_loads_the_merged_adapter(peft, name, rank, tmp_path):
    folders = {t: trained(peft, name, tmp_path / t, o, which, seed=seed) for t, o, which, seed in (("a", {}, 0, 1), ("b", OPTIONS["patterns"], 1, 2), ("c", OPTIONS["rslora"], 1, 3))}
    small = "average" if name == "conv" else "raise"
    merged = lora_merge(folders, rank, small=small)
    save_adapter(merged, tmp_path / "merged")
    loaded = peft.PeftModel.from_pretrained(built(name), tmp_path / "merged").eval()
    dense = tsv_merge(densified(named_adapters(folders)), rank, small=small, exclude=())
    model = built(name)
    with torch.no_grad():
        weights = dict(model.named_parameters())
        for n, delta in dense.items(): weights[n] += delta.reshape(weights[n].shape).float()
    before, ours, theirs = answer(built(name), name), answer(loaded, name), answer(model, name)
    assert (ours - theirs).norm() < 1e-4 * (theirs - before).norm()
    plain = loaded.merge_and_unload()
    assert (answer(plain, name) - theirs).norm() < 1e-4 * (theirs - before).norm()
    assert all(p.dtype == torch.float32 for p in plain.parameters())


def test_half_precision_within_its_rounding(peft, tmp_path):
    folders = [trained(peft, "llama", tmp_path / t, {}, which, torch.bfloat16, seed) for t, which, seed in (("a", 0, 1), ("b", 1, 2))]
    for folder in folders: # PEFT keeps factors in float32 beside a bfloat16 model
        save_file({k: v.bfloat16() for k, v in load_file(folder / "adapter_model.safetensors").items()}, folder / "adapter_model.safetensors", {"format": "pt"})
    merged = lora_merge(folders)
    dense = tsv_merge(densified(named_adapters(folders)), exclude=())
    assert max(error(merged[n], dense[n]) for n in dense) < 1e-5 # the factors' numbers are exact; only what is stored is rounded
    save_adapter(merged, tmp_path / "m", torch.bfloat16)
    again = read_adapter(tmp_path / "m")
    assert 1e-4 < max(error(again[n], dense[n]) for n in dense) < 5e-3
    loaded = peft.PeftModel.from_pretrained(built("llama"), tmp_path / "m").eval()
    model = built("llama")
    with torch.no_grad():
        for n, delta in dense.items(): dict(model.named_parameters())[n].add_(delta.float())
    before, ours, theirs = answer(built("llama"), "llama"), answer(loaded, "llama"), answer(model, "llama")
    assert (ours - theirs).norm() < .02 * (theirs - before).norm()


def test_heads_and_biases_of_peft(peft, tmp_path):
    options = dict(modules_to_save=["classifier"], bias="all")
    folders = [trained(peft, "vit", tmp_path / t, options, seed=seed) for t, seed in (("a", 1), ("b", 2))]
    a, b = map(read_adapter, folders)
    assert "classifier.weight" in a.saved and any(n.endswith(".bias") and "classifier" not in n for n in a.saved)
    merged = lora_merge([a, b])
    assert error(merged.saved["classifier.weight"], (a.saved["classifier.weight"] + b.saved["classifier.weight"]) / 2) < 1e-6
    save_adapter(merged, tmp_path / "m")
    theirs = peft.PeftModel.from_pretrained(built("vit"), tmp_path / "m").merge_and_unload().state_dict()
    for n, w in apply_lora(built("vit").state_dict(), merged): assert error(w, theirs[n]) < 1e-5, n
    third = trained(peft, "vit", tmp_path / "c", {}, seed=3)
    base = built("vit").state_dict()
    with pytest.raises(ValueError, match="saved by 2 of 3 tasks"): lora_merge([*folders, third])
    mixed = lora_merge([*folders, third], base=base)
    assert error(mixed.saved["classifier.weight"], (a.saved["classifier.weight"] + b.saved["classifier.weight"] + base["classifier.weight"]) / 3) < 1e-6


def test_the_copy_of_the_base_beside_an_adapted_embedding(peft, tmp_path):
    folders = [trained(peft, "llama", tmp_path / t, dict(target_modules=["embed_tokens", "q_proj"]), seed=seed) for t, seed in (("a", 1), ("b", 2))]
    name, tasks, base = "model.embed_tokens.weight", named_adapters(folders), built("llama").state_dict()
    assert tasks["a"].saved[name].equal(base[name]) and lora_merge(tasks, heads="drop").saved[name].equal(base[name])
    third = Adapter({}, saved={name: base[name] + 3}, config=tasks["a"].config) # one that has trained all of it
    with pytest.raises(ValueError, match="module 'model.embed_tokens' is adapted by LoRA in 'a' and saved whole in 'c'"): lora_merge({**tasks, "c": third})
    assert name in compress_lora(tasks["a"]).factors and compress_lora(tasks["a"], base=base).apply_to(base)[name].shape == base[name].shape
    tasks["b"].saved[name].add_(1)
    with pytest.raises(ValueError, match="'a' and 'b' come with different base weights 'model.embed_tokens.weight'"): lora_merge(tasks)


def test_bias_of_the_second_factor(peft, tmp_path):
    folders = [trained(peft, "gpt2", tmp_path / t, dict(lora_bias=True, init_lora_weights=True, target_modules=["c_attn", "c_fc"]), seed=seed) for t, seed in (("a", 1), ("b", 2))]
    for i, folder in enumerate(folders): # B starts as zero, and so does its bias
        tensors = {k: torch.randn(v.shape, generator=torch.Generator().manual_seed(i)) for k, v in load_file(folder / "adapter_model.safetensors").items()}
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    base, theirs = built("gpt2").state_dict(), peft.PeftModel.from_pretrained(built("gpt2"), folders[0]).merge_and_unload().state_dict()
    for n, w in apply_lora(base, read_adapter(folders[0])): assert error(w, theirs[n]) < 1e-5, n
    merged = lora_merge(folders)
    save_adapter(merged, tmp_path / "m")
    theirs = peft.PeftModel.from_pretrained(built("gpt2"), tmp_path / "m").merge_and_unload().state_dict()
    for n, w in apply_lora(base, merged): assert error(w, theirs[n]) < 1e-5, n
    name = "transformer.h.0.attn.c_attn.bias"
    assert error(merged.biases[name], sum(a.biases[name] for a in map(read_adapter, folders)) / 2) < 1e-6


def test_a_model_with_both_layouts(peft, tmp_path):
    "PEFT writes the layout of the last layer that it has adapted."
    folder = trained(peft, "gpt2", tmp_path / "a", dict(target_modules=["c_attn", "c_proj", "lm_head"]))
    base, theirs = built("gpt2").state_dict(), peft.PeftModel.from_pretrained(built("gpt2"), folder).merge_and_unload().state_dict()
    with pytest.raises(ValueError, match="cannot be known"): apply_lora(base, read_adapter(folder))
    for n, w in apply_lora(base, read_adapter(folder), fan_in_fan_out=True): assert error(w, theirs[n]) < 1e-5, n


def test_dora_and_others_are_refused(peft, tmp_path):
    for options, name in ((dict(use_dora=True, init_lora_weights=True), "use_dora"), (dict(init_lora_weights="olora"), "init_lora_weights"), (dict(trainable_token_indices=[1], target_modules=["q_proj"]), "trainable_token_indices"), (dict(target_parameters=["q_proj.weight"], target_modules=[]), "target_parameters")):
        folder = trained(peft, "llama", tmp_path / name, options)
        with pytest.raises(ValueError, match=name): read_adapter(folder)
    peft.get_peft_model(built("llama"), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])).save_pretrained(tmp_path / "ia3")
    with pytest.raises(ValueError, match="peft_type is 'IA3'"): read_adapter(tmp_path / "ia3")


def test_every_option_of_peft_is_known(peft):
    "A new PEFT may have options that change what a factor means: then this test says so, and read_adapter refuses them if they are set."
    assert not peft.LoraConfig(r=4, target_modules=["q"]).to_dict().keys() - lora_config._HARMLESS - lora_config._REFUSED.keys()


@pytest.mark.parametrize("name", ("gpt2", "llama", "vit"))
def test_an_archive_becomes_an_adapter_that_peft_loads(peft, name, tmp_path):
    model = built(name)
    base = {n: t.clone() for n, t in model.state_dict().items()}
    change = {n: .05 * torch.randn(t.shape, generator=torch.Generator().manual_seed(len(n))) for n, t in base.items()}
    archive = compress(change, rank=3)
    adapter = extract_lora(archive, module_kinds(model), base=base)
    save_adapter(adapter, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(built(name), tmp_path / "a").merge_and_unload().state_dict()
    for n, w in archive.apply_to(base).items(): assert error(theirs[n] - base[n], w - base[n]) < 1e-4, n


def test_the_configuration_names_modules_exactly(g):
    a = Adapter({f"{m}.weight": make_layer(g, (8, 8), r) for m, r in {"h.1.q": 2, "x.h.1.q": 3, "h.11.q": 2, "h-1-q": 2, "q": 4}.items()})
    config = adapter_config(a)
    for name, layer in a.layers.items(): assert lora_scaling(config, name.removesuffix(".weight")) == (layer.rank, pytest.approx(layer.scaling))
