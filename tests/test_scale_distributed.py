"""The Ray engine on a cluster of several nodes on this machine: a node killed in the middle, errors of units, resources that nobody has, resuming across engines."""
import contextlib
import errno
import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ray_nodes import add_node, kill_node, light_nodes
from safetensors.torch import save_file
from web_server import served

from tsv_nb.scale import commands, distributed
from tsv_nb.scale.checkpoints import open_checkpoint
from tsv_nb.scale.distributed import ray_connection, ray_engine, unit_slots
from tsv_nb.scale.plan import make_plan
from tsv_nb.scale.stream import local_engine, run_plan, run_unit

ROOT = Path(__file__).resolve().parent.parent
N_UNITS = 8


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    "Paths of a base and two tasks whose tensors are units of their own."
    folder, g = tmp_path_factory.mktemp("inputs"), torch.Generator().manual_seed(0)
    base = {f"layer.{i}.weight": torch.randn(48, 40, generator=g) for i in range(N_UNITS)}
    for name, scale in (("base", 0.), ("a", .1), ("b", .1)):
        save_file({k: v + scale * torch.randn(v.shape, generator=g) for k, v in base.items()}, folder / f"{name}.safetensors")
    return folder


def make_run(inputs, out, **options):
    "`run(engine)` merges into `out`; `inputs` is a folder or an address."
    base, *tasks = [open_checkpoint(f"{inputs}/{name}.safetensors") for name in ("base", "a", "b")]
    tasks = dict(zip("ab", tasks))
    plan = one_unit_each(make_plan("merge", base, tasks, threads=1))
    return lambda engine=local_engine: run_plan(plan, base, tasks, out, engine=engine, progress=False, **options)


def one_unit_each(plan):
    from dataclasses import replace
    return replace(plan, units=tuple((t.name,) for t in plan.tensors))


def digests(out):
    "{file: sha256} of a result, without the report, which has times in it."
    files = [out] if out.is_file() else [p for p in out.iterdir() if p.name != "tsv_report.json"]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def reference(inputs, tmp_path_factory):
    "What the local engine writes."
    out = tmp_path_factory.mktemp("reference") / "out"
    make_run(inputs, out)()
    return digests(out)


@pytest.fixture(scope="module")
def cluster():
    "A head that does no work and two nodes, and a connection that the tests share, so that workers are started once."
    ray = pytest.importorskip("ray", reason="needs Ray: pip install 'tsv-nb[ray]'")
    from ray.cluster_utils import Cluster
    with pytest.MonkeyPatch.context() as m:
        m.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
        c = Cluster()
        with light_nodes():
            try:
                try:
                    add_node(c, num_cpus=0)
                    c.nodes = [add_node(c, num_cpus=1) for _ in range(2)]
                    ray.init(c.address, log_to_driver=False, logging_level="error")
                except Exception as e: (pytest.fail if os.environ.get("CI") else pytest.skip)(f"Ray could not start its nodes; this machine may be too busy: {e}") # it raises a bare Exception
                yield c
            finally: ray.shutdown(); c.shutdown()


def stopping(engine, after, what):
    "An engine that calls `what` once `after` units have landed."
    def stop(job, units):
        for n, unit in enumerate(engine(job, units), 1):
            yield unit
            if n == after: what()
    return stop


def counted(path):
    "Lines of a file that workers append to."
    return Path(path).read_text().split() if Path(path).exists() else []


# Without a cluster

def test_slots():
    node = {"CPU": 8., "GPU": 2., "memory": 32e9}
    assert [unit_slots(node, n) for n in ({"CPU": 3}, {"CPU": 1, "GPU": .1}, {"CPU": 1, "GPU": 3}, {"CPU": 1, "memory": 20e9}, {"memory": 0}, {"CPU": 1, "TPU": 1})] == [2, 8, 0, 1, 1, 0]
    assert unit_slots({"CPU": 10, "GPU": 1}, {"CPU": 1, "GPU": .1}) == 10 # 1 // .1 is 9


@pytest.mark.parametrize("option", ["num_gpus", "num_cpus", "max_retries", "memory", "patience", "straggler"])
def test_negative_options_are_refused(option):
    with pytest.raises(ValueError, match=option): ray_engine(**{option: -1})


