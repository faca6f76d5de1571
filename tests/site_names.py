"""Names in backticks mean something: they resolve against the package, the page's own code, the console commands or the repository.

The rule, for a span of code in the prose of a page: what parses as Python is read as Python. Every name in it must be known (to the package:
exported or not, members, parameters, literals; to the code, the literals and the outputs of the page; or to an installed library, for dotted
names). `tsv_nb.x.y` must import. A call of a function of the package must fit its signature. A command line must have the options it uses, a
path into the repository must exist. Everything else (shapes, units, file names) is not a name. EXCEPTIONS holds what the rule cannot know.
"""
import ast
import builtins
import configparser
import importlib
import inspect
import io
import re
import shlex
import sys
from contextlib import redirect_stdout, suppress
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from site_checks import ROOT, TOKEN, code_spans, output_text, skipped

EXCEPTIONS = { # span: why the rule cannot know it
    "HF_HOME": "an environment variable of Hugging Face's libraries",
    "RAY_ADDRESS": "an environment variable of Ray",
    "i * stride_m + j * stride_n": "a formula, before there is a kernel with strides",
    'triton.compile(...).asm["ptx"]': "a key that Triton fills",
    "--tasks_file": "an option that some program might have, beside --tasks",
    "--shuot": "a misspelled option, on purpose",
    "vision_model": "the image tower in Hugging Face's CLIP",
    "CLIPModel": "a class of transformers, which the page does not import",
    "nonlinear_zeroshot": "the name of a file of the paper's checkpoints, without its ending",
    "neutral": "a class of FER2013",
    "lawn_mower": "a folder of a data set",
    "int(r * (1 / T))": "a formula of the published code",
}
FOLDERS = ("benchmarks", "nbs", "tests", "tools", "tsv_nb", ".ci", ".github")
TAUGHT = ("torch", "torch.utils.data", "fastcore.script", "fastcore.meta", "fastcore.basics", "fastcore.test") # libraries whose functions the pages name without importing them
PROGRAMS = {"accelerate", "grep", "bash", "cp", "cd", "git", "jupyter", "mkdir", "nbgrader", "pip", "pytest", "python", "python3", "quarto", "nbdev_export", "nbdev_clean", "ls", "export", "ray"}


def words_of(code):
    "Every identifier and every word of a literal in Python code."
    try: tree = ast.parse(re.sub(r"^(\s*)[%!].*$", r"\1pass", code, flags=re.M))
    except SyntaxError: return set(re.findall(r"\w+", code))
    found, said = set(), {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)} # docstrings make no name known
    for node in ast.walk(tree):
        for field in ("id", "attr", "arg", "name", "asname", "module"):
            if isinstance(value := getattr(node, field, None), str): found |= {value, *value.split(".")}
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said: found |= {node.value, *re.findall(r"[\w.-]+|\w+", node.value), *re.findall(r"\w+", node.value)}
        if isinstance(node, ast.Global): found |= set(node.names)
    return found


