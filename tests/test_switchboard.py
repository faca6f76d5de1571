"""Switching a live model between compressed experts: exact, in place, and all or nothing."""
import itertools

import pytest
import torch
from torch import nn

from tsv_nb import CompressedTaskVector, Factors, StateDictKeyError, compress, task_vector
from tsv_nb.kernels import switchboard as module
from tsv_nb.kernels.switchboard import ResidentBytes, Switchboard, live_tensors

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


class Net(nn.Module):
    "Matrices of several shapes, vectors, a convolution, a scalar, floating-point and integer buffers, a tied layer."
    def __init__(self):
        super().__init__()
        self.embed, self.wide, self.tall = nn.Embedding(50, 24), nn.Linear(24, 7, bias=False), nn.Linear(7, 24)
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm1d(24), nn.Linear(24, 50, bias=False)
        self.scale = nn.Parameter(torch.tensor(2.))
        self.head.weight = self.embed.weight

    def forward(self, i): return self.head(self.norm(self.embed(i) + self.scale * self.tall(self.wide(self.embed(i)))))


def make_net(dtype=torch.float32):
    torch.manual_seed(0)
    return Net().to(dtype).eval()


def make_vector(net, seed):
    "A random task vector for a net, the same under tied names."
    g, out = torch.Generator().manual_seed(seed), {}
    for name, t in net.state_dict().items():
        if t.is_floating_point(): out[name] = (.1 * torch.randn(t.shape, generator=g, dtype=torch.float64)).to(t.dtype)
    if "head.weight" in out: out["head.weight"] = out["embed.weight"].clone()
    return out


def make_archives(net, n=3, **options):
    return {chr(65 + i): compress(make_vector(net, i), **{"ratio": .6, **options}) for i in range(n)}