def test_without_ray_the_message_says_what_to_install(inputs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'tsv-nb\[ray\] @ git\+https://github.com/tsv-nb/tsv-nb'$"): make_run(inputs, tmp_path / "out")(ray_engine())
    assert not (tmp_path / "out").exists()


def test_nothing_to_do_needs_no_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert list(ray_engine("127.0.0.1:1")(None, [])) == []


def test_unreachable_address():
    pytest.importorskip("ray")
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=f"no Ray cluster at '127.0.0.1:{port}' .*ray start --head"):
        with ray_connection(f"127.0.0.1:{port}"): pass
    assert time.monotonic() - start < 6


@pytest.mark.parametrize("address, text", [(None, "Ray did not start on this machine .The current node timed out during startup.*try again, or start Ray yourself with `ray start --head` and pass the address that it prints"),
                                           ("auto", "no Ray cluster at 'auto' .The current node timed out.*ray start --head")])
def test_ray_that_is_slow_to_start(inputs, tmp_path, monkeypatch, address, text):
    "It raises a bare Exception, which a command would show with a traceback."
    ray = pytest.importorskip("ray")
    if ray.is_initialized(): pytest.skip("a connection is open")
    closed = []
    def init(*args, **options): raise Exception("The current node timed out during startup. This could happen because some of the Ray processes failed to startup.\nMore.")
    monkeypatch.setattr(ray, "init", init); monkeypatch.setattr(ray, "shutdown", lambda: closed.append(1))
    with pytest.raises(SystemExit, match=text): tsv_merge(inputs, tmp_path / "out", "--engine", "ray", *(["--address", address] if address else []))
    assert closed and not (tmp_path / "out").exists()


def test_a_worker_needs_memory_for_itself(inputs, tmp_path, monkeypatch):
    "What is reserved is the plan's growth and what a process takes that has imported everything."
    taken = subprocess.run([sys.executable, "-c", "import tsv_nb.scale.distributed; from tsv_nb.scale.stream import peak_rss; print(peak_rss())"], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True).stdout
    assert .5 * distributed.WORKER_BYTES < int(taken) < 1.1 * distributed.WORKER_BYTES
    reserved = []
    class Flight:
        "Notes what a unit needs."
        def __init__(self, ray, job, work, token, needs, retries): reserved.append((needs["memory"], job.plan.peak_bytes)); raise KeyboardInterrupt
    monkeypatch.setattr(distributed, "_Flight", Flight)
    monkeypatch.setattr(distributed, "ray_connection", lambda address: contextlib.nullcontext())
    for memory in (None, 5):
        with pytest.raises(KeyboardInterrupt): make_run(inputs, tmp_path / "out")(ray_engine(memory=memory))
    assert [m for m, _ in reserved] == [reserved[0][1] + distributed.WORKER_BYTES, 5]


# On a cluster

def test_same_bytes_as_the_local_engine(cluster, inputs, reference, tmp_path):
    import ray
    make_run(inputs, tmp_path / "out")(ray_engine())
    assert digests(tmp_path / "out") == reference and ray.is_initialized() # the connection was ours
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def on_nodes(monkeypatch, diary):
    "Have workers write down where they are; a function that reads it: [(process, node)], one for every copy of a unit."
    def noted(*args):
        import ray
        from tsv_nb.scale.distributed import _on_worker
        open(diary, "a").write(f"{os.getpid()}:{ray.get_runtime_context().get_node_id()}:{','.join(map(str, ray.get_gpu_ids()))}\n")
        return _on_worker(*args)
    monkeypatch.setattr(distributed, "_on_worker", noted)
    return lambda: [tuple(line.split(":")) for line in counted(diary)]


def tsv_merge(inputs, out, *argv, cut=one_unit_each):
    "The command, with a unit for each tensor."
    make = commands.make_plan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "make_plan", lambda *args, **options: cut(make(*args, **options)))
        commands.tsv_merge([*(f"{inputs}/{name}.safetensors" for name in ("base", "a", "b")), "--out", str(out), "--threads", "1", "--quiet", *map(str, argv)])