class Package:
    "What can be said about the package without asking a page."
    def __init__(self, root=ROOT):
        self.root, self.words, self.callables, self.modules, self.patched = root, set(), {}, set(), {}
        for path in sorted((root / "tsv_nb").rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            self.modules.add(name); self.words |= set(name.split("."))
            if path.name == "_modidx.py": continue
            for node in ast.parse(text).body: self._add(node)
        for path in (root / "nbs").rglob("*.py"): self.words |= words_of(path.read_text(encoding="utf-8")) # of the course
        config = configparser.ConfigParser(delimiters=["="], interpolation=None); config.read(root / "settings.ini", encoding="utf-8")
        config = config["DEFAULT"]
        self.commands = dict(map(str.strip, line.split("=")) for line in config["console_scripts"].split("\n") if line.strip())
        self.libraries = {re.split(r"[\[<>=;]", r)[0].replace("-", "_") for k in config if k.endswith("requirements") for r in shlex.split(config[k])}
        self.words |= set(self.commands) | self.libraries | set(config) | PROGRAMS | {n for m in TAUGHT for n in dir(importlib.import_module(m))}

    def _add(self, node):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            self.words.add(node.name)
            self.callables.setdefault(node.name, []).append(node)
            if isinstance(node, ast.FunctionDef) and any("patch" in ast.unparse(d) for d in node.decorator_list) and node.args.args: # a method, defined outside its class
                self.patched.setdefault(ast.unparse(node.args.args[0].annotation), set()).add(node.name)
            for inner in ast.walk(node):
                if isinstance(inner, ast.arg): self.words.add(inner.arg)
                elif isinstance(inner, ast.FunctionDef) and isinstance(node, ast.ClassDef):
                    self.words.add(inner.name); self.callables.setdefault(inner.name, []).append(inner)
                elif isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name): self.words.add(inner.target.id)
                elif isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store): self.words.add(inner.attr)
                elif isinstance(inner, ast.keyword) and inner.arg: self.words.add(inner.arg)
                elif isinstance(inner, ast.Constant) and isinstance(inner.value, str) and re.fullmatch(r"[\w.-]+", inner.value): self.words.add(inner.value)
        elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.Import, ast.ImportFrom, ast.Try, ast.If)): self.words |= words_of(ast.unparse(node))

    def accepts(self, name, call):
        "None if a call fits a function or class of this name, else what is wrong."
        complaints = []
        for node in self.callables[name]:
            init = node if isinstance(node, ast.FunctionDef) else next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
            if init is None: # a dataclass or a named tuple, or a class with a base of its own
                names = [n.target.id for n in node.body if isinstance(n, ast.AnnAssign)]
                if not names: return None
                free, several = False, False
            else:
                a = init.args
                names = [x.arg for x in a.posonlyargs + a.args + a.kwonlyargs if x.arg not in ("self", "cls")]
                free, several = a.kwarg is not None, a.vararg is not None
            unknown = [k.arg for k in call.keywords if k.arg and k.arg not in names and not free]
            given = [a for a in call.args if not isinstance(a, ast.Starred) and not (isinstance(a, ast.Constant) and a.value is ...)]
            if unknown: complaints.append(f"{name} takes no {unknown[0]!r}")
            elif len(given) > len(names) and not several: complaints.append(f"{name} takes at most {len(names)} arguments")
            else: return None
        return complaints[0]

    @lru_cache
    def options(self, command):
        "The options of a console command."
        module, function = self.commands[command].split(":")
        target = getattr(importlib.import_module(module), function)
        found = set(inspect.signature(target).parameters)
        if "argv" in found: # it reads its options itself: ask it
            with redirect_stdout(io.StringIO()) as shown, suppress(SystemExit): target(["--help"])
            found = set(re.findall(r"--([\w-]+)", shown.getvalue()))
        return {o.replace("-", "_") for o in found} | {"help"}


def resolves(dotted):
    "Does a.b.c import and exist, in the package or in an installed library?"
    parts = dotted.split(".")
    for i in range(len(parts), 0, -1):
        try: found = importlib.import_module(".".join(parts[:i]))
        except ImportError: continue
        for part in parts[i:]:
            if not hasattr(found, part) and part not in getattr(found, "__annotations__", {}) and part not in getattr(found, "_fields", ()): return False
            found = getattr(found, part, None)
        return True
    return False


ALIASES = dict(nn="torch.nn", tl="triton.language", np="numpy", plt="matplotlib.pyplot", F="torch.nn.functional")


def page_words(page):
    "Words of a page's code, its blocks of code and what it printed."
    found = set()
    for cell in page.cells:
        if cell.kind == "code": found |= words_of(cell.source) | {w for o in cell.outputs for w in re.findall(r"[\w.-]+|\w+", output_text(o))}
        else: found |= {w for m in TOKEN.finditer(cell.source) if m["fence"] for w in re.findall(r"[\w.-]+|\w+", m[0])}
    return found