def snapshot(net): return {k: t.clone() for k, t in net.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def net(): return make_net()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", [None, torch.float16])
def test_any_order_gives_the_same_bits(dtype, stored):
    net = make_net(dtype)
    archives, base = make_archives(net, dtype=stored), snapshot(net)
    board, seen = Switchboard(net, archives), {}
    for a, b in itertools.product(["A", "B", "C", None], repeat=2):
        for task in (a, b):
            board.switch(task)
            assert board.task == task
            assert same(seen.setdefault(task, snapshot(net)), snapshot(net))
    assert same(seen[None], base)
    assert not same(seen["A"], seen["B"]) and not same(seen["A"], base)
    for i in range(30): board.switch("ABC"[i % 3])
    board.switch("A")
    assert same(seen["A"], snapshot(net))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", [1., .3, -2., 0.])
def test_agrees_with_the_formula_in_float64(dtype, alpha):
    net = make_net(dtype)
    archives, base = make_archives(net), snapshot(net)
    Switchboard(net, archives).switch("B", alpha=alpha)
    eps = torch.finfo(dtype).eps
    for name, t in snapshot(net).items():
        if name not in archives["B"].dtypes: assert torch.equal(t, base[name]); continue
        f = archives["B"].factors.get(name)
        delta = f.U.double() * f.S.double() @ f.Vh.double() if f else archives["B"].dense[name].double()
        exact = base[name].double() + alpha * delta
        tolerance = max(eps, 1e-6 if dtype != torch.float64 else 1e-13)
        assert torch.linalg.norm(t.double() - exact) <= tolerance * torch.linalg.norm(exact), name
        # rounded once, not several times: within one unit in the last place of the rounded exact value
        if dtype.itemsize == 2: assert torch.all((t.double() - exact).abs() <= .51 * eps * exact.abs() + 1e-6), name


def test_every_kind_of_entry_is_switched(net):
    archives, base = make_archives(net, 1), snapshot(net)
    assert {"embed.weight", "wide.weight", "tall.weight"} <= set(archives["A"].factors)
    assert {"conv.weight", "scale", "norm.running_mean", "norm.weight", "tall.bias"} <= set(archives["A"].dense)
    Switchboard(net, archives).switch("A")
    now = snapshot(net)
    assert [k for k in base if torch.equal(base[k], now[k])] == ["norm.num_batches_tracked"]


def test_in_place(net):
    pointers, parameters, optimizer = {k: t.data_ptr() for k, t in net.state_dict().items()}, list(net.parameters()), torch.optim.SGD(net.parameters(), lr=.1)
    board = Switchboard(net.train(), make_archives(net))
    for task in ("B", None, "A"):
        board.switch(task)
        assert {k: t.data_ptr() for k, t in net.state_dict().items()} == pointers
    assert all(a is b for a, b in zip(net.parameters(), parameters)) and net.training
    assert all(p.requires_grad and p.is_leaf and p.grad_fn is None for p in net.parameters())
    expert = snapshot(net)
    net(torch.arange(5)).sum().backward()
    optimizer.step()
    assert not torch.equal(net.wide.weight, expert["wide.weight"])
    board.switch("A")
    assert torch.equal(net.wide.weight, expert["wide.weight"])


def test_autograd_notices_a_switch_before_backward(net):
    board = Switchboard(net, make_archives(net))
    loss = net(torch.arange(5)).sum()
    board.switch("A")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"): loss.backward()


def test_the_base_is_private(net):
    base, board = snapshot(net), Switchboard(net, make_archives(net))
    for p in net.parameters(): nn.init.constant_(p, 5.)
    board.switch(None)
    assert same({k: t for k, t in snapshot(net).items() if "num_" not in k}, {k: t for k, t in base.items() if "num_" not in k})


def test_tied_weights_stay_tied_and_are_counted_once(net):
    board = Switchboard(net, make_archives(net, 2))
    report = board.switch("A")
    assert net.head.weight is net.embed.weight
    floats = {t.data_ptr(): t.nbytes for t in net.state_dict().values() if t.is_floating_point()}
    assert report.bytes_written == sum(floats.values()) == board.nbytes.base
    assert report.n_matrices == len([f for n, f in make_archives(net, 1)["A"].factors.items() if n != "head.weight"])


def test_tied_names_may_be_missing_but_not_disagree(net):
    vector = make_vector(net, 0)
    one = compress({k: v for k, v in vector.items() if k != "embed.weight"}, ratio=.6)
    board = Switchboard(net, {"one": one, "both": compress(vector, ratio=.6)})
    board.switch("one"); first = snapshot(net)
    board.switch("both")
    assert same(first, snapshot(net))
    with pytest.raises(ValueError, match="'head.weight' and 'embed.weight' are one tensor"):
        board.add("two", compress(vector | {"head.weight": -vector["head.weight"]}, ratio=.6))


def test_untied_after_the_fact_is_noticed(net):
    board = Switchboard(net, make_archives(net))
    net.head.weight = nn.Parameter(net.embed.weight.detach().clone())
    with pytest.raises(ValueError, match="tied or untied"): board.switch("A")


def test_report_and_bytes(net):
    archives = make_archives(net, 2, dtype=torch.float16)
    board = Switchboard(net, archives)
    prepared = {t: a.nbytes - sum(o.nbytes for o in a.factors["head.weight"]) for t, a in archives.items()} # the tied entry is dropped
    base = sum({t.data_ptr(): t.nbytes for t in live_tensors(net).values()}.values())
    assert board.nbytes == ResidentBytes(base, base, sum(prepared.values()), 2 * base)
    assert board.nbytes.total == 2 * base + sum(prepared.values())
    report = board.switch("B")
    assert (report.task, report.bytes_read, report.bytes_written) == ("B", base + prepared["B"], base) and report.seconds > 0
    assert board.switch(None)[:4] == (None, base, base, 0)


def test_compiled_module_sees_the_new_weights(net):
    board, x = Switchboard(net, make_archives(net)), torch.arange(6)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    for task in ("A", "B", None, "A"):
        board.switch(task)
        with torch.no_grad(): assert torch.equal(compiled(x), net(x))


def test_one_call_for_all_matrices(net, monkeypatch):
    calls, real = [], module.lowrank_reconstruct_grouped

    def spy(factors, *args, **kwargs):
        calls.append(len(factors))
        assert all(t.is_contiguous() for f in factors for t in f)
        return real(factors, *args, **kwargs)
    monkeypatch.setattr(module, "lowrank_reconstruct_grouped", spy)
    report = Switchboard(net, make_archives(net)).switch("A")
    assert calls == [report.n_matrices] and report.n_matrices >= 3


def test_prefix(net):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.visual, self.other = net, nn.Linear(3, 3)
    outer, archives = Outer(), make_archives(net)
    base, kept = snapshot(net), outer.other.weight.detach().clone()
    board = Switchboard(outer, archives, prefix="visual.")
    board.switch("A"); prefixed = snapshot(net)
    board.switch(None); assert same(snapshot(net), base)
    Switchboard(net, archives).switch("A")
    assert same(snapshot(net), prefixed) and torch.equal(outer.other.weight, kept)
    with pytest.raises(StateDictKeyError, match="missing"): Switchboard(outer, archives)
    with pytest.raises(ValueError, match="whose name starts with 'vision.'"): Switchboard(outer, archives, prefix="vision.")


def test_a_state_dict_that_shares_memory(net):
    board = Switchboard(net.state_dict(), make_archives(net))
    board.switch("A"); a = snapshot(net)
    board.switch(None)
    assert not same(a, snapshot(net))


def test_archives_from_disk(net, tmp_path):
    archives = make_archives(net)
    paths = {t: a.save(tmp_path / f"{t}.safetensors") for t, a in archives.items()}
    direct, loaded = Switchboard(net, archives), Switchboard(net, {"A": paths["A"], "B": str(paths["B"])})
    for t in "AB":
        direct.switch(t); first = snapshot(net)
        direct.switch(None); loaded.switch(t)
        for k, v in snapshot(net).items(): torch.testing.assert_close(v, first[k], rtol=1e-6, atol=1e-7)
    with pytest.raises(FileNotFoundError, match="nothing.safetensors"): loaded.add("C", tmp_path / "nothing.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(paths["A"].read_bytes()[:500])
    with pytest.raises(ValueError, match="damaged"): loaded.add("C", tmp_path / "cut.safetensors")
    assert loaded.tasks == ["A", "B"]


def broken(net, kind):
    "An archive with one thing wrong."
    archive = make_archives(net, 1)["A"]
    f, factors, dense = archive.factors["wide.weight"], dict(archive.factors), dict(archive.dense)
    if kind == "shape": factors["wide.weight"] = Factors(f.U[:-1], f.S, f.Vh)
    if kind == "dense shape": dense["conv.weight"] = dense["conv.weight"][:-1]
    if kind == "rank": factors["wide.weight"] = Factors(f.U, f.S[:-1], f.Vh)
    if kind == "dtypes": factors["wide.weight"] = Factors(f.U, f.S, f.Vh.half())
    if kind == "missing": del dense["scale"]
    if kind == "unexpected": dense["extra"] = torch.ones(2)
    if kind == "nan": dense["scale"] = torch.tensor(float("nan"))
    if kind == "factor nan": factors["wide.weight"] = Factors(f.U, f.S * float("inf"), f.Vh)
    if kind == "integers": dense["scale"] = torch.tensor(1)
    if kind == "device": dense["scale"] = torch.ones((), device="meta")
    return CompressedTaskVector(factors, dense, archive.dtypes)


KINDS = {"shape": r"'wide.weight' has shape \(6, 24\), the model has \(7, 24\)", "dense shape": r"'conv.weight' has shape \(3, 3, 3, 3\), the model has \(4, 3, 3, 3\)",
         "rank": "factors of 'wide.weight' do not fit", "dtypes": "factors of 'wide.weight' do not fit", "missing": r"1 missing \('scale'\)", "unexpected": r"1 unexpected \('extra'\)",
         "nan": "'scale' has 1 of 1", "factor nan": "'wide.weight' has", "integers": "'scale' is stored in torch.int64", "device": "'scale' is on meta, the model on cpu"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_archive_changes_nothing(net, kind):
    board = Switchboard(net, make_archives(net, 2))
    board.switch("B"); before = snapshot(net)
    with pytest.raises((ValueError, KeyError), match=KINDS[kind]) as error: board.add("C", broken(net, kind))
    assert "archive 'C'" in str(error.value)
    assert same(before, snapshot(net)) and board.task == "B" and board.tasks == ["A", "B"]
    with pytest.raises((ValueError, KeyError), match=KINDS[kind]): Switchboard(net, {"C": broken(net, kind)})
    assert same(before, snapshot(net))


def test_wrong_calls(net):
    board = Switchboard(net, make_archives(net, 2))
    board.switch("A"); before = snapshot(net)
    for task in ("C", "", 0):
        with pytest.raises(ValueError, match="unknown task .*; known: 'A', 'B'"): board.switch(task)
    for alpha in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="alpha must be a finite number"): board.switch("B", alpha=alpha)
    with pytest.raises(ValueError, match="registered already"): board.add("A", make_archives(net, 1)["A"])
    with pytest.raises(TypeError, match="must be a string, got None"): board.add(None, make_archives(net, 1)["A"])
    with pytest.raises(TypeError, match=r"got dict; pass compress\(vector\)"): board.add("C", make_vector(net, 0))
    with pytest.raises(ValueError, match="is in the live model"): board.remove("A")
    with pytest.raises(ValueError, match="unknown task 'C'"): board.remove("C")
    assert same(before, snapshot(net)) and board.task == "A"
    board.remove("B")
    assert board.tasks == ["A"] and board.nbytes.dense == board.nbytes.base


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_switch_returns_to_the_base(net, monkeypatch, error):
    base, board = snapshot(net), Switchboard(net, make_archives(net))
    board.switch("A")

    def fail(factors, base, alpha, out):
        out[0].fill_(7.)
        raise error
    monkeypatch.setattr(module, "lowrank_reconstruct_grouped", fail)
    with pytest.raises(error): board.switch("B")
    assert same(base, snapshot(net)) and board.task is None
    monkeypatch.undo()
    board.switch("B")
    assert board.task == "B"


@pytest.mark.parametrize("change", [lambda n: n.half(), lambda n: setattr(n, "wide", nn.Linear(24, 8, bias=False)), lambda n: delattr(n, "scale")])
def test_a_model_that_has_changed_is_noticed(net, change):
    board = Switchboard(net, make_archives(net))
    change(net); before = snapshot(net)
    with pytest.raises(ValueError, match="make a new Switchboard"): board.switch("A")
    assert same(before, snapshot(net))


def test_new_memory_of_the_same_kind_is_found(net):
    "Loading with assign=True replaces every parameter; the board must write to the new ones."
    board = Switchboard(net, make_archives(net))
    board.switch("A"); expert = snapshot(net)
    net.load_state_dict({k: torch.zeros_like(t) for k, t in net.state_dict().items()}, assign=True)
    net.head.weight = net.embed.weight
    board.switch("A")
    assert same(expert, snapshot(net))


def test_tensors_that_cannot_be_written():
    with torch.inference_mode(): made = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="'weight' was made in inference mode"): Switchboard(made)
    with pytest.raises(ValueError, match="'w' is expanded"): Switchboard({"w": torch.zeros(1, 3).expand(2, 3)})
    w = torch.zeros(9, 4)
    with pytest.raises(ValueError, match="'w' and 'q' overlap|'q' and 'w' overlap"): Switchboard({"w": w, "q": w[:3]})
    with pytest.raises(ValueError, match="'w' is torch.float8_e4m3fn"): Switchboard({"w": torch.zeros(2).to(torch.float8_e4m3fn)})
    with pytest.raises(TypeError, match="expected a dict of tensors"): Switchboard([w])


@pytest.mark.parametrize("view", [lambda n: torch.zeros(n, n).T, lambda n: torch.zeros(n, 3 * n)[:, ::3], lambda n: torch.zeros(2 * n, n)[n:]])
def test_strided_live_tensors(view):
    g = torch.Generator().manual_seed(0)
    live, delta = {"w": view(20)}, torch.randn(20, 2, generator=g) @ torch.randn(2, 20, generator=g)
    live["w"].normal_(generator=g)
    base, pointer, stride = live["w"].clone(), live["w"].data_ptr(), live["w"].stride()
    board = Switchboard(live, {"A": compress({"w": delta}, rank=2)})
    board.switch("A")
    torch.testing.assert_close(live["w"], base + delta)
    assert (live["w"].data_ptr(), live["w"].stride()) == (pointer, stride)
    board.switch(None)
    assert torch.equal(live["w"], base)


def test_zero_matrices_and_empty_models():
    net = nn.Linear(6, 4)
    after = {k: t.clone() for k, t in net.state_dict().items()} | {"bias": net.bias.detach() + 1}
    archive = compress(task_vector(net.state_dict(), after))
    assert archive.factors["weight"].rank == 0
    Switchboard(net, {"A": archive}).switch("A")
    assert same(after, snapshot(net))
    with pytest.raises(ValueError, match="no floating-point tensor"): Switchboard(nn.ReLU())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_the_gpu(dtype):
    net = make_net(dtype).cuda()
    archives, base = {t: compress({k: v.cuda() for k, v in make_vector(make_net(dtype), i).items()}, ratio=.6) for i, t in enumerate("AB")}, snapshot(net)
    board, seen = Switchboard(net, archives), {}
    for task in ("A", "B", None) * 20:
        board.switch(task)
        assert same(seen.setdefault(task, snapshot(net)), snapshot(net))
    assert same(seen[None], base)
    with pytest.raises(ValueError, match="the model on cuda"): board.add("C", make_archives(make_net(dtype), 1)["A"])
