"""Task vectors as nobody would write them by hand: what hypothesis draws, and what is asked of every result.

A case is drawn as a few small choices (shapes, types, memory layouts, kinds of numbers) and a seed; the numbers come from the seed. So a failing case
is short to print and to repeat.
"""
import ctypes
import linecache
import math
import traceback
from pathlib import Path
from typing import NamedTuple

import hypothesis.strategies as st
import torch

import tsv_nb
from tsv_nb.checks import StateDictKeyError

PACKAGE = Path(tsv_nb.__file__).parent
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
NAMES = ("w", "layers.0.mlp.fc1.weight", "attn.in_proj_weight", "text_projection", "token_embedding.weight", "b", "ü/é ß", "層.0.重み", "", "two words", "dense/w", "U/w",
         "__metadata__", "quote'd \"name\"", "line\nbreak", "nul\0inside", "x" * 300, "\U0001f600", "half \ud83d", "e\u0301", "\u00e9", "..", "/etc/x")
SIDES = (1, 2, 3, 5, 9, 17, 40, 70, 130)
LAYOUTS = ("plain", "plain", "transposed", "strided", "offset", "expanded", "parameter")
ORDINARY = ("normal", "normal", "normal", "zeros", "one rank", "constant", "single", "small", "large")
EXTREME = ("smallest", "largest") # subnormal numbers; sums of a few numbers overflow
BROKEN = ("nan", "inf")