def command_error(words, package, page_text):
    "What is wrong with a command line, or None."
    words = [w for w in words if not re.fullmatch(r"[A-Z_]+=\S*", w)] # variables in front
    while words and Path(words[0]).name in ("flock", "nice", "time"): words = words[1:]
    if not words: return None
    head = Path(words[0]).name
    scripts = [w for w in words if re.fullmatch(r"(?:[\w.-]+/)*[\w.-]+\.(?:py|sh)", w) and w.split("/")[0] in FOLDERS]
    if missing := [s for s in scripts if not (package.root / s).exists()]: return f"no {missing[0]} in the repository"
    used = [w[2:].split("=")[0] for w in words if re.match(r"--[a-zA-Z]", w)]
    if head.startswith("-"): # an option alone: of a command named on the page
        if all(re.search(rf"--{u}(?![\w-])", re.sub(r"`--[^`]*`", "", page_text)) for u in used): return None # in a command or in code of this page
        here = [c for c in package.commands if c in page_text] or package.commands
        known = set().union(*(package.options(c) for c in here))
        files = [package.root / s for s in set(re.findall(r"(?:benchmarks|tools)/[\w.]+", page_text)) if (package.root / s).is_file()]
        text = "".join(f.read_text(encoding="utf-8") for f in files)
        wrong = [u for u in used if u.replace("-", "_") not in known and f"--{u}" not in text]
        return f"no command named on this page has --{wrong[0]}" if wrong else None
    if head in package.commands:
        wrong = [u for u in used if u.replace("-", "_") not in package.options(head)]
        return f"{head} has no option --{wrong[0]}" if wrong else None
    if scripts and scripts[0].endswith(".py"):
        text = (package.root / scripts[0]).read_text(encoding="utf-8")
        wrong = [u for u in used if f"--{u}" not in text]
        return f"{scripts[0]} has no option --{wrong[0]}" if wrong else None
    return f"{head} is no console command of settings.ini" if head.startswith("tsv_") and "tsv_nb" not in head else None


def is_command(span, package):
    words = span.split()
    head = Path(words[0]).name
    return head in package.commands or head in PROGRAMS and len(words) > 1 or bool(re.match(r"--[a-zA-Z]", span)) or bool(re.match(r"tsv_\w+ -", span))


def span_error(span, words, package, page_text=""):
    "What is wrong with a span of code on a page that knows some words, or None; False if the span makes no claim about a name."
    if span in EXCEPTIONS: return None
    if is_command(span, package):
        try: return command_error(shlex.split(span), package, page_text)
        except ValueError: return False
    if re.fullmatch(r"[\w.-]+(?:/[\w.-]+)+/?|[\w.-]+/", span): # a path; of somebody else's tree, if its first folder is none of ours
        if span.split("/")[0] not in FOLDERS: return False
        return None if (package.root / span).exists() else "no such file in the repository"
    if re.fullmatch(r"[\w-]+\.(?:py|pt|json|jsonl|md|csv|mat|gif|png|safetensors|ini|yml|toml|ipynb|sh)|\w+(?:-[\w.]+)+", span): return False # a file, a network
    text = span.replace("…", "...").removeprefix("@")
    if text.startswith(".") and re.match(r"\.[a-z_]\w*(\(.*\))?$", text): text = f"_some{text}"
    if re.fullmatch(r"\w+=", text): text += "0"
    if re.fullmatch(r"with .*", text): text += ": pass"
    try: tree = ast.parse(text)
    except SyntaxError: return False
    if any(isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.AnnAssign)) for n in tree.body): return False # a definition, not a mention
    known = words | package.words | set(dir(builtins)) | {"_some", "tsv_nb"}
    claims = False
    for node in ast.walk(tree):
        if isinstance(node, (ast.Attribute, ast.Name)) and (dotted := dotted_name(node)):
            head, *rest = dotted.split(".")
            claims = True
            if head == "tsv_nb" or head in ALIASES and rest or rest and head in package.libraries | {"torchvision", "triton"} and find_spec(head):
                real = ".".join([ALIASES.get(head, head), *rest])
                if not resolves(real): return f"{real} does not exist"
                continue
            if wrong := [p for p in (head, *rest) if p not in known]: return f"{wrong[0]!r} is known neither to the package nor to this page"
            if rest and head in package.callables and any(isinstance(n, ast.ClassDef) for n in package.callables[head]):
                members = {m for n in package.callables[head] if isinstance(n, ast.ClassDef) for m in members_of(n)} | package.patched.get(head, set())
                bases = any(n.bases for n in package.callables[head] if isinstance(n, ast.ClassDef))
                if rest[0] not in members and not bases: return f"{head} has no {rest[0]!r}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value:
            claims = True
            if node.value not in known and not all(w in known for w in re.findall(r"[\w.-]+", node.value)): return f"the literal {node.value!r} is known neither to the package nor to this page"
        elif isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr if isinstance(node.func, ast.Attribute) else None
            for k in node.keywords:
                if k.arg and k.arg not in known: return f"the argument {k.arg!r} is known neither to the package nor to this page"
            if name in package.callables and isinstance(node.func, ast.Name) and (wrong := package.accepts(name, node)): return wrong
    return None if claims else False