def test_the_command_runs_on_the_nodes_of_its_address(cluster, inputs, reference, tmp_path, monkeypatch):
    where = on_nodes(monkeypatch, str(tmp_path / "diary"))
    tsv_merge(inputs, tmp_path / "out", "--engine", "ray", "--address", cluster.address)
    assert digests(tmp_path / "out") == reference
    assert len(where()) >= N_UNITS and {node for _, node, _ in where()} <= {n.node_id for n in cluster.nodes} and str(os.getpid()) not in {pid for pid, *_ in where()}
    with pytest.raises(SystemExit, match="is connected to the Ray cluster at .*; leave the address out"): tsv_merge(inputs, tmp_path / "other", "--engine", "ray", "--address", "10.0.0.1:6379") # it is the address that decides


def test_units_with_a_gpu(cluster, inputs, reference, tmp_path, monkeypatch):
    "A node that says it has one; Ray believes it, and a process for each unit that has a GPU is its way, so there is one unit."
    where, argv = on_nodes(monkeypatch, str(tmp_path / "diary")), ["--engine", "ray", "--address", cluster.address, "--num-gpus", "1", "--memory-per-unit", "300MB"]
    node = add_node(cluster, num_cpus=1, num_gpus=1)
    try:
        tsv_merge(inputs, tmp_path / "out", *argv, "--device", "cpu", cut=lambda plan: plan)
        if not torch.cuda.is_available():
            with pytest.raises(SystemExit, match="node .*: the plan decomposes matrices on a GPU .*PyTorch finds none here"): tsv_merge(inputs, tmp_path / "other", *argv, cut=lambda plan: plan)
    finally: cluster.remove_node(node)
    assert digests(tmp_path / "out") == reference and {(n, gpus) for _, n, gpus in where()} == {(node.node_id, "0")}


def test_a_plan_for_gpus_asks_for_them(inputs, tmp_path, monkeypatch):
    needed = []
    class Flight:
        "Notes what a unit needs."
        def __init__(self, ray, job, work, token, needs, retries): needed.append(needs["GPU"]); raise KeyboardInterrupt
    monkeypatch.setattr(distributed, "_Flight", Flight)
    monkeypatch.setattr(distributed, "ray_connection", lambda address: contextlib.nullcontext())
    base, *tasks = [open_checkpoint(inputs / f"{name}.safetensors") for name in ("base", "a", "b")]
    for device, asked in (("cpu", None), ("cuda", None), ("cuda", .5), ("cpu", 1)):
        with pytest.raises(KeyboardInterrupt): run_plan(make_plan("merge", base, dict(zip("ab", tasks)), threads=1, device=device), base, dict(zip("ab", tasks)), tmp_path / f"{device}{asked}", engine=ray_engine(num_gpus=asked), progress=False)
    assert needed == [0, 1, .5, 1]


def test_a_node_with_another_gpu():
    flight = object.__new__(distributed._Flight)
    flight.first = {}
    flight.compare(dict(gpu="A")); flight.compare(dict(gpu="A"))
    with pytest.warns(UserWarning, match="a node computes with {'gpu': 'B'}, another one with {'gpu': 'A'}"): flight.compare(dict(gpu="B"))


def test_inputs_at_an_address_are_read_by_the_workers(cluster, inputs, reference, tmp_path, monkeypatch):
    where = on_nodes(monkeypatch, str(tmp_path / "diary"))
    with served(inputs) as (url, asked):
        run = make_run(url, tmp_path / "out")
        asked.clear() # headers, for the plan
        run(ray_engine())
    assert digests(tmp_path / "out") == reference and len(where()) >= N_UNITS
    assert {path for path, _ in asked} == {f"/{name}.safetensors" for name in ("base", "a", "b")} and len(asked) >= 3 * N_UNITS # in pieces, each where it is needed


@pytest.mark.parametrize("first, second", [(local_engine, ray_engine()), (ray_engine(), local_engine)], ids=["local, then ray", "ray, then local"])
def test_one_engine_goes_on_where_the_other_stopped(cluster, inputs, reference, tmp_path, first, second):
    def stop(): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): make_run(inputs, tmp_path / "out")(stopping(first, 3, stop))
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").exists()
    todo = []
    def counting(job, units): todo.extend(units); yield from second(job, units)
    make_run(inputs, tmp_path / "out")(counting)
    assert digests(tmp_path / "out") == reference and 0 < len(todo) <= N_UNITS - 3


