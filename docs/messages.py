"""Every message that metakd can raise, read off its source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import NamedTuple

FOLLOWED = "cure"  # a parameter whose values at the callers are the better part of a message
FINDINGS = {"'\\n'.join(errors)", "'\\n'.join(said)"}  # what `validate` found: read where the findings are made
FRAMES = {"{what}: {error}", "{what} raised {type}: {error}", "term {name}: {error}"}  # around other messages

CALLER = ""  # beside the names of parameters: the module whose call it is
HOLE = re.compile(r"\{[A-Za-z_][\w ]*\}")
Bound = Mapping[str, list[str]]


class Message(NamedTuple):
    """What can be said, with `{placeholders}` for what only a run knows."""

    text: str
    module: str
    warns: bool


class Source:
    """The modules below a folder, and what the expressions in them can say."""

    def __init__(self, root: Path) -> None:
        files = {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.py"))}
        self.trees = {module: ast.parse(path.read_text("utf-8")) for module, path in files.items()}
        self.open: set[ast.AST] = set()

    def functions(self, module: str) -> list[ast.FunctionDef]:
        """Functions and methods; those inside of others belong to the outer one."""
        tops = self.trees[module].body
        inside = [node for top in tops for node in (top.body if isinstance(top, ast.ClassDef) else [top])]
        return [node for node in inside if isinstance(node, ast.FunctionDef)]

    def lookup(self, module: str, name: str) -> tuple[str, ast.AST | None]:
        """The function or value that a name of a module stands for, and the module that defines it."""
        for node in self.trees[module].body:
            if isinstance(node, ast.FunctionDef) and node.name == name:
                return module, node
            if isinstance(node, ast.Assign) and name in map(ast.unparse, node.targets):
                return module, node.value
            if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
                path = (node.module or "").removeprefix("metakd").strip(".").replace(".", "/")
                inside = next((p for p in (path, f"{path}/__init__".strip("/")) if p in self.trees), None)
                return (module, None) if inside is None else self.lookup(inside, name)
        return module, None

    def scopes(self, module: str, function: ast.FunctionDef) -> Iterator[Scope]:
        """The function, once for all texts of the source that it is called with, or loops over."""
        names = [arg.arg for arg in [*function.args.args, *function.args.kwonlyargs] if arg.arg != "self"]
        bounds: list[Bound] = [{}]
        if FOLLOWED in names:
            bounds = [
                {CALLER: scope.bound.get(CALLER, [other])} | dict(zip(names, map(scope.texts, call.args), strict=False))
                for other in self.trees
                for caller in self.functions(other)
                for call in calls(caller, function.name)
                for scope in self.scopes(other, caller)
            ]
        outer = Scope(self, module, function, {})
        loops = [rows for node in ast.walk(function) if isinstance(node, ast.For) and (rows := outer.rows(node))]
        for parts in product(bounds, *loops):
            yield Scope(self, module, function, {name: texts for part in parts for name, texts in part.items()})


class Scope:
    """A function, its variables, and the texts that some of them are known to stand for."""

    def __init__(self, source: Source, module: str, function: ast.FunctionDef | None, bound: Bound) -> None:
        self.source, self.module, self.bound = source, module, bound
        self.assigned: dict[str, list[ast.expr]] = {}
        for node in ast.walk(function) if function else ():
            if isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr) and node.value:
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    self.assigned.setdefault(ast.unparse(target), []).append(node.value)

    def texts(self, node: ast.expr) -> list[str]:
        """Whatever an expression can say; a placeholder for what is no text of the source."""
        if isinstance(node, ast.Constant):
            return [str(node.value)]
        if isinstance(node, ast.FormattedValue):
            quote = "'" if node.conversion == ord("r") else ""
            return [text if HOLE.fullmatch(text) else f"{quote}{text}{quote}" for text in self.texts(node.value)]
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add)):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node.left, node.right]
            return ["".join(pieces) for pieces in product(*map(self.texts, parts))]
        if isinstance(node, ast.Name) and node.id in self.bound:
            return self.bound[node.id]
        found = []
        if node not in self.source.open:  # a function may call itself
            self.source.open.add(node)
            found = list(dict.fromkeys(text for scope, part in self._behind(node) for text in scope.texts(part)))
            self.source.open.remove(node)
        plain = len(found) == 1 and not HOLE.search(found[0])
        return found if plain or any(map(wordy, found)) else ["{" + hole(node) + "}"]

    def _behind(self, node: ast.expr) -> Iterator[tuple[Scope, ast.expr]]:
        """What may stand behind a choice, a variable, a constant, or a call of one of the source's functions."""
        if isinstance(node, ast.IfExp):
            yield from ((self, node.body), (self, node.orelse))
        elif (name := ast.unparse(node)) in self.assigned:
            yield from ((self, value) for value in self.assigned[name])
        elif isinstance(node, ast.Name | ast.Call):
            module, known = self.source.lookup(self.module, name.split("(")[0])
            if isinstance(known, ast.FunctionDef) and isinstance(node, ast.Call):
                for inner in self.source.scopes(module, known):
                    yield from ((inner, value) for value in returned(known))
            elif isinstance(known, ast.expr):
                yield Scope(self.source, module, None, {}), known

    def rows(self, loop: ast.For) -> list[Bound]:
        """What a loop over a table of texts gives its variables."""
        names = [ast.unparse(name) for name in getattr(loop.target, "elts", [])]
        rows: list[list[ast.expr]] = [row.elts for row in getattr(loop.iter, "elts", []) if isinstance(row, ast.Tuple)]
        _, known = self.source.lookup(self.module, ast.unparse(loop.iter).removesuffix(".items()"))
        if isinstance(known, ast.Dict):
            rows = [[key, value] for key, value in zip(known.keys, known.values, strict=True) if key]
        found: list[Bound] = [dict(zip(names, map(self.texts, row), strict=False)) for row in rows]
        return found if any(wordy(text) for row in found for texts in row.values() for text in texts) else []