def docstrings(cell):
    "The docstrings of a code cell."
    try: tree = ast.parse(cell.source) if cell.kind == "code" else None
    except SyntaxError: return ""
    return "\n\n".join(ast.get_docstring(n) or "" for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))) if tree else ""


def members_of(node):
    return {n.name for n in node.body if isinstance(n, ast.FunctionDef)} | {n.target.id for n in node.body if isinstance(n, ast.AnnAssign)} | {
        n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)} | {t.id for n in node.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}


def dotted_name(node):
    "a.b.c of a chain of attributes, or None."
    parts = []
    while isinstance(node, ast.Attribute): parts.append(node.attr); node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else None


def shell_lines(text):
    "The command lines of a page's blocks of shell code."
    for m in TOKEN.finditer(text):
        if m["fence"] and re.match(r"\s*[`~]+\s*\{?\.?(sh|bash|shell|console)\b", m[0]):
            body = re.sub(r"\\\n", " ", "\n".join(m[0].strip().split("\n")[1:-1]))
            for line in body.splitlines():
                for one in re.split(r"&&|\|\||;|\|", line.split(" #")[0]):
                    if one.strip(): yield one.strip()


def check_names(pages, package=None):
    "(number of spans that claim something, complaints)."
    package, n, wrong = package or Package(), 0, []
    for page in pages.values():
        words = page_words(page)
        text = "\n".join(c.source for c in page.cells)
        for i, cell in enumerate(page.cells):
            for span in code_spans(cell.source if cell.kind == "markdown" else docstrings(cell)):
                error = span_error(span, words, package, text)
                n += error is not False
                if error: wrong.append(f"{page.name}, cell {i}: `{span}`: {error}")
            for line in shell_lines(cell.source) if cell.kind == "markdown" else ():
                n += 1
                try: error = command_error(shlex.split(line), package, text)
                except ValueError as e: error = str(e)
                if error: wrong.append(f"{page.name}, cell {i}: {line}: {error}")
    return n, wrong


# The notation table

SIZES = ((6, 4, 3, 2), (4, 9, 2, 3), (12, 12, 4, 1), (30, 7, 5, 7)) # m, n, T, k


def table_rows(page):
    "(symbol, code, shape, meaning) of the table with these columns."
    text = "\n".join(c.source for c in page.cells if c.kind == "markdown")
    rows = [[c.strip() for c in line.strip().strip("|").split("|")] for line in text.splitlines() if line.lstrip().startswith("|")]
    start = next((i for i, r in enumerate(rows) if [c.lower() for c in r] == ["symbol", "code", "shape", "meaning"]), None)
    if start is None: return []
    found = []
    for row in rows[start + 2:]:
        if len(row) != 4: break
        found.append(row)
    return found


