"""What every console command promises: help with an example, suggestions, 80 columns, silence when asked for, and a good end after Ctrl-C."""
import configparser
import importlib
import os
import pty
import shlex
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tsv_nb import console
from tsv_nb.scale.lora import Adapter, LoraLayer
from tsv_nb.scale.lora_files import save_adapter

ROOT = Path(__file__).resolve().parent.parent
CONFIG = configparser.ConfigParser(delimiters=["="], interpolation=None)
CONFIG.read(ROOT / "settings.ini", encoding="utf-8")
SCRIPTS = dict(line.split("=") for line in CONFIG["DEFAULT"]["console_scripts"].split()) if CONFIG["DEFAULT"] else {} # name -> module:function
pytestmark = pytest.mark.skipif(not SCRIPTS, reason="needs the source tree")
each = pytest.mark.parametrize("name", SCRIPTS)


def entry(name):
    module, function = SCRIPTS[name].split(":")
    return getattr(importlib.import_module(module), function)


def ended(capsys, name, *argv):
    "Exit code, standard output and standard error of a command that ends at once."
    with pytest.raises(SystemExit) as e: entry(name)(list(argv))
    out, err = capsys.readouterr()
    return e.value.code, out, err


def shell(name, *argv, **kwargs):
    "The command in a process of its own, as its script starts it."
    module, function = SCRIPTS[name].split(":")
    return [sys.executable, "-c", f"import sys; from {module} import {function}; sys.argv[0] = {name!r}; sys.exit({function}())", *map(str, argv)]


def run(name, *argv, **kwargs):
    return subprocess.run(shell(name, *argv), capture_output=True, text=True, timeout=600, **kwargs)


def example(capsys, name):
    code, out, err = ended(capsys, name, "--help")
    assert code == 0 and not err
    return out.splitlines()[-1].removeprefix("Example: ")


@each
def test_help_is_80_columns_wide_and_says_what_each_option_is(name, capsys, monkeypatch):
    for columns, widest in ("200", 80), ("60", 60):
        monkeypatch.setenv("COLUMNS", columns)
        code, out, err = ended(capsys, name, "--help")
        assert code == 0 and not err and out.startswith(f"usage: {name} ")
        assert max(map(len, out.splitlines())) <= widest
    assert "--quiet" in out and not [o for o in console_options(name) if not o.help]


def console_options(name):
    "The actions of a command's parser."
    made, parser = [], console.command_parser
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console, "command_parser", lambda *args: made.append(parser(*args)) or made[0])
        with pytest.raises(SystemExit): entry(name)(["--no-such-option"])
    return made[0]._actions


@each
def test_the_example_is_a_command_that_would_run(name, capsys, monkeypatch):
    line = example(capsys, name)
    command, *argv = shlex.split(line)
    assert command == name and argv and len(line) < 71
    def parsed(*args): raise SystemExit(str(options(*args)))
    options = console.command_options
    monkeypatch.setattr(console, "command_options", parsed)
    code, out, err = ended(capsys, name, *argv)
    assert "'quiet': False" in code and not err


@each
def test_a_wrong_option_suggests_the_right_one(name, capsys):
    options = console_options(name)
    capsys.readouterr()
    for action in options:
        for option in (o for o in action.option_strings if len(o) > 4):
            wrong = option[:3] + option[4:] # a letter is missing
            code, out, err = ended(capsys, name, wrong, "1")
            assert code == 2 and not out and err.count("\n") == 1 and f"unknown option {wrong}; did you mean " in err and f"{option}" in err, err
    code, out, err = ended(capsys, name, "--zzzz")
    assert (code, out, err) == (2, "", f"{name}: unknown option --zzzz. {name} --help shows the options.\n")


WRONG = {"tsv_demo": (["--tasks", "eight"], 2, "--tasks: 'eight' is no whole number."), "tsv_finetune": (["--tasks", "MNITS"], 1, "did you mean 'MNIST'?"),
         "tsv_eval": (["--methods", "tsvm"], 1, "Did you mean 'tsv'?")}


@each
def test_errors_fit_a_terminal(name, tmp_path):
    "On a terminal, lines of at most 80 columns; in a pipe, one line."
    argv, code, text = WRONG.get(name, (["--qiet"], 2, "did you mean --quiet?"))
    piped = run(name, *argv, cwd=tmp_path)
    assert piped.returncode == code and piped.stdout == "" and text in piped.stderr and piped.stderr.count("\n") == 1
    screen, terminal = pty.openpty()
    done = subprocess.run(shell(name, *argv), stdin=terminal, stdout=subprocess.PIPE, stderr=terminal, timeout=600, cwd=tmp_path, env={k: v for k, v in os.environ.items() if k != "COLUMNS"})
    os.close(terminal)
    shown = b""
    try:
        while part := os.read(screen, 65536): shown += part
    except OSError: os.close(screen) # Linux: all is read, and the other end is closed
    shown = shown.decode().replace("\r\n", "\n")
    assert done.returncode == code and shown.split() == piped.stderr.split() and max(map(len, shown.splitlines())) <= 80