def test_a_node_that_computes_otherwise(cluster, inputs, reference, tmp_path, monkeypatch): # the reference first: MKL looks at the variable once
    "Told when it is noticed, and in the report."
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE") # of this process; the workers run already
    with pytest.warns(UserWarning, match="a node computes with .*this process with .*COMPATIBLE.*last bits"): report = make_run(inputs, tmp_path / "out")(ray_engine())
    assert [m.get("MKL_CBWR") for m in report["session"]["machines"]] == [None]


def test_after_ctrl_c_nothing_goes_on(cluster, inputs, tmp_path):
    diary = str(tmp_path / "diary")
    def slow(job, unit): time.sleep(.3); run_unit(job, unit); open(diary, "a").write(f"{unit}\n")
    def stop(): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): make_run(inputs, tmp_path / "out")(stopping(ray_engine(work=slow), 2, stop))
    before = counted(diary)
    time.sleep(1)
    assert counted(diary) == before and len(before) < N_UNITS and not (tmp_path / "out.partial" / "token.tmp").exists()


def test_a_unit_that_fails_fails_the_run(cluster, inputs, reference, tmp_path):
    tries = str(tmp_path / "tries")
    def faulty(job, unit):
        if unit == 3: open(tries, "a").write("x\n"); raise ValueError("tensor 'w' has 1 of 9 values that are NaN")
        run_unit(job, unit)
    with pytest.raises(ValueError) as e: make_run(inputs, tmp_path / "out")(ray_engine(work=faulty))
    assert str(e.value) == "tensor 'w' has 1 of 9 values that are NaN" and type(e.value) is ValueError and e.value.__cause__ is None
    assert len(counted(tries)) == 1 and not (tmp_path / "out").exists() # not tried again
    make_run(inputs, tmp_path / "out")(ray_engine())
    assert digests(tmp_path / "out") == reference


@pytest.mark.parametrize("code, tried", [(errno.ESTALE, 2), (errno.ENOSPC, 1)])
def test_a_file_server_may_hiccup_a_disk_may_not_be_full(cluster, inputs, reference, tmp_path, code, tried):
    tries, (first, *_) = str(tmp_path / "tries"), [0]
    def faulty(job, unit):
        if unit == 0:
            open(tries, "a").write("x\n")
            if len(open(tries).readlines()) == 1: raise OSError(code, os.strerror(code), "x.safetensors")
        run_unit(job, unit)
    if tried == 1:
        with pytest.raises(OSError, match="No space left"): make_run(inputs, tmp_path / "out")(ray_engine(work=faulty))
    else:
        make_run(inputs, tmp_path / "out")(ray_engine(work=faulty))
        assert digests(tmp_path / "out") == reference
    assert len(counted(tries)) == tried


def test_a_worker_that_dies_is_replaced(cluster, inputs, reference, tmp_path, caplog):
    mark = str(tmp_path / "mark")
    def deadly(job, unit):
        if unit == 2 and not os.path.exists(mark): open(mark, "w").close(); os._exit(1)
        run_unit(job, unit)
    make_run(inputs, tmp_path / "out")(ray_engine(work=deadly))
    assert digests(tmp_path / "out") == reference and "unit 2 (layer.2.weight) was lost" in caplog.text and "started again (1 of 3)" in caplog.text


def test_a_unit_that_always_kills_its_worker_ends_the_run(cluster, inputs, tmp_path):
    def deadly(job, unit): os._exit(1) if unit == 0 else run_unit(job, unit)
    with pytest.raises(OSError, match=r"unit 0 \(layer.0.weight\) was lost.*That was try 2.*run the same command again"): make_run(inputs, tmp_path / "out")(ray_engine(work=deadly, max_retries=1))
    assert not (tmp_path / "out").exists()