def notation_objects(m, n, T, k):
    "What the code names of the table stand for, from the library: {code: object}."
    import torch

    import tsv_nb
    g = torch.Generator().manual_seed(m + n)
    pretrained = dict(weight=torch.randn(m, n, generator=g), bias=torch.randn(m, generator=g))
    finetuned = [{name: v + torch.randn(v.shape, generator=g) for name, v in pretrained.items()} for _ in range(T)]
    vectors = [tsv_nb.task_vector(pretrained, f) for f in finetuned]
    delta = vectors[0]["weight"]
    factors = tsv_nb.truncated_svd(delta, k)
    stack = tsv_nb.stack_factors([tsv_nb.truncated_svd(v["weight"], k) for v in vectors])
    default = inspect.signature(tsv_nb.apply_task_vector).parameters["alpha"].default
    return {"pretrained": pretrained, "finetuned": finetuned[0], "task_vector": vectors[0], "delta": delta, "U, S, Vh": tuple(factors), "n_tasks": len(vectors),
            "rank": factors.rank, "min(m, n)": tsv_nb.truncated_svd(delta, min(m, n)).rank, "alpha": default,
            "singular_task_interference": tsv_nb.singular_task_interference(*stack).item(), "orthogonalize(U)": tsv_nb.orthogonalize(factors.U)}


def shape_error(shape, value, of, sizes):
    "Does an object have the shape that the table states? The table's words, and tuples of its letters."
    import torch
    letters = dict(zip("mnTk", sizes)) | dict(r=min(sizes[:2]))
    tensors = isinstance(value, dict) and all(isinstance(v, torch.Tensor) for v in value.values())
    if shape in ("state dict", "dict of tensors"): return None if tensors and value.keys() == {"weight", "bias"} else "is no dict of tensors"
    if shape == "int": return None if type(value) is int else "is no int"
    if shape == "float": return None if type(value) is float else "is no float"
    if copy := re.fullmatch(r"as \$(\w)\$", shape): stated = [tuple(of[copy[1]].shape)]
    else:
        tuples = re.findall(r"\(([^()]*)\)", shape)
        if not tuples: return f"has a shape that cannot be read: {shape}"
        try: stated = [tuple(letters[x] if x in letters else int(x) for x in re.findall(r"\w+", t)) for t in tuples]
        except ValueError: return f"has a shape with an unknown letter: {shape}"
    actual = [tuple(v.shape) for v in (value if isinstance(value, tuple) else (value,))]
    return None if actual == stated else f"has the shape {actual}, the table says {stated} for m, n, T, k = {sizes}"


def facts_of_the_meaning(code, meaning, value, sizes):
    "What the last column says about numbers."
    import torch

    import tsv_nb
    m, n, T, k = sizes
    if "lfloor r/T" in meaning and min(m, n) >= T:
        vectors = [dict(w=torch.randn(m, n, generator=torch.Generator().manual_seed(t))) for t in range(T)]
        if not torch.equal(tsv_nb.tsv_merge(vectors)["w"], tsv_nb.tsv_merge(vectors, rank=min(m, n) // T)["w"]): return "the default rank is not r // T"
    if "orthonormal columns" in meaning and not torch.allclose(value.mT @ value, torch.eye(k), atol=1e-5): return "its columns are not orthonormal"
    if "the most components" in meaning and value != min(m, n): return f"is {value}"
    return None


def check_notation(page, sizes=SIZES):
    "(number of rows, complaints): every row of the table is true of the library, for several sizes."
    rows, wrong, package = table_rows(page), [], Package()
    if not rows: return 0, [f"{page.name}: no table with the columns symbol, code, shape, meaning"]
    for size in sizes:
        try: objects = notation_objects(*size)
        except (ValueError, TypeError, RuntimeError) as error: wrong.append(f"{page.name}: the library does not fit the table: {error}"); continue
        factors = dict(zip(("U", "S", "V"), objects["U, S, Vh"]))
        for symbol, code, shape, meaning in rows:
            name = code.strip("`")
            if name not in objects: wrong.append(f"{page.name}: {code}: unknown; say in notation_objects of tests/site_names.py what it is"); continue
            if unknown := [w for w in re.findall(r"[A-Za-z_]\w*", name) if w not in package.words | {"min", "m", "n"}]: wrong.append(f"{page.name}: {code}: the library has no {unknown[0]}")
            for error in (shape_error(shape, objects[name], factors, size), facts_of_the_meaning(name, meaning, objects[name], size)):
                if error: wrong.append(f"{page.name}: {code} {error}")
        wrong += [f"{page.name}: no row for `{name}`" for name in objects if f"`{name}`" not in [r[1] for r in rows]]
    return len(rows), list(dict.fromkeys(wrong))
