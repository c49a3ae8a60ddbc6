"""What NVIDIA's bindings have, by release, and what our source asks of them.

Our source types library objects as ``Any``. :class:`Source` finds out which class of the library each of them is: from what
made it, as the bindings' own signatures tell, or from its name (``RECEIVERS`` of the test). It then lists every name that is
read, set, called, overridden or asked for, with the conditions under which that happens.

Run as a script, in a process with the stub libraries of one release, it writes what that release has as JSON.
"""

from __future__ import annotations

import ast
import builtins
import json
import os
import re
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from build_scripts.fetch_bindings import Release, default_folder
from edge_backbones.engines.tensorrt.library import load_library

ROOT = Path(__file__).parents[2]

MODULE = "library"
OURS = "ours"


# ---- what a release has ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameter:
    name: str
    has_default: bool


@dataclass(frozen=True)
class Member:
    """An attribute of a class or of the module. ``type`` is the library's class that it is or gives, where it is one."""

    signatures: tuple[tuple[Parameter, ...], ...]
    type: str | None
    writable: bool


@dataclass(frozen=True)
class Api:
    """Classes and enums by qualified name, the module itself as ``MODULE``; each a mapping of its members."""

    release: str
    flavour: str
    classes: Mapping[str, Mapping[str, Member]]

    def member(self, owner: str, name: str) -> Member | None:
        return self.classes.get(owner, {}).get(name)