def exponent(dtype, values):
    "The power of two that numbers are scaled by: products of two scaled numbers stay within the type for \"small\" and \"large\", not for the extreme ones."
    low, high = math.frexp(torch.finfo(dtype).tiny)[1], math.frexp(torch.finfo(dtype).max)[1]
    return {"small": low * 2 // 5, "large": high * 2 // 5, "smallest": low - 2, "largest": high - 3}.get(values, 0)


def numbers(shape, dtype, values, seed):
    "A tensor of the kind of numbers that `values` names."
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    if values == "zeros": x = torch.zeros_like(x)
    elif values == "one rank" and x.ndim == 2: x = x[:, :1] @ x[:1] if x.numel() else x
    elif values == "constant": x = torch.full_like(x, .75)
    elif values == "single" and x.numel(): x = torch.zeros_like(x).flatten().index_fill(0, torch.tensor([seed % x.numel()]), 1.5).view(shape)
    x = (x.clamp(-7, 7) * 2. ** exponent(dtype, values)).to(dtype)
    if values in BROKEN and x.numel(): x.view(-1)[seed % x.numel()] = float(values)
    return x


def laid_out(x, layout):
    "The same numbers in another place of memory; what lies between them is NaN. An expanded tensor has its first row everywhere."
    if layout == "transposed" and x.ndim >= 2: return x.mT.contiguous().mT
    if layout == "strided" and x.ndim:
        big = x.new_full([2 * n + 1 for n in x.shape], torch.nan)
        view = big[tuple(slice(1, None, 2) for _ in x.shape)]
        view.copy_(x)
        return view
    if layout == "offset":
        flat = x.new_full((x.numel() + 4,), torch.nan)
        flat[3:-1] = x.flatten()
        return flat[3:-1].view(x.shape)
    if layout == "expanded" and x.ndim and len(x): return x[:1].expand(x.shape)
    return torch.nn.Parameter(x) if layout == "parameter" else x


class Entry(NamedTuple):
    "One tensor of one task, before its numbers are made."
    shape: tuple
    dtype: torch.dtype
    values: str
    layout: str
    seed: int
    def make(self): return laid_out(numbers(self.shape, self.dtype, self.values, self.seed), self.layout)


@st.composite
def shapes(draw, empty=True):
    "Mostly matrices: square, tall, wide, a column, a row; sometimes a scalar, a vector, a convolution, or something with a side of length 0."
    kind = draw(st.sampled_from(("matrix",) * 6 + ("vector", "scalar", "convolution") + ("empty",) * empty))
    side = st.sampled_from(SIDES)
    if kind == "scalar": return ()
    if kind == "vector": return (draw(side),)
    if kind == "convolution": return (draw(st.sampled_from((1, 4))), 3, 2, 2)
    if kind == "empty": return draw(st.sampled_from(((0,), (0, 4), (4, 0), (0, 0), (2, 0, 3))))
    return (draw(side), draw(side))


seeds = st.integers(0, 2**31 - 1)


@st.composite
def entries(draw, shape=None, dtype=None, kinds=ORDINARY):
    return Entry(draw(shapes()) if shape is None else shape, draw(st.sampled_from(DTYPES)) if dtype is None else dtype,
                 draw(st.sampled_from(kinds)), draw(st.sampled_from(LAYOUTS)), draw(seeds))


@st.composite
def layouts_of_models(draw, least=1, most=4, one_dtype=False):
    "Names with a shape and a type: what the tasks of a case have in common."
    names = draw(st.lists(st.sampled_from(NAMES), min_size=least, max_size=most, unique=True))
    dtype = draw(st.sampled_from(DTYPES)) if one_dtype or draw(st.booleans()) else None
    return {name: (draw(shapes()), dtype or draw(st.sampled_from(DTYPES))) for name in names}


class Tasks(NamedTuple):
    "Several task vectors, as a recipe."
    recipe: dict # task -> name -> Entry
    defect: str | None # what was done to the last task
    def make(self):
        vectors = {task: {name: e.make() for name, e in entries.items()} for task, entries in self.recipe.items()}
        last, name = vectors[list(vectors)[-1]], next(iter(self.recipe[next(iter(self.recipe))]))
        if self.defect == "missing": del last[name]
        elif self.defect == "extra": last["one too many"] = torch.ones(2)
        elif self.defect == "shape": last[name] = torch.ones(*last[name].shape, 2)
        elif self.defect == "integers": last[name] = torch.ones(last[name].shape, dtype=torch.int64)
        elif self.defect == "no tensor": last[name] = last[name].tolist()
        elif self.defect == "no dict": vectors[list(vectors)[-1]] = [1, 2]
        return vectors

    def all(self): return [e for entries in self.recipe.values() for e in entries.values()]
    @property
    def broken(self): return any(e.values in BROKEN and math.prod(e.shape) and not hidden(e) for e in self.all())
    @property
    def extreme(self): return any(e.values in EXTREME or e.dtype == torch.float16 and e.values == "large" for e in self.all())


def hidden(e):
    "Whether the one broken number of an expanded entry is not in the row that is repeated."
    return e.layout == "expanded" and e.shape != () and e.seed % math.prod(e.shape) >= math.prod(e.shape[1:])


DEFECTS = ("missing", "extra", "shape", "integers", "no tensor", "no dict")


@st.composite
def tasks(draw, most=4, defects=True, broken=True, extreme=True, one_dtype=False):
    "One to `most` tasks; some are the same task again, some have a defect or broken numbers, most are in order."
    model, count = draw(layouts_of_models(one_dtype=one_dtype)), draw(st.integers(1, most))
    trouble = draw(st.sampled_from(("none",) * 6 + ("defect",) * defects + ("broken",) * broken + ("extreme",) * extreme))
    recipe = {}
    for i in range(count):
        if i and draw(st.integers(0, 5)) == 0: recipe[f"task {i}"] = recipe["task 0"]; continue
        recipe[f"task {i}"] = {name: draw(entries(shape, dtype, ORDINARY + EXTREME if trouble == "extreme" else ORDINARY)) for name, (shape, dtype) in model.items()}
    if trouble == "broken":
        task, name = draw(st.sampled_from(sorted(recipe))), draw(st.sampled_from(sorted(model)))
        recipe[task] = recipe[task] | {name: recipe[task][name]._replace(values=draw(st.sampled_from(BROKEN)))}
    return Tasks(recipe, draw(st.sampled_from(DEFECTS if count > 1 else DEFECTS[3:])) if trouble == "defect" else None)


# what is asked of a call


def bits(x):
    "All that a caller can see of a tensor, the bytes of its storage included."
    if not isinstance(x, torch.Tensor): return repr(x)
    storage = x.detach().untyped_storage()
    return ctypes.string_at(storage.data_ptr(), storage.nbytes()) if storage.nbytes() else b"", x.shape, x.stride(), x.storage_offset(), x.dtype, x._version, x.requires_grad


def snapshot(value):
    if isinstance(value, dict): return {k: snapshot(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)): return [snapshot(v) for v in value]
    return bits(value)


class Refused(NamedTuple):
    "A call that was answered by an error of ours."
    error: Exception


def outcome(call, *inputs, says=()):
    "The result of `call(*inputs)`, or `Refused`; fails where the inputs were touched, or where the error is not one of this library's or names nothing."
    before = snapshot(inputs)
    try: result = call(*inputs)
    except (ValueError, TypeError, KeyError) as e:
        last = traceback.extract_tb(e.__traceback__)[-1]
        line = linecache.getline(last.filename, last.lineno).strip()
        source = Path(last.filename).read_text(encoding="utf-8").splitlines()
        raised = "raise " in line or any("raise " in o for o in source[max(0, last.lineno - 3):last.lineno])
        if not Path(last.filename).is_relative_to(PACKAGE) or not raised: raise AssertionError(f"not an error of ours: {type(e).__name__}: {e}") from e
        assert isinstance(e, StateDictKeyError) or not isinstance(e, KeyError), f"KeyError without words: {e}"
        assert any(str(o) in str(e) or repr(o) in str(e) for o in says), f"the message names none of {says}: {e}"
        result = Refused(e)
    assert snapshot(inputs) == before, "the inputs were changed"
    return result


def check_result(result, like, dtype=None):
    "The keys (in order), shapes and types of `like`; finite; in memory of its own."
    assert list(result) == list(like)
    for name, x in result.items():
        assert x.shape == like[name].shape and x.dtype == (dtype or like[name].dtype), (name, x.shape, x.dtype)
        assert torch.isfinite(x).all(), f"{name!r} has {int((~torch.isfinite(x)).sum())} values that are not finite"
    storages = [x.untyped_storage().data_ptr() for x in like.values() if x.numel()]
    assert not [n for n, x in result.items() if x.numel() and x.untyped_storage().data_ptr() in storages], "a result shares memory with an input"


def eps(dtype):
    "The precision a result in this type can have: that of its arithmetic (at least float32's noise level, which is also float64's), and of the type itself."
    return max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


def distance(a, b, floor=0.):
    "|a - b| relative to |b|, in float64 and without overflow."
    a, b = a.detach().double(), b.detach().double()
    unit = max(float(b.abs().max()) if b.numel() else 0., floor) or 1.
    return float((a / unit - b / unit).norm() / max(float((b / unit).norm()), 1e-300)) if b.any() else float((a / unit).norm())
