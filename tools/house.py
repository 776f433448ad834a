"""Measures the structure of a checkout: import cycles, rooms, habits, what a training run does.

    python tools/house.py [--root DIR] [--json FILE]

`--root` is another checkout; it needs no tools of its own, so one tool measures before and after a change. What counts:

training    `ldit train tiny-cpu`; tools/first_step.py defines what is counted of it, and what an agreement is.
cycle       modules that import each other, directly or through others: by imports at module level; with imports inside
            functions too; with those under TYPE_CHECKING too.
upward      imports that tests/rules/test_architecture.py of that checkout (ALLOWED, GROUND) does not allow the room.
room        a top-level folder of src/ldit; lines are physical lines of .py files.
process     `isinstance(…, DDPM… | Flow…)`, or a match pattern of such a class, outside diffusion/.
model field `getattr` or `hasattr` with the constant name of a field or property of a class in config/model.py.
defensive   code lines (neither blank, comment nor docstring) within a raise, an assert, an except clause, an `if`
            without else whose body ends in a raise, or a function check…, refuse…, verify…, validate… or require….
comments    lines of function bodies that hold a comment alone, as a share of their code and comment lines (no blank
            lines, no docstrings); comments behind code apart.
public      functions and classes at module level without a leading underscore.
"""

import argparse
import ast
import io
import json
import re
import runpy
import subprocess
import sys
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

ROOT = Path(__file__).resolve().parents[1]
TOP = "(top level)"
TABLE = Path("tests", "rules", "test_architecture.py")
PROCESS = re.compile(r"(DDPM|Flow)\w*")
CHECK = re.compile(r"_?(check|refuse|verify|validate|require)(_|$)")
BLANK = {getattr(tokenize, name) for name in ("COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER")}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Module:
    """A file of the package."""

    name: str
    path: Path
    """Below src/ldit."""
    text: str

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """All of the syntax tree, the module itself first."""
        return list(ast.walk(ast.parse(self.text)))

    @property
    def room(self) -> str:
        return self.path.parts[0].removesuffix(".py")

    @cached_property
    def tokens(self) -> list[tokenize.TokenInfo]:
        return list(tokenize.generate_tokens(io.StringIO(self.text).readline))

    @cached_property
    def comments(self) -> dict[int, str]:
        return {token.start[0]: token.string for token in self.tokens if token.type == tokenize.COMMENT}

    @cached_property
    def code(self) -> set[int]:
        """Numbers of the lines that hold code; strings that are statements are documentation."""
        lines = {n for t in self.tokens if t.type not in BLANK for n in range(t.start[0], t.end[0] + 1)}
        statements = [node for node in self.nodes if isinstance(node, ast.Expr)]
        return lines.difference(*(span(s) for s in statements if isinstance(getattr(s.value, "value", None), str)))


class Import(NamedTuple):
    source: Module
    target: str
    line: int
    kind: str
    """At module level "", else "deferred" or "typing"."""


@dataclass(frozen=True)
class Metric:
    """A row of the table; `places` are printed below it."""

    name: str
    value: float | str
    goal: str = ""
    places: list[str] = field(default_factory=list)


def span(node: Any) -> range:
    """The numbers of a node's lines."""
    return range(node.lineno, node.end_lineno + 1)


def load(root: Path) -> list[Module]:
    package = root / "src" / "ldit"
    if not (paths := [path.relative_to(package) for path in sorted(package.rglob("*.py"))]):
        raise SystemExit(f"{package}: no package here")
    names = [".".join(("ldit", *path.with_suffix("").parts)).removesuffix(".__init__") for path in paths]
    return [Module(name, path, (package / path).read_text()) for name, path in zip(names, paths, strict=True)]


def imports(modules: list[Module]) -> list[Import]:
    """Every import of the package's own modules."""
    known = {module.name for module in modules}

    def walk(module: Module, node: ast.AST, kind: str) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            targets = set()
            if isinstance(child, ast.Import):
                targets = {alias.name for alias in child.names}
            elif isinstance(child, ast.ImportFrom):
                # `from a import b` names the module a.b where there is one, else something inside a.
                names = {f"{child.module}.{alias.name}" for alias in child.names}
                targets = {name if name in known else str(child.module) for name in names}
            for target in targets & known:
                yield Import(module, target, getattr(child, "lineno", 0), kind)
            typing = isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
            inner = "typing" if typing else "deferred" if isinstance(child, FUNCTIONS) else kind
            yield from walk(module, child, inner)

    return [edge for module in modules for edge in walk(module, module.nodes[0], "")]