def messages(root: Path) -> list[Message]:
    """Every message below a folder, once, in the order of the source.

    Raises:
        ValueError: one is built in a way that cannot be followed.
    """
    source, found = Source(root), dict[str, Message]()
    for module in source.trees:
        for function in source.functions(module):
            for scope in source.scopes(module, function):
                for text, warns in said(module, function, scope):
                    if not wordy(text) and text not in FRAMES:
                        raise ValueError(f"cannot tell what {function.name} in {module} says: {text}")
                    found.setdefault(text, Message(text, scope.bound.get(CALLER, [module])[0], warns))
    return list(found.values())


def said(module: str, function: ast.FunctionDef, scope: Scope) -> Iterator[tuple[str, bool]]:
    """What a function raises or warns of; also the findings of `validate` and the hints of `check_hypergradient`."""
    for call in calls(function, "MetaKDError", "warn"):
        if ast.unparse(call.args[0]) not in FINDINGS:
            warns = ast.unparse(call.func) == "warnings.warn"
            yield from ((" ".join(text.split()), warns) for text in scope.texts(call.args[0]))
    for call in calls(function, "Finding") if module.startswith("validation") else ():
        level, where, *rest = call.args
        if (kind := ast.unparse(level)) != "'note'":
            wheres = scope.texts(where) if isinstance(where, ast.Constant) else ["{where}"]
            for place, problem, cure in product(wheres, *map(scope.texts, rest)):
                yield f"{place}: {problem}. {cure}.", "error" not in kind
    for value in returned(function) if (module, function.name) == ("hints", "hint") else ():
        yield from ((text, False) for text in scope.texts(value))


def calls(inside: ast.AST, *names: str) -> list[ast.Call]:
    """The calls of functions and methods of these names, in the order of the source."""
    found = [n for n in ast.walk(inside) if isinstance(n, ast.Call) and ast.unparse(n.func).split(".")[-1] in names]
    return sorted(found, key=lambda call: call.lineno)


def returned(function: ast.FunctionDef) -> list[ast.expr]:
    """What a function returns, in the order of the source; nothing for None."""
    found = [node.value for node in ast.walk(function) if isinstance(node, ast.Return) and node.value]
    return sorted((v for v in found if ast.unparse(v) != "None"), key=lambda value: value.lineno)


def wordy(text: str) -> bool:
    """Whether a text has words enough to be a part of a message in its own right."""
    return len(re.findall(r"[A-Za-z]{2,}", HOLE.sub("", text))) > 3


def hole(node: ast.expr) -> str:
    """A word for what stands in a message at run time."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name) if name != "__name__":
            return name.strip("_")
        case ast.IfExp(body=ast.Constant(value=str(a)), orelse=ast.Constant(value=str(b))):
            return f"{a} or {b}"
        case ast.IfExp(body=ast.Constant(), orelse=inner) | ast.IfExp(body=inner) | ast.BoolOp(values=[inner, *_]):
            return hole(inner)
        case ast.BinOp(left=inner) | ast.UnaryOp(operand=inner) | ast.ListComp(elt=inner) | ast.GeneratorExp(elt=inner):
            return hole(inner)
        case ast.Constant(value=str(name)) if HOLE.fullmatch("{" + name + "}"):
            return name
        case ast.Call(func=ast.Name(id="type" | "len" as name)):
            return {"type": "type", "len": "number"}[name]
        case ast.Call(func=ast.Name() | ast.Attribute(value=ast.Constant()), args=[*_, inner]):
            return hole(inner)
        case ast.Attribute(value=inner) | ast.Subscript(value=inner) | ast.Call(func=ast.Attribute(value=inner)):
            return hole(inner)
    return "value"
