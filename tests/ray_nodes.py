"""Nodes of a pretended Ray cluster without the helpers that serve its dashboard: each of those imports for seconds, and Ray gives up a node whose helpers take longer than 15 s, as they do where many tests run at a time.

Run as a program, this file stands in for such a helper: it says that it serves nothing, and ends with its node.
"""
import os
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

HELPERS = {"dashboard_agent": ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port"), "runtime_env_agent": ("runtime_env_agent_port",)}


@contextmanager
def light_nodes():
    "Within the block, `ray.cluster_utils.Cluster` starts nodes that are there within a second; where Ray's inside has changed, ordinary ones."
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_raylet_start_wait_time_s": "25"}
    from ray._private import node, services
    build, serve = getattr(services, "_build_python_executable_command_memory_profileable", None), getattr(node.Node, "start_api_server", None)
    if not (build and serve): yield; return
    def light(component, *args, **kwargs): return [sys.executable, "-S", "-E", __file__, component] if component in HELPERS else build(component, *args, **kwargs)
    services._build_python_executable_command_memory_profileable, node.Node.start_api_server = light, lambda *args, **kwargs: None
    try: yield
    finally: services._build_python_executable_command_memory_profileable, node.Node.start_api_server = build, serve


def add_node(cluster, **resources):
    "One more node with little memory for objects; the first one is the head."
    return cluster.add_node(object_store_memory=80_000_000, include_dashboard=False, no_monitor=True, include_log_monitor=False, **resources)


def kill_node(cluster, node):
    "Kill all processes of a node at once, as a power cut does: its workers would otherwise notice only after a moment."
    import psutil # comes with Ray
    top = psutil.Process(node.all_processes["raylet"][0].process.pid)
    for process in [*top.children(recursive=True), top]:
        with suppress(psutil.NoSuchProcess): process.kill() # a worker may end by itself meanwhile
    cluster.remove_node(node, allow_graceful=False)


if __name__ == "__main__":
    options = dict(o.removeprefix("--").split("=", 1) for o in sys.argv if "=" in o)
    for name in HELPERS[sys.argv[1]]:
        path = Path(options["session-dir"]) / f"{name}_{options['node-id']}"
        path.with_suffix(".tmp").write_text("1"); path.with_suffix(".tmp").rename(path)
    parent = os.getppid()
    while os.getppid() == parent: time.sleep(.5)