def cycles(name: str, edges: list[Import], *kinds: str) -> Metric:
    """Strongly connected components of more than one module."""
    graph: dict[str, set[str]] = defaultdict(set)
    for edge in (edge for edge in edges if edge.kind in kinds):
        graph[edge.source.name].add(edge.target)

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        queue = [start]
        while queue:
            queue += (new := graph[queue.pop()] - seen)
            seen |= new
        return seen

    reached = {module: reach(module) for module in list(graph)}
    groups = {frozenset(m for m in ends if module in reached.get(m, ())) for module, ends in reached.items()}
    places = sorted(" <-> ".join(sorted(group)) for group in groups if len(group) > 1)
    return Metric(name, len(places), "0", places)


def upward(root: Path, edges: list[Import]) -> Metric:
    """Imports that the checkout's own table forbids."""
    try:
        table = runpy.run_path(str(root / TABLE))
        allowed, ground = table["ALLOWED"], table.get("GROUND", set())
    except (OSError, KeyError, ImportError):
        return Metric("upward imports", "n/a", "0")
    places = []
    for edge in edges:
        own, target = edge.source.room, edge.target.removeprefix("ldit").strip(".").split(".")[0]
        free = own in ("__init__", "__main__") or target in {own, "", *ground, *allowed.get(own, ())}
        places += [] if free else [f"{edge.source.path}:{edge.line} {edge.target}"]
    return Metric("upward imports", len(places), "0", places)


def is_call(node: ast.AST, *names: str) -> TypeGuard[ast.Call]:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names


def process_checks(module: Module) -> Iterator[int]:
    """Lines that ask for the class of a process."""
    for node in module.nodes:
        kinds = node.args[1:] if is_call(node, "isinstance") else [node.cls] if isinstance(node, ast.MatchClass) else []
        parts = [part for kind in kinds for part in ast.walk(kind)]
        if any(PROCESS.fullmatch(getattr(part, "id", getattr(part, "attr", ""))) for part in parts):
            yield kinds[0].lineno


def field_lookups(modules: list[Module]) -> Iterator[str]:
    """Lookups by name of what the network configurations have: fields and properties."""
    homes = [node for module in modules if module.name == "ldit.config.model" for node in module.nodes]
    parts = [part for node in homes if isinstance(node, ast.ClassDef) for part in node.body]
    names = {part.target.id for part in parts if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)}
    names |= {part.name for part in parts if isinstance(part, ast.FunctionDef) and part.decorator_list}
    for module in modules:
        for node in module.nodes:
            if is_call(node, "getattr", "hasattr") and getattr(node.args[1], "value", None) in names:
                yield f"{module.path}:{node.lineno} {ast.unparse(node)}"


def isinstance_asserts(module: Module) -> int:
    tests = [node.test for node in module.nodes if isinstance(node, ast.Assert)]
    return sum(any(is_call(part, "isinstance") for part in (test, *getattr(test, "values", ()))) for test in tests)


def public_twice(modules: list[Module]) -> list[str]:
    homes: dict[str, list[str]] = defaultdict(list)
    for module in modules:
        for node in ast.iter_child_nodes(module.nodes[0]):
            if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and not node.name.startswith("_"):
                homes[node.name] += [] if str(module.path) in homes[node.name] else [str(module.path)]
    return [f"{name}: {', '.join(files)}" for name, files in sorted(homes.items()) if len(files) > 1]


def percent(part: float, whole: float) -> float:
    return round(100 * part / max(whole, 1), 1)


def rooms(modules: list[Module]) -> list[Metric]:
    sizes = Counter[str]()
    for module in modules:
        sizes[module.path.parts[0] if len(module.path.parts) > 1 else TOP] += len(module.text.splitlines())
    total = sizes.total()
    places = [f"{lines:6,} {percent(lines, total):5.1f} %  {room}" for room, lines in sizes.most_common()]
    largest = max((lines for room, lines in sizes.items() if room != TOP), default=0)
    share = Metric("largest room, % of the lines", percent(largest, total), "<= 15", places)
    return [Metric("lines in the package", total), share]


def defensive(module: Module) -> set[int]:
    """Numbers of the code lines that guard; see the top of this file."""
    lines: set[int] = set()
    for node in module.nodes:
        guard = isinstance(node, ast.If) and not node.orelse and isinstance(node.body[-1], ast.Raise)
        check = isinstance(node, FUNCTIONS) and CHECK.match(node.name)
        if guard or check or isinstance(node, ast.Raise | ast.Assert | ast.ExceptHandler):
            lines.update(span(node))
    return lines & module.code