def run_with(release: Release, arguments: Sequence[str]) -> str:
    """What Python prints in a process of its own, in which the bindings of a release can be imported."""
    place = default_folder() / str(release)
    assert (place / ".complete").is_file(), f"{release} is not there: run python -m build_scripts.fetch_bindings"
    paths = {"PYTHONPATH": f"{place}{os.pathsep}{ROOT}", "LD_LIBRARY_PATH": str(place / "stubs")}
    done = subprocess.run(
        [sys.executable, *arguments], env={"PATH": os.environ["PATH"], **paths}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{release}:\n{done.stdout}{done.stderr}"
    return done.stdout


def read_api(release: Release) -> Api:
    # -S: packages of this environment stay out, among them the real libraries.
    dumped = json.loads(run_with(release, ["-S", __file__, release.flavour]))
    classes = {
        owner: {name: _member(entry, dumped) for name, entry in members.items()} for owner, members in dumped.items()
    }
    return Api(str(release), release.flavour, classes)


def _member(entry: dict[str, Any], classes: Mapping[str, Any]) -> Member:
    parsed = [_parse(text) for text in entry["signatures"]]
    # A type has its modules in front: tensorrt_bindings.tensorrt.ILogger.Severity
    written = [entry["class"], *(word for _, returned in parsed for word in re.findall(r"[\w.]+", returned))]
    ends = [".".join(word.split(".")[index:]) for word in written for index in range(word.count(".") + 1)]
    return Member(
        signatures=tuple(parameters for parameters, _ in parsed),
        type=next((end for end in ends if end in classes), None),
        writable=entry["writable"],
    )


def _parse(signature: str) -> tuple[tuple[Parameter, ...], str]:
    """``f(self: A, x: int = 3) -> B`` as ((x,), "B")."""
    depth, end = 0, 0
    pieces = [""]
    for end in range(signature.index("("), len(signature)):
        character = signature[end]
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            break
        if character == "," and depth == 1:
            pieces.append("")
        elif depth > 1 or character != "(":
            pieces[-1] += character
    parameters = []
    for piece in filter(None, map(str.strip, pieces)):
        name, _, rest = piece.partition(":")
        parameters.append(Parameter(name.split("=")[0].strip(), "=" in rest or "=" in name))
    return tuple(p for p in parameters if p.name != "self"), signature[end + 1 :].partition("->")[2].strip()


def _dump(library: ModuleType) -> dict[str, Any]:
    """JSON of a module: owner -> name -> {"signatures", "class", "writable"}."""
    package = library.__name__.partition(".")[0]
    found: dict[str, Any] = {}
    left: list[tuple[str, Any]] = [(MODULE, library)]
    while left:
        owner, holder = left.pop()
        if owner in found:
            continue
        found[owner] = {}
        for name in dir(holder):
            value = getattr(holder, name)
            if name.startswith("_") or isinstance(value, ModuleType):
                continue
            is_class = isinstance(value, type)
            if is_class and value.__module__.startswith(package):
                left.append((value.__qualname__, value))
            documented = value.__init__ if is_class else getattr(value, "fget", None) or value
            text = documented.__doc__ or ""
            # Of several signatures the first line is f(*args, **kwargs), and the true ones are numbered.
            number = r"\d+\. " if "Overloaded function." in text else ""
            found[owner][name] = {
                "signatures": re.findall(rf"^{number}\w*(\(.*\)(?: -> .*)?)$", text, re.MULTILINE),
                "class": (value if is_class else type(value)).__qualname__,
                "writable": getattr(value, "fset", None) is not None,
            }
    return found


# ---- what our source asks of it -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Guard:
    """A condition on the release: ``owner`` has ``name`` (or has not); with the owner "flavour", it is called ``name``."""

    owner: str
    name: str
    holds: bool

    def true_in(self, api: Api) -> bool:
        has = api.flavour == self.name if self.owner == "flavour" else api.member(self.owner, self.name) is not None
        return has == self.holds


@dataclass(frozen=True)
class Touch:
    """One use of a name of the library. ``how``: read, set, called, overridden, or asked (hasattr, getattr with default).

    ``arguments``: the positional ones as they are written, None where nothing is called or their number is not known.
    """

    line: int
    owner: str
    name: str
    how: str
    node: ast.AST
    arguments: tuple[str, ...] | None = None
    keywords: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"line {self.line}: {self.owner}.{self.name} ({self.how})"

    def fits(self, signature: Sequence[Parameter]) -> bool:
        positional = len(self.arguments or ())
        named = signature[positional:]
        return (
            positional <= len(signature)
            and set(self.keywords) <= {parameter.name for parameter in named}
            and all(parameter.has_default or parameter.name in self.keywords for parameter in named)
        )


_FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
_LEAVES = (ast.Return, ast.Raise, ast.Continue, ast.Break)


def _is_own(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"


def _scope(scopes: Sequence[ast.AST], name: str) -> ast.AST:
    """Where a name lives: an attribute in its class, a variable in its function."""
    return next(scope for scope in scopes if isinstance(scope, ast.ClassDef) or not name.startswith("self."))


class Source:
    """One of our modules, read as text.

    ``receivers``: the class by name of a variable, parameter or attribute (without leading underscores) that holds a library
    object; ``OURS`` for one that holds none and has members of the same name. ``given``: functions of ours that return
    their first argument. What a call or an assignment gives is found from the bindings' signatures.
    """

    def __init__(
        self,
        text: str,
        apis: Sequence[Api],
        receivers: Mapping[str, str],
        given: Sequence[str] = (),
        computed: Sequence[str] = (),
        ours: Collection[str] = (),
    ) -> None:
        self.tree = ast.parse(text)
        self._apis = apis
        self._receivers = receivers
        self._given = given
        self._computed = computed
        self._ours = ours
        self._parents = {child: node for node in ast.walk(self.tree) for child in ast.iter_child_nodes(node)}
        self._members = {name for api in apis for members in api.classes.values() for name in members}
        self._declared: dict[tuple[ast.AST, str], str] = {}
        self._anything: set[str] = set()  # what is declared to be Any
        self._values: dict[tuple[ast.AST, str], list[ast.expr]] = {}
        self.touches: list[Touch] = []
        self.problems: list[str] = []
        for node in ast.walk(self.tree):
            self._read_names(node)
        for node in ast.walk(self.tree):
            self._read_uses(node)

    def reached(self, touch: Touch, api: Api) -> bool:
        """Whether this release gets there: every condition around it holds, and around a call of its function."""
        return self._reached(touch.node, api, frozenset())

    def arguments(self, touch: Touch, name: str) -> list[ast.expr]:
        """What a call gives for the parameter of this name, which a release may have elsewhere."""
        call = self._parents[touch.node]
        assert isinstance(call, ast.Call)
        places = {
            signature.index(parameter)
            for member in self._find(touch.owner, touch.name)
            for signature in member.signatures
            for parameter in signature
            if parameter.name == name
        }
        keywords = [keyword.value for keyword in call.keywords if keyword.arg == name]
        return [call.args[place] for place in sorted(places) if place < len(call.args)] + keywords

    def is_int(self, node: ast.expr) -> bool:
        """int(...), or declared to be one and nothing else, which mypy holds us to."""
        return (isinstance(node, ast.Call) and ast.unparse(node.func) == "int") or self._lookup(node)[0] == "int"

    # -- which class an expression is

    def resolve(self, node: ast.AST, seen: frozenset[str] = frozenset()) -> str | None:
        """The library's class, ``MODULE``, ``OURS``, or None where nothing tells."""
        if isinstance(node, ast.Name) or _is_own(node):
            return self._resolve_variable(node, seen)
        if isinstance(node, ast.Attribute):
            return self._resolve_member(self.resolve(node.value, seen), node.attr)
        if isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            if function in self._given:
                return self.resolve(node.args[0], seen)
            if function == "getattr" and isinstance(node.args[1], ast.Constant):
                return self._resolve_member(self.resolve(node.args[0], seen), node.args[1].value)
            return self._receivers.get(function) or self.resolve(node.func, seen)
        if isinstance(node, ast.Subscript):
            ours = self.resolve(node.value, seen) == OURS and "Any" not in self._lookup(node.value)[0]
            return OURS if ours else None
        if isinstance(node, ast.Constant):
            return None if node.value is None else OURS
        return OURS if isinstance(node, ast.JoinedStr | ast.BinOp | ast.Dict | ast.List | ast.ListComp) else None

    def _resolve_member(self, owner: str | None, name: str) -> str | None:
        if owner == OURS and name not in self._anything:
            return OURS
        types = [member.type for member in self._find(owner, name) if member.type]
        return types[0] if types else self._receivers.get(name.lstrip("_"))

    def _resolve_variable(self, node: ast.AST, seen: frozenset[str]) -> str | None:
        name = ast.unparse(node)
        declared, values = self._lookup(node)
        if declared not in ("", "Any", "Any | None") or name == "self":
            return OURS
        found = {self.resolve(value, seen | {name}) for value in values} - {None} if name not in seen else set()
        if found:
            return min(found, key=lambda one: one == OURS)
        return self._receivers.get(name.removeprefix("self.").lstrip("_"), OURS if name in dir(builtins) else None)

    def _find(self, owner: str | None, name: str) -> list[Member]:
        return [member for api in self._apis if (member := api.member(owner or "", name))]

    def _lookup(self, variable: ast.AST) -> tuple[str, list[ast.expr]]:
        """What a variable is declared to be, and what it is set to, in the innermost scope that knows it."""
        name = ast.unparse(variable)
        for scope in self._ancestors(variable):
            if (scope, name) in self._declared or (scope, name) in self._values:
                return self._declared.get((scope, name), ""), self._values.get((scope, name), [])
        return "", []

    def _read_names(self, node: ast.AST) -> None:
        scopes = [a for a in self._ancestors(node) if isinstance(a, (*_FUNCTION, ast.Lambda, ast.ClassDef, ast.Module))]
        if isinstance(node, ast.arg):
            self._declare(scopes, node.arg, ast.unparse(node.annotation) if node.annotation else "Any")
        elif isinstance(node, _FUNCTION):
            self._declare(scopes, node.name, ast.unparse(node.returns) if node.returns else "Any")
        elif isinstance(node, ast.ClassDef):
            self._declare(scopes, node.name, "type")
        elif isinstance(node, ast.ExceptHandler) and node.name:
            self._declare(scopes, node.name, "Exception")
        elif isinstance(node, ast.alias):
            self._declare(scopes, (node.asname or node.name).partition(".")[0], "import")
        elif isinstance(node, ast.AnnAssign):
            self._declare(scopes, ast.unparse(node.target), ast.unparse(node.annotation))
            self._assign(scopes, node.target, node.value)
        elif isinstance(node, ast.NamedExpr):
            self._assign(scopes, node.target, node.value)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                self._assign(scopes, target, node.value)

    def _declare(self, scopes: Sequence[ast.AST], name: str, annotation: str) -> None:
        if isinstance(scopes[0], ast.ClassDef):
            self._declared[scopes[0], f"self.{name}"] = annotation
        self._declared[_scope(scopes, name), name] = annotation
        if annotation == "Any":
            self._anything.add(name.removeprefix("self."))

    def _assign(self, scopes: Sequence[ast.AST], target: ast.expr, value: ast.expr | None) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, its in zip(target.elts, value.elts, strict=False):
                self._assign(scopes, one, its)
        elif value is not None:
            name = ast.unparse(target)
            self._values.setdefault((_scope(scopes, name), name), []).append(value)

    # -- uses

    def _read_uses(self, node: ast.AST) -> None:
        if isinstance(node, ast.Attribute) and not node.attr.startswith("__"):
            owner, parent = self._owner(node.value, node.attr), self._parents[node]
            if owner is not None and isinstance(parent, ast.Call) and parent.func is node:
                self._read_call(parent, owner, node.attr)
            elif owner is not None:
                self._touch(node, owner, node.attr, "set" if isinstance(node.ctx, ast.Store) else "read")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in ("hasattr", "getattr"):
                self._read_question(node)
            elif asked := self._asked_behind(node.func):
                self._read_call(node, asked.owner, asked.name)
        elif isinstance(node, ast.ClassDef):
            for owner in filter(None, map(self.resolve, node.bases)):
                for method in (one for one in node.body if isinstance(one, _FUNCTION)):
                    if self._find(owner, method.name):
                        names = tuple(argument.arg for argument in method.args.args[1:])
                        self._touch(method, owner, method.name, "overridden", names)

    def _touch(
        self,
        node: ast.AST,
        owner: str,
        name: str,
        how: str,
        arguments: Sequence[str] | None = None,
        keywords: Sequence[str] = (),
    ) -> None:
        self.touches.append(
            Touch(node.lineno, owner, name, how, node, None if arguments is None else tuple(arguments), tuple(keywords))
        )

    def _owner(self, receiver: ast.expr, name: str) -> str | None:
        """The library's class of a receiver, or None for one that is ours. To be unsure is a problem."""
        owner = self.resolve(receiver)
        unsure = owner is None or (owner == OURS and name not in self._ours and not self._is_import(receiver))
        if unsure and name in self._members:
            self.problems.append(
                f"line {receiver.lineno}: what has .{name} here? {ast.unparse(receiver)}: see RECEIVERS"
            )
        return None if owner == OURS else owner

    def _is_import(self, node: ast.AST) -> bool:
        while isinstance(node, ast.Attribute):
            node = node.value
        return isinstance(node, ast.Name) and self._lookup(node)[0] == "import"

    def _read_call(self, call: ast.Call, owner: str, name: str) -> None:
        counted = not any(isinstance(a, ast.Starred) for a in call.args) and all(k.arg for k in call.keywords)
        arguments = [ast.unparse(argument) for argument in call.args] if counted else None
        self._touch(call.func, owner, name, "called", arguments, [keyword.arg or "" for keyword in call.keywords])

    def _read_question(self, call: ast.Call) -> None:
        """hasattr(x, "name"), getattr(x, "name", default), or getattr(x, variable): any text of the function may be it."""
        optional, name = ast.unparse(call.func) == "hasattr" or len(call.args) == 3, call.args[1]
        owner = self._owner(call.args[0], name.value if isinstance(name, ast.Constant) else "")
        if owner is None:
            return
        names = [name.value] if isinstance(name, ast.Constant) else self._texts_around(call, owner)
        if not names and not optional and owner not in self._computed:
            self.problems.append(f"line {call.lineno}: which names of {owner}? {ast.unparse(call)}: see AS_TEXT")
        for one in names:
            self._touch(call, owner, one, "asked" if optional else "read")

    def _texts_around(self, node: ast.AST, owner: str) -> list[str]:
        function = next(scope for scope in self._ancestors(node) if isinstance(scope, _FUNCTION))
        texts = {n.value for n in ast.walk(function) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        return sorted(text for text in texts if self._find(owner, text))

    def _asked_behind(self, variable: ast.AST) -> Guard | None:
        """What is there when a variable that was set to getattr(x, "name", default) is not None."""
        values = self._lookup(variable)[1] if isinstance(variable, ast.Name) else ()
        for call in (value for value in values if isinstance(value, ast.Call) and len(value.args) == 3):
            if ast.unparse(call.func) == "getattr":
                return self._question(call)
        return None

    def _question(self, call: ast.Call) -> Guard | None:
        """hasattr(x, "name") or getattr(x, "name", default) of a library object, answered with yes."""
        owner, name = self.resolve(call.args[0]), call.args[1]
        known = owner is not None and owner != OURS and isinstance(name, ast.Constant)
        return Guard(owner, name.value, True) if known else None

    # -- conditions

    def _reached(self, node: ast.AST, api: Api, callers: frozenset[str]) -> bool:
        if not all(guard.true_in(api) for guard in self._guards(node)):
            return False
        outer = [scope for scope in self._ancestors(node) if isinstance(scope, (*_FUNCTION, ast.ClassDef))]
        if not outer or not isinstance(outer[-1], _FUNCTION) or not outer[-1].name.startswith("_"):
            return True  # anyone may call it
        name = outer[-1].name
        uses = [n for n in ast.walk(self.tree) if isinstance(n, ast.Name) and n.id == name]
        return name not in callers and (not uses or any(self._reached(use, api, callers | {name}) for use in uses))

    def _guards(self, node: ast.AST) -> Iterator[Guard]:
        inner = node
        for outer in self._ancestors(node):
            if isinstance(outer, ast.If | ast.IfExp) and inner is not outer.test:
                body = outer.body if isinstance(outer.body, list) else [outer.body]
                yield from self._facts(outer.test, any(inner is one for one in body))
            elif isinstance(outer, ast.BoolOp):
                for value in outer.values[: outer.values.index(inner)]:
                    yield from self._facts(value, isinstance(outer.op, ast.And))
            for block in filter(lambda field: isinstance(field, list) and inner in field, vars(outer).values()):
                for earlier in block[: block.index(inner)]:
                    if isinstance(earlier, ast.If) and isinstance(earlier.body[-1], _LEAVES):
                        yield from self._facts(earlier.test, False)
            inner = outer

    def _facts(self, test: ast.AST, truth: bool) -> Iterator[Guard]:
        """What a condition that is true, or false, says of the release."""
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            yield from self._facts(test.operand, not truth)
        elif isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And) == truth:
            for value in test.values:
                yield from self._facts(value, truth)
        elif isinstance(test, ast.Call) and ast.unparse(test.func) == "hasattr":
            if asked := self._question(test):
                yield replace(asked, holds=truth)
        elif isinstance(test, ast.Name):
            values = self._lookup(test)[1]
            if asked := self._asked_behind(test):
                yield replace(asked, holds=truth)
            elif len(values) == 1:
                yield from self._facts(values[0], truth)
        elif isinstance(test, ast.Compare) and isinstance(test.comparators[0], ast.Constant):
            right, alike = test.comparators[0].value, isinstance(test.ops[0], ast.Eq | ast.Is)
            if right is None:
                yield from self._facts(test.left, truth != alike)
            elif re.search(r"\bflavour$", ast.unparse(test.left)) and isinstance(test.ops[0], ast.Eq | ast.NotEq):
                yield Guard("flavour", right, truth == alike)

    def _ancestors(self, node: ast.AST) -> Iterator[ast.AST]:
        while node in self._parents:
            node = self._parents[node]
            yield node


def broken(source: Source, releases: Sequence[Api], *, complete: bool = True) -> list[str]:
    """Every use that a release would answer with an AttributeError or a TypeError; and, where ``releases`` is ``complete``,
    every hasattr to which no release says yes."""
    found = list(source.problems)
    for touch in source.touches:
        if touch.how == "asked":
            if complete and not any(api.member(touch.owner, touch.name) for api in releases):
                found.append(f"{touch}: no release has it")
            continue
        for api in releases:
            # Nothing has a class that the release lacks; how the class was come by is judged.
            complaint = _complaint(touch, api.member(touch.owner, touch.name)) if touch.owner in api.classes else ""
            if complaint and source.reached(touch, api):
                found.append(f"{touch}: {api.release} {complaint}")
    return found


def _complaint(touch: Touch, member: Member | None) -> str:
    if member is None:
        return "lacks it"
    if touch.how == "set" and not member.writable:
        return "does not let it be set"
    if touch.arguments is None or not member.signatures or any(map(touch.fits, member.signatures)):
        return ""
    return "takes " + " or ".join(f"({', '.join(p.name for p in signature)})" for signature in member.signatures)


if __name__ == "__main__":
    json.dump(_dump(load_library(sys.argv[1])), sys.stdout)
