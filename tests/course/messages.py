"""What the messages of hidden tests tell a student: numbers of his own answer and of its inputs, and nothing that was expected."""
import ast
import builtins
import re

from grading import meta, source

CHECKS = dict(check_close=2, check_equal=2, check_state=2, check_raises=2, CheckFailed=0, AssertionError=0) # from which argument on there are words


def names(node): return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def columns(target, value):
    "Pairs of (names set, expression), element by element where both sides are written out."
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "enumerate": value = value.args[0]
    if isinstance(target, (ast.Tuple, ast.List)) and isinstance(value, (ast.Tuple, ast.List)) and len(target.elts) == len(value.elts):
        return [pair for t, v in zip(target.elts, value.elts) for pair in columns(t, v)]
    return [(names(target), value)]


def bindings(tree):
    "(names set, expression, whether it is a loop over something that is not written out) of all assignments, loops and appends."
    for n in ast.walk(tree):
        if isinstance(n, ast.Assign): yield from ((*pair, False) for t in n.targets for pair in columns(t, n.value))
        elif isinstance(n, ast.NamedExpr): yield names(n.target), n.value, False
        elif isinstance(n, ast.withitem) and n.optional_vars: yield names(n.optional_vars), n.context_expr, False
        elif isinstance(n, (ast.For, ast.comprehension)):
            rows, target = n.iter, n.target
            if isinstance(rows, ast.Call) and names(rows.func) == {"enumerate"}: rows, target = rows.args[0], getattr(n.target, "elts", [None, n.target])[1]
            if isinstance(rows, (ast.Tuple, ast.List)): yield from ((*pair, False) for row in rows.elts for pair in columns(target, row))
            else: yield names(n.target), n.iter, True
        elif isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr in ("append", "add"):
            for a in n.args: yield names(n.func.value), a, False


def known(tree, students):
    "Names of a test cell that hold a student's answer, or what it was computed from."
    answers, inputs, pairs = set(students), set(), list(bindings(tree))
    while True:
        before = len(answers), len(inputs)
        for n in ast.walk(tree):
            if isinstance(n, ast.Call) and (names(n.func) & answers or any(isinstance(a, ast.Lambda) and names(a) & answers for a in n.args)): inputs |= {x for a in (*n.args, *(k.value for k in n.keywords)) for x in names(a)}
            if isinstance(n, ast.FunctionDef) and n.name in inputs: answers |= {a.arg for a in n.args.args} # called by the answer
        for targets, value, loop in pairs:
            if names(value) & answers: answers |= targets
            if targets & inputs: inputs |= names(value)
            if loop and names(value) - set(dir(builtins)) and names(value) - set(dir(builtins)) <= inputs: inputs |= targets
        if before == (len(answers), len(inputs)): return answers | inputs


def expected_numbers(test):
    "Numbers that a condition compares with: of `x == 18` and of `abs(x - 10.5) < .5`."
    sides = [c for n in ast.walk(test) if isinstance(n, ast.Compare) and isinstance(n.ops[0], (ast.Eq, ast.NotEq)) for c in (n.left, *n.comparators)]
    sides += [n.right for n in ast.walk(test) if isinstance(n, ast.BinOp) and isinstance(n.op, ast.Sub)]
    return {float(s.value) for s in sides if isinstance(s, ast.Constant) and type(s.value) in (int, float)}


def leaks(cells):
    "(grade_id, words, why) for each message of the hidden tests of a problem set that tells what was expected."
    students, found = set(), []
    for c in cells:
        text = source(c)
        if c["cell_type"] != "code" or not meta(c): continue
        tree = ast.parse(text)
        if not meta(c)["grade"]: # functions of the student, and those of locked cells that call them
            for n in tree.body:
                if isinstance(n, ast.FunctionDef) and (meta(c)["solution"] or names(n) & students): students.add(n.name)
                if isinstance(n, ast.ClassDef) and meta(c)["solution"]: students.add(n.name)
        if "BEGIN HIDDEN TESTS" not in text: continue
        first, shown = text[:text.index("BEGIN HIDDEN TESTS")].count("\n") + 1, known(tree, students) | {"name"} | set(dir(builtins)) # a `name` is a label
        conditions = {id(part): n.test for n in ast.walk(tree) if isinstance(n, ast.If) for part in ast.walk(n)}
        for n in ast.walk(tree):
            if not (isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id in CHECKS and n.lineno > first): continue
            for words in (*n.args[CHECKS[n.func.id]:], *(k.value for k in n.keywords if k.arg == "hint")):
                said, where = ast.unparse(words), meta(c)["grade_id"]
                own = {x.id for v in ast.walk(words) if isinstance(v, ast.comprehension) for x in ast.walk(v.target) if isinstance(x, ast.Name)}
                if secret := {x for v in ast.walk(words) if isinstance(v, ast.FormattedValue) for x in names(v.value)} - shown - own - {"relative", "torch"}:
                    relative_to = {x for v in ast.walk(words) if isinstance(v, ast.Call) and names(v.func) == {"relative"} for x in names(v)}
                    if secret - relative_to: found.append((where, said, f"shows {', '.join(sorted(secret - relative_to))}"))
                literal = "".join(v.value for v in ast.walk(words) if isinstance(v, ast.Constant) and isinstance(v.value, str))
                numbers = {float(x) for x in re.findall(r"\d+(?:\.\d+)?", literal)}
                if told := numbers & expected_numbers(conditions[id(n)]) if id(n) in conditions else set(): found.append((where, said, f"says {sorted(told)}"))
    return found