def guards(modules: list[Module]) -> Metric:
    code, guarded = Counter[str](), Counter[str]()
    for module in modules:
        code[module.room] += len(module.code)
        guarded[module.room] += len(defensive(module))
    shares = Counter({room: percent(guarded[room], code[room]) for room in code})
    places = [f"{share:5.1f} %  {room}" for room, share in shares.most_common(5)]
    return Metric("defensive lines, % of code", percent(guarded.total(), code.total()), "~ 10", places)


def comments(modules: list[Module]) -> list[Metric]:
    """Comments in function bodies: lines of their own, and those behind code."""
    code, own, behind = 0, 0, 0
    for module in modules:
        functions = [node for node in module.nodes if isinstance(node, FUNCTIONS)]
        body = {line for node in functions for line in range(node.body[0].lineno, span(node).stop)}
        code += len(body & module.code)
        own += len(body & module.comments.keys() - module.code)
        behind += len(body & module.comments.keys() & module.code)
    lines = Metric("comment lines, % of function bodies", percent(own, code + own), "~ 6")
    return [lines, Metric("comments behind code in bodies, %", percent(behind, code + own))]


def static(root: Path) -> list[Metric]:
    """What the files alone tell."""
    modules = load(root)
    edges = imports(modules)
    kinds = [f"{m.path}:{n}" for m in modules if m.room != "diffusion" for n in sorted(process_checks(m))]
    lookups = list(field_lookups(modules))
    ignored = sum("type: ignore" in comment for m in modules for comment in m.comments.values())
    twice = public_twice(modules)
    return [
        Metric("modules in the package", len(modules)),
        *rooms(modules),
        cycles("import cycles at module level", edges, ""),
        cycles("with deferred imports", edges, "", "deferred"),
        cycles("with those under TYPE_CHECKING", edges, "", "deferred", "typing"),
        Metric("deferred imports", sum(edge.kind == "deferred" for edge in edges)),
        Metric("imports under TYPE_CHECKING", sum(edge.kind == "typing" for edge in edges)),
        upward(root, edges),
        Metric("isinstance of a process", len(kinds), "<= 3", kinds),
        Metric("getattr of a model's field", len(lookups), "<= 3", lookups),
        Metric("type: ignore", ignored, "fewer"),
        Metric("assert isinstance", sum(isinstance_asserts(m) for m in modules), "fewer"),
        guards(modules),
        *comments(modules),
        Metric("public names with two homes", len(twice), "fewer", twice),
    ]


def dynamic(root: Path) -> list[Metric]:
    """What a short training run shows: of one process, and of two for the agreements between them."""

    script = str(Path(__file__).with_name("first_step.py"))
    commands = [[sys.executable, script, "--root", str(root), "--processes", number] for number in "12"]
    alone, together = (json.loads(subprocess.run(c, stdout=subprocess.PIPE, check=True).stdout) for c in commands)
    evaluation = [name for name in alone["imported"] if (name + ".").startswith("ldit.eval.")]
    sites = {*together["agreements"], *together["nested"]}
    return [
        Metric("modules imported by a training run", len(alone["imported"]), "<= 125"),
        Metric("of these in ldit.eval", len(evaluation), "0", evaluation),
        Metric("files entered before its first step", len(alone["files"]), "<= 45"),
        Metric("functions entered before it", alone["functions"]),
        Metric("agreements before it", len(together["agreements"]), "<= 4", together["agreements"]),
        Metric("nested agreements before it", len(together["nested"]), "", together["nested"]),
        Metric("exchanges before it", together["exchanges"]),
        Metric("call sites of exchanges", len(sites)),
    ]


def table(metrics: list[Metric]) -> str:
    rows = [f"{'':42}{'value':>10}  goal"]
    for metric in metrics:
        value = f"{metric.value:,}" if isinstance(metric.value, int | float) else metric.value
        rows += [f"{metric.name:42}{value:>10}  {metric.goal}".rstrip(), *(f"    {p}" for p in metric.places)]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    root = arguments.root.resolve()
    metrics = [*static(root), *dynamic(root)]
    print(table(metrics))
    if arguments.json:
        git = subprocess.run(
            ["git", "log", "-1", "--format=%h", "--", "src"], cwd=root, stdout=subprocess.PIPE, text=True
        )
        report = {"benchmark": "house", "date": f"{datetime.now(UTC):%Y-%m-%d}", "commit": git.stdout.strip()}
        rows = [asdict(metric) for metric in metrics]
        arguments.json.write_text(json.dumps({**report, "metrics": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