SHORT = {"tsv_demo": ["--tasks", "1"], "tsv_finetune": [*"--model glyph --tasks digits --epochs 1".split()], "tsv_eval": [*"--tasks 1 --methods zero_shot --alpha 1".split()]}
SLOW = {"tsv_demo": ["--tasks", "8"], "tsv_finetune": [*"--model glyph --tasks digits --epochs 50 --checkpoint-every 2".split()], "tsv_eval": ["--tasks", "8"]}
BEGUN = {"tsv_demo": "compressed", "tsv_finetune": "glyph/digitsVal/checkpoint.pt", "tsv_eval": "records.jsonl"} # what a run writes early
AFTER = {"tsv_demo": "Towers that are fine-tuned are kept", "tsv_finetune": "goes on from the last checkpoint.", "tsv_eval": "What is known is in "}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "Checkpoints, an archive and adapters with long names, to be given to the commands."
    folder, g = tmp_path_factory.mktemp("files"), torch.Generator().manual_seed(0)
    state = {f"model.layers.{i}.a_name_as_long_as_they_are_in_language_models.weight": torch.randn(24, 16, generator=g) for i in range(2)} | {"bias": torch.randn(24, generator=g)}
    tasks = [f"{kind}_a_task_of_many_words" for kind in "abcdefgh"]
    for name in ("base", *tasks): save_file({n: t + .1 * torch.randn(t.shape, generator=g) for n, t in state.items()}, folder / f"{name}.safetensors")
    run("tsv_compress", "base.safetensors", f"{tasks[0]}.safetensors", "--out", "archive.safetensors", cwd=folder)
    for t in tasks: save_adapter(Adapter({n: LoraLayer(torch.randn(24, 2, generator=g), torch.randn(2, 16, generator=g)) for n in state if n != "bias"}, config=dict(base_model_name_or_path="base", peft_type="LORA")), folder / "adapters" / t)
    return folder, [f"{t}.safetensors" for t in tasks], [f"adapters/{t}" for t in tasks]


def small(name, files):
    "Arguments for a command that takes seconds, without --out; the folder to run it in; the name of its output."
    folder, tasks, adapters = files
    argv = {"tsv_merge": ["base.safetensors", *tasks, "--rank", "2"], "tsv_compress": ["base.safetensors", tasks[0]], "tsv_expand": ["base.safetensors", "archive.safetensors"], "tsv_interference": ["base.safetensors", *tasks, "--rank", "2"], "tsv_lora": adapters}
    return SHORT.get(name) or argv[name], folder, {"tsv_compress": "out.safetensors", "tsv_interference": "out.json"}.get(name, "out")


WRITERS = [name for name in SCRIPTS if name != "tsv_course"] # that one has its own: its folder is an argument


@pytest.mark.parametrize("name", WRITERS)
def test_quiet_says_nothing(name, files, tmp_path):
    argv, folder, out = small(name, files)
    done = run(name, *argv, "--quiet", "--out", tmp_path / out, cwd=folder)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and list(tmp_path.rglob("*.*"))


@pytest.mark.parametrize("name", [name for name in WRITERS if name not in SHORT])
def test_what_is_said_fits_80_columns(name, files, tmp_path):
    "Of eight tasks with long names, and tensors with longer ones."
    argv, folder, out = small(name, files)
    os.symlink(folder, tmp_path / "files") # paths are as short as the person's who types them
    done = run(name, *(f"files/{a}" if (folder / a).exists() else a for a in argv), "--out", out, cwd=tmp_path)
    assert done.returncode == 0 and len(done.stdout.splitlines()) >= 2
    assert [line for line in done.stdout.splitlines() if len(line) > 80] == []
    if name == "tsv_interference": assert {line.split()[0] for line in done.stdout.split("pairs")[-1].splitlines()[1:3]} == {"g_a_task_of_ma", "h_a_task_of_ma"}


@pytest.mark.parametrize("name", SHORT)
def test_quiet_does_not_hide_errors(name, tmp_path):
    (tmp_path / "file").write_text("mine")
    done = run(name, *SHORT[name], "--quiet", "--out", tmp_path / "file")
    assert done.returncode == 1 and done.stdout == "" and done.stderr.startswith(f"{name}: ") and str(tmp_path / "file") in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", SLOW)
def test_ctrl_c(name, tmp_path):
    child = subprocess.Popen(shell(name, *SLOW[name], "--out", tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    begin = time.monotonic()
    while not list(tmp_path.glob(BEGUN[name])) and child.poll() is None and time.monotonic() < begin + 300: time.sleep(.05)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=300)
    assert child.returncode == 130 and f"\n{name}: stopped. " in err and AFTER[name] in err and "Traceback" not in err, err


def test_an_error_of_a_loading_worker_is_its_last_line():
    text = "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  …\nValueError: image 3 is broken;\nfetch it again."
    assert console._message(ValueError(text)) == "image 3 is broken;\nfetch it again."
    assert console._message(ValueError("seen as ValueError: no")) == "seen as ValueError: no" and console._message(OSError()) == "OSError"


def test_kinds_of_parameters():
    def f(
        folder: str, # a place
        share: float | None = None, # 10% or so
        n: int = 3, # how many, (default: three)
        bar: bool = True, # hide the bar
        log_dir: str = "", # logs
        quiet: bool = False, # nothing
    ): "Do. Example: f here --n 4"
    def parsed(*argv): return console.command_options(f, "f", argv)
    assert parsed("here") == dict(folder="here", share=None, n=3, bar=True, log_dir="", quiet=False)
    assert parsed("a_b", "--share", "-.5", "--no_bar", "--log_dir=x_y", "--quiet") == dict(folder="a_b", share=-.5, n=3, bar=False, log_dir="x_y", quiet=True)
    for text, share in (("-1e-1", -.1), ("-2.", -2.), ("-1E+2", -100.)): assert parsed("x", "--share", text)["share"] == share
    assert parsed("x", "--log-dir", "-0.5,1")["log_dir"] == "-0.5,1"
    text = console.command_parser(f, "f").format_help()
    assert "usage: f FOLDER [options]" in text and "10% or so" in text and text.count("default") == 1


def warn(quiet: bool = False): # nothing
    "Warn. Example: warn"
    warnings.warn("mind the gap")


def test_warnings_are_kept_back_by_quiet_only():
    for argv, n in ([], 1), (["--quiet"], 0):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            console.run_command(warn, "warn", argv)
        assert len(seen) == n