def test_resources_that_nobody_has(cluster, inputs, reference, tmp_path):
    for options, asked in ((dict(num_gpus=2), "1 CPU, 2 GPUs"), (dict(memory=2**50), r"1e\+06 GiB")):
        start = time.monotonic()
        with pytest.raises(ValueError, match=f"a unit needs .*{asked}.*no node of the Ray cluster has that. Its nodes: .* x .1 CPU, 0 GPUs"): make_run(inputs, tmp_path / "out")(ray_engine(patience=.5, **options))
        assert time.monotonic() - start < 5
    make_run(inputs, tmp_path / "out")(ray_engine())
    assert digests(tmp_path / "out") == reference


def test_a_node_that_comes_late_is_waited_for(cluster, inputs, reference, tmp_path):
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(1) as pool: # the run in the thread: Ray starts nodes in the main one
        run = pool.submit(make_run(inputs, tmp_path / "out"), ray_engine(num_cpus=3, patience=30))
        time.sleep(.5)
        late = add_node(cluster, num_cpus=3)
        run.result(60)
    cluster.remove_node(late)
    assert digests(tmp_path / "out") == reference


def test_a_work_folder_that_a_node_does_not_see(cluster, inputs, tmp_path, monkeypatch):
    from contextlib import contextmanager
    @contextmanager
    def elsewhere(folder): yield str(Path(folder) / "not there"), "x"
    monkeypatch.setattr(distributed, "_token", elsewhere)
    with pytest.raises(ValueError, match="does not see the work folder '.*out.partial': write to storage that all nodes share"): make_run(inputs, tmp_path / "out")(ray_engine())


def test_a_straggler_gets_a_second_copy(cluster, inputs, reference, tmp_path, caplog):
    mark = str(tmp_path / "mark")
    def lame(job, unit):
        if unit == 1 and not os.path.exists(mark): open(mark, "w").close(); time.sleep(60)
        run_unit(job, unit)
    start = time.monotonic()
    make_run(inputs, tmp_path / "out")(ray_engine(work=lame))
    assert digests(tmp_path / "out") == reference and time.monotonic() - start < 50 and "unit 1 takes longer" in caplog.text


def test_only_some_units_are_in_flight(cluster, inputs, tmp_path, monkeypatch):
    most, start = [], distributed._Flight.start
    def watched(self, unit): start(self, unit); most.append(len(self.flying))
    monkeypatch.setattr(distributed._Flight, "start", watched)
    make_run(inputs, tmp_path / "out")(ray_engine())
    assert max(most) == 4 < N_UNITS # two nodes with a CPU each, two units for each


def test_a_package_that_a_node_lacks(cluster, inputs, tmp_path):
    def lacking(job, unit): import no_such_package
    with pytest.raises(ImportError, match=r"cannot run this .*no_such_package.*the version of this process .* on all nodes: pip install 'tsv-nb\[ray\] @ git"): make_run(inputs, tmp_path / "out")(ray_engine(work=lacking))


def test_another_address_than_the_open_one(cluster):
    with pytest.raises(ValueError, match="is connected to the Ray cluster at .*ray.shutdown"):
        with ray_connection("10.0.0.1:6379"): pass


def test_a_node_killed_in_the_middle(cluster, inputs, reference, tmp_path):
    diary = tmp_path / "diary"
    def slow(job, unit, diary=str(diary)):
        import ray
        def note(what): open(diary, "a").write(f"{what}:{unit}:{ray.get_runtime_context().get_node_id()}\n")
        note("begin"); time.sleep(.8); run_unit(job, unit); note("end")
    def kill():
        while True: # until a node is in the middle of a unit
            entries = [line.split(":") for line in counted(diary)]
            busy = {(u, n) for what, u, n in entries if what == "begin"} - {(u, n) for what, u, n in entries if what == "end"}
            if node := next((n for n in cluster.nodes if n.node_id in {b[1] for b in busy}), None): break
            time.sleep(.02)
        cluster.nodes.remove(node); kill_node(cluster, node)
    make_run(inputs, tmp_path / "out")(stopping(ray_engine(work=slow), 3, kill))
    assert digests(tmp_path / "out") == reference
    assert sum(line.startswith("begin") for line in counted(diary)) > N_UNITS # something was done again
