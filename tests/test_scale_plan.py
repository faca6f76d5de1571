"Plans of runs: what is decomposed in real architectures, how checkpoints meet, how work is cut, and what it costs."
import json
import math
import random
import re
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from tsv_nb.checks import StateDictKeyError
from tsv_nb.compress import compress
from tsv_nb.fused import Cut, cut_of
from tsv_nb.merge import merge_plan
from tsv_nb.scale import estimates, rules
from tsv_nb.scale.checkpoints import open_checkpoint
from tsv_nb.scale.match import match_tensors
from tsv_nb.scale.plan import DTYPES, make_plan
from tsv_nb.scale.planned import COMMANDS, Plan, cut_units, fill, size_bytes
from tsv_nb.scale.rules import KINDS, Rules, kind_of
from tsv_nb.task_vectors import task_vector


def blank(*shape, dtype=torch.float32): return torch.empty((), dtype=dtype).expand(shape)


def state(seed=0, **shapes):
    g = torch.Generator().manual_seed(seed)
    shapes = {"wte.weight": (40, 8)} | {f"h.{i}.{n}": s for i in range(3) for n, s in {"attn.c_attn.weight": (8, 24), "mlp.weight": (32, 8), "ln.weight": (8,)}.items()} | shapes
    return {n: torch.randn(s, generator=g) for n, s in shapes.items()}


# real architectures

def small(family):
    "A small model of a family of transformers, with random weights."
    import transformers as hf
    d = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    tokens = dict(vocab_size=50, bos_token_id=0, eos_token_id=1, pad_token_id=0)
    return {"gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, **tokens)),
            "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**d, **tokens, num_key_value_heads=1)),
            "bert": lambda: hf.BertForPreTraining(hf.BertConfig(**d, vocab_size=50)),
            "bert classifier": lambda: hf.BertForSequenceClassification(hf.BertConfig(**d, vocab_size=50)),
            "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**d, image_size=32)),
            "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=50)),
            "clip": lambda: hf.CLIPModel(hf.CLIPConfig(text_config=dict(d, **tokens), vision_config=dict(d, image_size=32), projection_dim=8))}[family]()


# 2-D tensors that are not decomposed by default, and names that are left out because they are tied
EXPECTED = {
    "gpt2": ({"transformer.wte.weight": "token embedding"}, {"lm_head.weight"}),
    "llama": ({"model.embed_tokens.weight": "token embedding", "lm_head.weight": "output head"}, set()),
    "bert": ({"bert.embeddings.word_embeddings.weight": "token embedding", "bert.embeddings.token_type_embeddings.weight": "token embedding", "cls.seq_relationship.weight": "output head"},
             {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}),
    "bert classifier": ({"bert.embeddings.word_embeddings.weight": "token embedding", "bert.embeddings.token_type_embeddings.weight": "token embedding", "classifier.weight": "output head"}, set()),
    "vit": ({"classifier.weight": "output head"}, set()),
    "t5": ({"shared.weight": "token embedding"}, {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}),
    "clip": ({"text_model.embeddings.token_embedding.weight": "token embedding", "text_projection.weight": "text projection"}, set())}


@pytest.mark.parametrize("family", EXPECTED)
def test_rules_on_transformers(family):
    pytest.importorskip("transformers")
    model = small(family)
    base, tuned = open_checkpoint(model), open_checkpoint({k: v + .01 if v.is_floating_point() else v for k, v in model.state_dict().items()})
    tuned.tied = base.tied # adding made copies
    plan, (kept, tied) = make_plan("merge", base, dict(a=tuned, b=tuned), threads=1), EXPECTED[family]
    lines = {t.name: t for t in plan.tensors}
    assert {*base} - {*lines} == tied and {n for n in tied} == {re.match(r"tied: (\S+) is", note)[1] for note in plan.notes if note.startswith("tied")}
    averaged = {n: t.reason for n, t in lines.items() if len(t.shape) == 2 and t.how != "merge"}
    assert averaged.keys() == kept.keys()
    for name, reason in averaged.items(): assert reason.startswith(kept[name] + " (excluded by default: ") and name.endswith(re.search(r": (.*)\)", reason)[1])
    assert all(t.how == ("copy" if not base.header(n).is_floating_point() else "average") for n, t in lines.items() if len(t.shape) != 2)
    assert all(t.rank == min(t.shape) // 2 and t.parts == 1 for t in lines.values() if t.how == "merge")
    assert all(len(line) <= 80 for line in plan.table().splitlines())


def clip_b32():
    open_clip = pytest.importorskip("open_clip")
    with torch.device("meta"): model = open_clip.CLIP(**{k: v for k, v in open_clip.get_model_config("ViT-B-32").items() if k in ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu")})
    return {k: blank(*v.shape, dtype=v.dtype) for k, v in model.state_dict().items()}


def test_rules_on_open_clip():
    base = clip_b32()
    plan = make_plan("merge", base, {str(i): base for i in range(8)}, split="qkv", threads=1)
    lines = {t.name: t for t in plan.tensors}
    assert {n: t.reason for n, t in lines.items() if len(t.shape) == 2 and t.how != "merge"} == {
        "token_embedding.weight": "token embedding (excluded by default: token_embedding.weight)", "text_projection": "text projection (excluded by default: text_projection)"}
    assert lines["visual.conv1.weight"].how == "average" and lines["visual.conv1.weight"].reason == "4 dimensions, not a matrix"
    fused = lines["visual.transformer.resblocks.0.attn.in_proj_weight"]
    assert (fused.parts, fused.rank, lines["visual.proj"].rank, lines["visual.positional_embedding"].rank) == (3, 96, 64, 6)
    table = plan.table()
    assert "visual.transformer.resblocks.{0…11}.attn.in_proj_weight" in table and "12 x (2304, 768) in 3  rank 96" in table and max(map(len, table.splitlines())) <= 80
    assert plan.bytes_written == sum(t.nbytes for t in base.values()) and plan.bytes_read == 9 * plan.bytes_written


@pytest.mark.parametrize("kind, end", [(k, e) for k, ends in KINDS.items() for e in ends])
def test_every_default_rule(kind, end):
    bare = end.lstrip("^")
    assert kind_of(bare) == (kind, bare) and kind_of("x_" + bare) is None and kind_of(bare + ".more") is None
    assert (kind_of("model.0." + bare) is None) == (end[0] == "^")
    choice = Rules().choose(bare, 2)
    assert not choice.decomposed and choice.reason == f"{kind} (excluded by default: {bare})"
    assert Rules(include=[bare]).choose(bare, 2).decomposed and Rules(exclude=[]).choose(bare, 2).decomposed


@pytest.mark.parametrize("name, kind", [("vocab_projector.weight", "output head"), ("model.language_model.embed_tokens_per_layer.weight", "token embedding"), ("transformer.output_layer.weight", "output head"),
                                        ("transformer.word_embedding.weight", "token embedding"), ("lm_loss.weight", "output head"), ("classification_head.out_proj.weight", "output head"),
                                        ("generator_lm_head.weight", "output head"), ("cls_classifier.weight", "output head"), ("distillation_classifier.weight", "output head")])
def test_embeddings_and_heads_of_known_architectures(name, kind): # DistilBERT, Gemma 3n, ChatGLM, XLNet (two), BART, ELECTRA, DeiT (two)
    assert kind_of(name)[0] == kind and not Rules().choose(name, 2).decomposed


@pytest.mark.parametrize("name", ["model.decoder.layers.0.self_attn.out_proj.weight", "transformer.encoder.layers.0.mlp.output_layer.weight", "bert.encoder.layer.0.output.dense.weight", "classification_head.dense.weight",
                                  "bert.encoder.layer.0.attention.output.dense.weight", "lm_head.dense.weight", "transformer.wpe.weight", "visual.positional_embedding", "layers.0.mlp.shared_expert.up_proj.weight",
                                  "layer4.0.fc.weight", "attn_head.weight", "cls.predictions.transform.dense.weight", "bert.pooler.dense.weight"])
def test_layers_are_not_taken_for_something_else(name): assert Rules().choose(name, 2).decomposed


# patterns

def test_patterns():
    assert Rules(exclude=["*.mlp.*"]).choose("h.0.mlp.w", 2).reason == "excluded by '*.mlp.*'"
    assert Rules(exclude=["h.1.*"]).choose("h.10.mlp.w", 2).decomposed and not Rules(exclude=["h.1"]).choose("h.10.mlp.w", 2).decomposed # a part of the name
    assert Rules(exclude=["h.?.w"]).choose("oh.1.w", 2).decomposed # a pattern with wildcards is for the whole name
    assert Rules(exclude=["mlp"], include=["h.0.*"]).choose("h.0.mlp.w", 2).decomposed
    assert not Rules(include=["*"]).choose("conv", 4).decomposed
    both = Rules(exclude=["default", "mlp"])
    assert not both.choose("lm_head.weight", 2).decomposed and not both.choose("h.0.mlp.w", 2).decomposed and both.choose("h.0.attn.w", 2).decomposed
    with pytest.raises(TypeError, match="lists of patterns"): Rules(exclude="mlp")
    assert not Rules(exclude=["h[0].w"]).choose("h[0].w", 2).decomposed and not Rules(exclude=["h[01].w"]).choose("h0.w", 2).decomposed # brackets in a name, and as a wildcard


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_fits_nothing(option):
    with pytest.raises(ValueError, match=rf"{option} pattern 'atn' fits no tensor; did you mean 'attn'"): make_plan("merge", state(), dict(a=state()), **{option: ["mlp", "atn"]})


# fused layers

@pytest.mark.parametrize("name, shape, cut", [
    ("a.in_proj_weight", (24, 8), Cut(3, 0)), ("a.in_proj_weight", (24, 5), Cut(3, 0)), ("a.qkv.weight", (24, 8), Cut(3, 0)), ("a.Wqkv.weight", (24, 8), Cut(3, 0)), ("qkv.weight", (24, 8), Cut(3, 0)),
    ("h.0.attn.c_attn.weight", (8, 24), Cut(3, 1)), ("h.0.attn.c_attn.weight", (24, 8), Cut(3, 0)), ("a.qkv.bias", (24,), Cut()), ("a.query_key_value.weight", (24, 8), Cut()), ("a.wqkv.weight", (24, 8), Cut()), ("h.0.w", (24, 8), Cut()),
    ("h.0.self_attn.W_pack.weight", (24, 8), Cut(3, 0)), ("h.0.attn.to_qkv.weight", (36, 8), Cut(3, 0)), ("blk.0.attn_qkv.weight", (24, 8), Cut(3, 0)), ("blk.0.attn_qkv.weight", (16, 8), Cut()),
    ("h.0.self_attn.qkv_proj.weight", (24, 8), Cut(3, 0)), ("h.0.self_attn.qkv_proj.weight", (12, 8), Cut()), ("h.0.attn.qkv_proj.weight", (24, 8), Cut())])
def test_cuts(name, shape, cut):
    assert cut_of(name, shape, "qkv") == cut and cut_of(name, shape, None) == Cut()
    x = torch.randn(shape)
    parts = cut.split(x)
    assert len(parts) == cut.parts and cut.join(parts).equal(x) and (len(shape) != 2 or all(tuple(p.shape) == cut.shape(shape) for p in parts))


def test_a_split_says_what_it_does_not_reach():
    "Also where nothing is split: then it is an error."
    def plan(split="qkv", command="merge", exclude=None, **shapes):
        x = {n.replace("__", "."): blank(*s) for n, s in shapes.items()}
        return make_plan(command, x, dict(a=x, b=x), split=split, threads=1, exclude=exclude)
    falcon, phi = {f"h__{i}__query_key_value__weight": (24, 8) for i in range(3)}, {"h__0__self_attn__qkv_proj__weight": (16, 8)}
    notes = plan(h__9__attn__to_qkv__weight=(24, 8), **falcon, **phi).notes
    assert notes == ("fused, and left whole: h.{0…2}.query_key_value.weight (q, k and v of each head lie together)", "fused, and left whole: h.0.self_attn.qkv_proj.weight (q, k and v are of different size)")
    assert plan(None, **falcon).notes == () == plan(h__0__self_attn__W_pack__weight=(24, 8)).notes
    for command in ("merge", "interference"):
        with pytest.raises(ValueError, match=r"split is 'qkv' \(--split\), and no tensor is a fused q, k, v that falls into thirds; 'h.0.query_key_value.weight' is left whole: q, k and v of each head lie together; leave split out"): plan(command=command, **falcon)
        with pytest.raises(ValueError, match="falls into thirds; leave split out"): plan(command=command, w=(24, 8))
    assert plan(h__0__qkv__weight=(24, 8), h__1__qkv__weight=(25, 8), exclude=["h.1"]).notes == () # not asked for


@pytest.mark.parametrize("name, shape", [("a.W_pack.weight", (25, 8)), ("a.to_qkv.weight", (25, 8)), ("a.in_proj_weight", (25, 8)), ("a.qkv.weight", (30, 8)), ("h.0.attn.c_attn.weight", (8, 12))])
def test_what_cannot_be_cut(name, shape):
    with pytest.raises(ValueError, match=rf"tensor '{name}' of shape \({shape[0]}, {shape[1]}\) cannot be split into q, k and v"): cut_of(name, shape, "qkv")


def test_the_cut_of_conv1d_is_that_of_the_model():
    "Keys of GPT-2 that are set to zero in the checkpoint are zero in the model."
    pytest.importorskip("transformers")
    model = small("gpt2").eval()
    name, layer = "transformer.h.0.attn.c_attn.weight", model.transformer.h[0].attn.c_attn
    q, k, v = cut_of(name, layer.weight.shape, "qkv").split(layer.weight.detach())
    with torch.no_grad():
        layer.weight.copy_(Cut(3, 1).join([q, torch.zeros_like(k), v])); layer.bias.zero_()
        query, key, value = layer(torch.randn(4, 16)).split(16, -1)
    assert not key.any() and query.any() and value.any()


# the same treatment as the core's

@pytest.mark.parametrize("options", [dict(), dict(rank=1), dict(rank=2), dict(rank="full"), dict(split="qkv"), dict(exclude=["mlp", "wte"])])
@pytest.mark.parametrize("n_tasks", [1, 2, 3, 9])
def test_the_plan_is_the_cores(n_tasks, options):
    base, tasks = state(**{"a.in_proj_weight": (24, 8), "tiny": (2, 8)}), {str(i): state(i + 1, **{"a.in_proj_weight": (24, 8), "tiny": (2, 8)}) for i in range(n_tasks)}
    if "split" in options: base, tasks = _without(base), {t: _without(s) for t, s in tasks.items()} # the core cuts in_proj_weight only
    inner = merge_plan({t: task_vector(base, s) for t, s in tasks.items()}, small="average", **(dict(exclude=[]) | options))
    if options.get("rank") in (1, 2) and not any(t.how == "merge" for t in inner.values()):
        with pytest.raises(ValueError, match="is too large for 9 tasks in every matrix"): make_plan("merge", base, tasks, **(dict(exclude=[]) | options))
        return
    outer = make_plan("merge", base, tasks, threads=1, **(dict(exclude=[]) | options))
    assert {t.name: (t.how, t.rank) for t in outer.tensors} == {n: (t.how, t.rank) for n, t in inner.items()}


def _without(s): return {k: v for k, v in s.items() if "c_attn" not in k}


def test_compress_plans_what_compress_does(tmp_path):
    base, tuned = state(), state(1)
    for options in (dict(), dict(ratio=.5), dict(rank=3), dict(rank=100), dict(dtype="float16")):
        archive = compress(task_vector(base, tuned), exclude=[], **(options | ({"dtype": torch.float16} if "dtype" in options else {})))
        plan = make_plan("compress", base, dict(a=tuned), exclude=[], threads=1, **options)
        assert plan.bytes_written == archive.nbytes and len(plan.shards) == 1
        for t in plan.tensors:
            if t.name in archive.factors: assert archive.factors[t.name].rank == t.rank
        path = archive.save(tmp_path / "a.safetensors")
        back = make_plan("expand", base, dict(a=open_checkpoint(path)), threads=1)
        assert {t.name for t in back.tensors if t.how == "merge"} == {*archive.factors} and back.bytes_written == sum(t.nbytes for t in base.values())
        assert back.bytes_read == archive.nbytes + back.bytes_written


# checkpoints that do not fit

def test_vocabularies():
    base, a, b = state(), state(1, **{"wte.weight": (43, 8)}), state(2, **{"wte.weight": (37, 8)})
    with pytest.raises(ValueError, match=r"task 'a': token embedding 'wte.weight' has 43 rows, the base has 40; pass vocab='base' .* or vocab='common'"): make_plan("merge", base, dict(a=a, b=b))
    kept = make_plan("merge", base, dict(a=a, b=b), vocab="base").tensors[0]
    assert (kept.how, kept.shape, kept.rows) == ("copy", (40, 8), None) and "vocab='base'" in kept.reason
    common = make_plan("merge", base, dict(a=a, b=b), vocab="common")
    assert (common.tensors[0].how, common.tensors[0].shape, common.tensors[0].rows) == ("average", (40, 8), 37) and any("the first 37 rows are merged" in n for n in common.notes)
    assert make_plan("merge", base, dict(a=a, b=b), vocab="common", include=["wte"]).tensors[0].rank == 4
    assert make_plan("merge", base, dict(a=a), vocab="common").tensors[0].rows == 40
    assert make_plan("merge", base, dict(a=state(3)), vocab="common").tensors[0].rows is None


@pytest.mark.parametrize("name, shape", [("h.0.mlp.weight", (33, 8)), ("wte.weight", (40, 9)), ("wte.weight", (40, 8, 1)), ("h.0.ln.weight", (9,))])
def test_other_shapes_are_errors_with_any_option(name, shape):
    for vocab in ("error", "base", "common"):
        with pytest.raises(ValueError, match=rf"task 'a': tensor '{name}': expected shape"): make_plan("merge", state(), dict(a=state(1, **{name: shape})), vocab=vocab)


def test_missing_and_extra():
    base, less, more = state(), {k: v for k, v in state(1).items() if k != "h.1.mlp.weight"}, state(2) | {"score.weight": torch.ones(3, 8)}
    with pytest.raises(StateDictKeyError, match=r"task 'less': 1 missing tensor: 'h.1.mlp.weight'.*missing='base' \(--missing base\) takes the base's"): make_plan("merge", base, dict(less=less))
    with pytest.raises(StateDictKeyError, match=r"task 'more': 1 extra tensor: 'score.weight'.*extra='ignore' \(--extra ignore\) leaves them out"): make_plan("merge", base, dict(more=more))
    plan = make_plan("merge", base, dict(less=less, more=more), missing="base", extra="ignore", device="cuda")
    line = next(t for t in plan.tensors if t.name == "h.1.mlp.weight")
    assert (line.how, line.rank, line.absent) == ("merge", 4, ("less",)) and [t.name for t in plan.tensors] == list(base)
    assert "task 'less': 1 missing, the base's are taken: 'h.1.mlp.weight'" in plan.notes and "task 'more': 1 extra, left out: 'score.weight'" in plan.notes
    assert plan.bytes_read == sum(t.nbytes for s in (base, less, more) for t in s.values()) - 4 * 24
    alone = next(t for t in make_plan("merge", base, dict(less=less), missing="base").tensors if t.name == "h.1.mlp.weight")
    assert (alone.how, alone.reason) == ("copy", "in no task")


@pytest.mark.parametrize("rename, message", [
    (lambda n: "module." + n, "its names begin with 'module.', the base's do not"), (lambda n: n.removeprefix("model."), "the base's names begin with 'model.', its own do not"), (lambda n: f"base_model.model.{n}.lora_A.weight", "adapters are merged with tsv_lora"), (lambda n: "x" + n, "it is another architecture, or saved under other names")])
def test_a_task_without_any_tensor_of_the_base(rename, message):
    "Whatever the options say: the run would write the base."
    base = {f"model.{n}": t for n, t in state().items()}
    stranger = {rename(n): t for n, t in base.items()}
    for options in ({}, dict(missing="base", extra="ignore", device="cuda")):
        with pytest.raises(StateDictKeyError, match=f"task 'a' has no tensor of the base: .*{message}"): make_plan("merge", base, dict(b=base, a=stranger), **options)


def test_integers_and_quantized_weights():
    base = state() | {"position_ids": torch.arange(9)}
    plan = make_plan("merge", base, dict(a=state(1)))
    assert plan.tensors[-1].how == "copy" and plan.tensors[-1].dtype == "int64" and any("1 missing integer" in n for n in plan.notes)
    assert make_plan("merge", state(), dict(a=base)).notes == ("task 'a': 1 extra integer tensors; integers are the base's",)
    assert all(t.name != "position_ids" for t in make_plan("compress", base, dict(a=base)).tensors)
    assert make_plan("merge", base, dict(a=base), dtype="float16").tensors[-1].dtype == "int64"
    for bad in (torch.ones(32, 8, dtype=torch.int8), torch.ones(32, 8).to(torch.float8_e4m3fn)):
        with pytest.raises(ValueError, match="quantized weights"): make_plan("merge", state() | {"h.0.mlp.weight": bad}, dict(a=state() | {"h.0.mlp.weight": bad}))
    with pytest.raises(ValueError, match=r"task 'a': tensor 'h.0.mlp.weight' is torch.int8, in the base torch.float32"): make_plan("merge", state(), dict(a=state() | {"h.0.mlp.weight": torch.ones(32, 8, dtype=torch.int8)}))


def test_types():
    base, tuned = {k: v.bfloat16() for k, v in state().items()}, state(1)
    plan = make_plan("merge", base, dict(a=tuned))
    assert {t.dtype for t in plan.tensors} == {"bfloat16"} and f"task 'a': {len(base)} tensors in float32, the base's in bfloat16" in plan.notes
    assert {t.dtype for t in make_plan("merge", base, dict(a=tuned), dtype="float32").tensors} == {"float32"}
    assert {t.dtype for t in make_plan("compress", base, dict(a=tuned)).tensors} == {"float32"} # an archive keeps the task's


class Tied(dict): tied = {"lm_head.weight": "wte.weight"}


def test_tied_weights():
    tied, untied = Tied(state() | {"lm_head.weight": torch.ones(40, 8)}), state(1) | {"lm_head.weight": torch.ones(40, 8)}
    for tasks in (dict(a=tied), dict(a=state(1)), dict(a=tied, b=state(1))):
        plan = make_plan("merge", tied, tasks)
        assert "lm_head.weight" not in [t.name for t in plan.tensors] and plan.notes == ("tied: lm_head.weight is wte.weight, written once",)
    assert make_plan("merge", tied, dict(a=untied)).tensors[-1].name == "lm_head.weight" # the task has a head of its own
    assert make_plan("merge", tied, dict(a=tied), exclude=["lm_head", "default"]).tensors == make_plan("merge", tied, dict(a=tied)).tensors # a pattern may fit a second name
    assert make_plan("merge", state(), dict(a=tied)).notes == () # a second name is no extra tensor
    with pytest.raises(StateDictKeyError, match="1 extra tensor: 'lm_head.weight'"): make_plan("merge", state(), dict(a=untied))


def test_an_archive_may_untie():
    "The base's head is its embedding; the task has a head of its own, and the archive holds its change."
    tied, untied = Tied(state() | {"lm_head.weight": state()["wte.weight"]}), state(1) | {"lm_head.weight": torch.ones(40, 8)}
    compressed = [t.name for t in make_plan("compress", tied, dict(a=untied)).tensors]
    assert "lm_head.weight" in compressed
    archive = {f"dense/{n}": t for n, t in untied.items()}
    assert [t.name for t in make_plan("expand", tied, dict(a=archive)).tensors] == list(tied)
    plan = make_plan("expand", tied, dict(a={n: t for n, t in archive.items() if n != "dense/lm_head.weight"}))
    assert "lm_head.weight" not in [t.name for t in plan.tensors] and "tied: lm_head.weight is wte.weight, written once" in plan.notes


# how work is cut

def test_cutting():
    rng = random.Random(0)
    for _ in range(200):
        sizes = {str(i): rng.choice([0, 1, 5, 60, 1000, 7777]) for i in range(rng.randrange(1, 40))}
        limit, small_limit = rng.choice([1, 64, 1000, 10**6]), rng.choice([1, 50, 500])
        shards = fill(sizes, limit)
        units = cut_units(shards, sizes, small_limit)
        for runs, most in ((shards, limit), (units, small_limit)):
            assert [n for r in runs for n in r] == list(sizes) and all(runs)
            assert all(sum(sizes[n] for n in r) <= most or sizes[r[0]] > most and not any(sizes[n] for n in r[1:]) for r in runs)
        assert all(any({*u} <= {*s} for s in shards) for u in units)


def test_shards_are_those_of_hugging_face():
    "Where no tensor is larger than a shard: the library puts those into files of their own, before the others."
    from huggingface_hub import split_torch_state_dict_into_shards
    base = state()
    plan = make_plan("merge", base, dict(a=state(1)), shard_size=1500)
    theirs = split_torch_state_dict_into_shards(base, max_shard_size=1500)
    assert {f: tuple(n) for f, n in theirs.filename_to_tensors.items()} == dict(zip(plan.shard_names(), plan.shards)) and len(plan.shards) > 2
    assert make_plan("merge", base, dict(a=state(1))).shard_names() == ["model.safetensors"]


def test_bytes_are_those_of_files(tmp_path):
    base, tasks = state(), dict(a=state(1), b=state(2))
    files = {}
    for name, s in {"base": base, **tasks}.items(): save_file(s, files.setdefault(name, tmp_path / f"{name}.safetensors"))
    opened = {n: open_checkpoint(f) for n, f in files.items()}
    plan = make_plan("merge", opened["base"], {t: opened[t] for t in tasks}, dtype="bfloat16", shard_size=1500)
    def tensors_of(path): return path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little")
    assert plan.bytes_read == sum(map(tensors_of, files.values()))
    for file, names in zip(plan.shard_names(), plan.shards): save_file({n: base[n].bfloat16() for n in names}, tmp_path / file)
    sizes = [tensors_of(tmp_path / f) for f in plan.shard_names()]
    assert plan.bytes_written == sum(sizes) and all(s <= 1500 or len(names) == 1 for s, names in zip(sizes, plan.shards))
    assert json.loads(json.dumps(plan.to_json()))["digest"] == plan.digest() and plan.inputs["a"] == opened["a"].fingerprint()


@pytest.mark.parametrize("command", ["merge", "interference"])
def test_order_of_tasks(command):
    base, tasks = state(), {t: state(i) for i, t in enumerate("cab")}
    plan, other = make_plan(command, base, tasks, threads=1), make_plan(command, base, {t: tasks[t] for t in sorted(tasks)}, threads=1)
    assert (plan.tensors, plan.shards, plan.units, plan.bytes_read, plan.peak_bytes) == (other.tensors, other.shards, other.units, other.bytes_read, other.peak_bytes)
    assert plan.digest() != other.digest() # weights go by the order, and sums round by it


def test_interference_writes_nothing():
    plan = make_plan("interference", state(), dict(a=state(1), b=state(2)))
    scored = {t.name for t in plan.tensors if t.how == "merge"}
    assert plan.shards == () and plan.bytes_written == 0 and {n for u in plan.units for n in u} == scored and len(scored) == 6
    assert plan.bytes_read == 3 * sum(state()[n].nbytes for n in scored) and "writes nothing" in plan.table()
    with pytest.raises(ValueError, match="no matrix to score"): make_plan("interference", dict(b=torch.ones(3)), dict(a=dict(b=torch.ones(3))))


# options

@pytest.mark.parametrize("options, message", [
    (dict(rank=0), "rank must be at least 1"), (dict(rank=2.5), "rank must be at least 1 and whole"), (dict(rank=9), "rank 9 is too large for 1 tasks in every matrix"), (dict(alpha=math.inf), "alpha must be a finite number"),
    (dict(orthogonalize="svdd"), "unknown orthogonalize 'svdd'; known: .*Did you mean 'svd'"), (dict(split="kqv"), "unknown split 'kqv'"), (dict(weights=[1, 2]), "2 weights for 1 tasks"), (dict(weights=[math.nan]), "weight of task 'a' must be a finite number"),
    (dict(vocab="all"), "unknown vocab 'all'"), (dict(missing="ignore"), "unknown missing 'ignore'; known: 'error', 'base'"), (dict(extra="base"), "unknown extra 'base'; known: 'error', 'ignore'"), (dict(dtype="flaot16"), "unknown dtype 'flaot16'.*Did you mean 'float16'"),
    (dict(shard_size="5 apples"), "shard size must be a number of bytes such as '5GB'"), (dict(shard_size=0), "got 0"), (dict(threads=0), "threads must be at least 1"), (dict(ratio=.5), "merge does not use ratio"), (dict(ratio=0), "merge does not use ratio")])
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message): make_plan("merge", state(), dict(a=state(1)), **options)


@pytest.mark.parametrize("command, options", [("compress", dict(alpha=2.)), ("compress", dict(split="qkv")), ("compress", dict(weights=[1])), ("expand", dict(vocab="common")), ("interference", dict(dtype="float16"))])
def test_options_of_other_commands(command, options):
    with pytest.raises(ValueError, match=f"{command} does not use {next(iter(options))}; leave it out"): make_plan(command, state(), dict(a=state(1)), **options)


def test_wrong_tasks():
    with pytest.raises(ValueError, match="unknown command 'mrege'.*Did you mean 'merge'"): make_plan("mrege", state(), dict(a=state(1)))
    with pytest.raises(ValueError, match="no task given"): make_plan("merge", state(), {})
    with pytest.raises(ValueError, match="cannot be called 'base'"): make_plan("merge", state(), dict(base=state(1)))
    with pytest.raises(ValueError, match="expand takes one checkpoint, got 2: a, b"): make_plan("expand", state(), dict(a={}, b={}))
    with pytest.raises(ValueError, match="is no archive of tsv_compress: it holds 'wte.weight'"): make_plan("expand", state(), dict(a=state(1)))
    with pytest.raises(ValueError, match="of matrix 'w' it has only U"): make_plan("expand", dict(w=torch.ones(2, 2)), dict(a={"U/w": torch.ones(2, 1)}))
    with pytest.raises(StateDictKeyError, match="1 missing \\('b'\\)"): make_plan("expand", dict(w=torch.ones(2), b=torch.ones(2)), dict(a={"dense/w": torch.ones(2)}))


CHANGES = {"merge": dict(rank=1, alpha=.5, orthogonalize="eigh", split="qkv", weights=[1., 2.], include=["wte"], exclude=["mlp"], vocab="common", dtype="float16", shard_size="1KB", threads=3, missing="base", extra="ignore", device="cuda"),
           "compress": dict(rank=1, ratio=.3, include=["wte"], exclude=["mlp"], vocab="common", dtype="float16", threads=3, missing="base", extra="ignore", device="cuda"),
           "interference": dict(rank=1, split="qkv", include=["wte"], exclude=["mlp"], vocab="common", threads=3, missing="base", extra="ignore", device="cuda")}


@pytest.mark.parametrize("command", CHANGES)
def test_every_option_changes_the_digest(command):
    tasks = dict(a=state(1), b=state(2)) if command != "compress" else dict(a=state(1))
    def digest(base=state(), tasks=tasks, **options): return make_plan(command, base, tasks, **(dict(threads=1) | options)).digest()
    assert digest() == digest()
    changed = [digest(**{option: value}) for option, value in CHANGES[command].items()]
    assert len({digest(), *changed}) == 1 + len(changed)
    other = open_checkpoint(state(5))
    assert digest(tasks=tasks | dict(a=other)) != digest(tasks=tasks | dict(a=open_checkpoint(state(1))))
    assert digest(base=open_checkpoint(state())) != digest(base=open_checkpoint(state(7)))


def test_the_digest_does_not_depend_on_estimates():
    plan = make_plan("merge", state(), dict(a=state(1)), threads=1)
    assert Plan(**(vars(plan) | dict(seconds=1e9, peak_bytes=1, notes=("x",)))).digest() == plan.digest()


# costs

def test_a_hundred_thousand_tensors():
    many = {f"layers.{i}.experts.{j}.w{k}.weight": blank(8, 8) for i in range(50) for j in range(500) for k in range(4)}
    estimates.measured_rates(1)
    start = time.process_time()
    plan = make_plan("merge", many, dict(a=many, b=many), threads=1)
    text, digest = plan.table(), plan.digest()
    assert time.process_time() - start < 30 and len(plan.tensors) == 100_000 and len(text.splitlines()) < 20 and len(digest) == 64


def test_tables_stay_narrow():
    rng = random.Random(1)
    for _ in range(30):
        names = {".".join(rng.choice(["layer", "0", "12", "x" * rng.randrange(1, 100), "attn", "weight"]) for _ in range(rng.randrange(1, 9))) + str(i) for i in range(40)}
        s = {n: torch.ones(rng.choice([(3, 4), (5,), (2, 2, 2), (100000, 1)])) for n in names}
        assert all(len(line) <= 80 for line in make_plan("merge", s, {"t" * rng.randrange(1, 90): s}, threads=1).table().splitlines())


def test_estimates_grow_with_the_matrix():
    def peak(*args, **options): return max(estimates.tensor_bytes(estimates.Item(*args, **options), 4).values())
    assert peak(512 * 512, (512, 512), rank=128) < peak(512 * 1024, (512, 1024), rank=128) < peak(1024 * 1024, (1024, 1024), rank=256)
    assert peak(3 * 512 * 512, (512, 512), parts=3, rank=128) < peak(3 * 512 * 512, (3 * 512, 512), rank=128) # a fused matrix in thirds needs less
    assert set(COMMANDS) == set(estimates.STEPS) and all(getattr(torch, d).is_floating_point for d in DTYPES)
