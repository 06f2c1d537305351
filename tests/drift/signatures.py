"""Signatures read from a package's source, without importing it: unsloth, for one, imports only where there is a GPU."""

from __future__ import annotations

import ast
import importlib.util
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

# Where a name is meant that its package defines twice; unsloth's other one is for Apple's GPUs.
PLACES = {"unsloth.FastLanguageModel": "unsloth.models.loader.FastLanguageModel"}
# What takes any keyword and hands it on: the keywords are looked for where they end up.
DELEGATES = {
    "transformers.AutoModelForCausalLM.from_pretrained": ("transformers.PreTrainedModel.from_pretrained",),
    "transformers.AutoTokenizer.from_pretrained": ("transformers.PreTrainedTokenizerBase.from_pretrained",),
    "transformers.LlamaForCausalLM.generate": (
        "transformers.GenerationConfig",
        "transformers.LlamaForCausalLM.forward",
    ),
    "unsloth.FastLanguageModel.get_peft_model": ("unsloth.models.llama.FastLlamaModel.get_peft_model",),
    "peft.PeftModel.generate": ("transformers.LlamaForCausalLM.generate",),
    "peft.PeftModel.forward": ("transformers.LlamaForCausalLM.forward",),
}


@dataclass(frozen=True)
class Signature:
    """The keywords that a callable names; `open` where it takes others too, which nobody can check."""

    names: frozenset[str]
    open: bool

    def verdict(self, keyword: str) -> str:
        """`ok`, `missing`, or `unchecked` where it may vanish in a **kwargs."""
        return "ok" if keyword in self.names else "unchecked" if self.open else "missing"

    def __or__(self, other: Signature) -> Signature:
        return Signature(self.names | other.names, self.open or other.open)


class Sources:
    """The modules of some packages as text, parsed where they are looked at."""

    def __init__(self, texts: Mapping[str, str]):
        self.texts = dict(texts)  # {module, or module + ".pyi" for a stub: source}
        self._trees: dict[str, ast.Module] = {}
        self._known: dict[tuple[str, str], tuple[ast.AST | None, str]] = {}

    @classmethod
    def of_wheels(cls, wheels: list[Path]) -> Sources:
        """What lies in wheels."""
        texts = {}
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                names = [name for name in archive.namelist() if name.endswith((".py", ".pyi"))]
                texts |= {module_of(name): archive.read(name).decode("utf-8", "replace") for name in names}
        return cls(texts)

    @classmethod
    def installed(cls, packages: list[str]) -> Sources:
        """What is installed here of these packages; those that are not are left out."""
        texts = {}
        for package in packages:
            spec = importlib.util.find_spec(package)
            for folder in spec.submodule_search_locations or () if spec else ():
                for path in (path for kind in ("*.py", "*.pyi") for path in Path(folder).rglob(kind)):
                    name = f"{package}/{path.relative_to(folder).as_posix()}"
                    texts[module_of(name)] = path.read_text(encoding="utf-8", errors="replace")
        return cls(texts)

    @cached_property
    def packages(self) -> set[str]:
        return {name.partition(".")[0] for name in self.texts}

    def has(self, module: str) -> bool:
        return module in self.texts or f"{module}.pyi" in self.texts

    def tree(self, module: str) -> ast.Module:
        if module not in self._trees:
            self._trees[module] = ast.parse(self.texts[module])
        return self._trees[module]

    def find(self, target: str) -> Signature | None:
        """The signature of `package.Name`, `package.module.Name` or `package.Name.method`; None where there is none."""
        found = self._signature(target)
        for further in DELEGATES.get(target, ()) if found else ():
            found = Signature(found.names, False) | (self.find(further) or Signature(frozenset(), True))
        return found

    def _signature(self, target: str) -> Signature | None:
        for name, place in PLACES.items():
            if target == name or target.startswith(f"{name}."):
                target = place + target.removeprefix(name)
        parts = target.split(".")
        for cut in range(len(parts) - 1, 0, -1):
            module = ".".join(parts[:cut])
            if not self.has(module):
                continue
            node, home = self.definition(module, parts[cut])
            if isinstance(node, ast.ClassDef):
                rest = parts[cut + 1 :]
                return self._constructor(node, home) if not rest else self._method(node, home, rest[0])
            if node is not None and cut + 1 == len(parts):
                return of_function(node)
        return None

    def definition(self, module: str, name: str, seen: frozenset = frozenset()) -> tuple[ast.AST | None, str]:
        """(class or function called `name` as `module` offers it, the module that defines it); (None, "") without one."""
        if not seen:
            if (module, name) not in self._known:
                self._known[module, name] = self._define(module, name, frozenset({(module, name)}))
            return self._known[module, name]
        return (None, "") if (module, name) in seen else self._define(module, name, seen | {(module, name)})

    def _define(self, module: str, name: str, seen: frozenset) -> tuple[ast.AST | None, str]:
        for place in (f"{module}.pyi", module):
            if place in self.texts and name in self.texts[place]:
                found = self._look_in(place, module, name, seen)
                if found[0] is not None:
                    return found
        if "." not in module:  # a lazy package: whichever module of it defines the name, the least deep one first
            defines = re.compile(rf"^(?:class|def|async def) {re.escape(name)}\b", re.MULTILINE)
            inside = [m for m in self.texts if m.startswith(f"{module}.") and defines.search(self.texts[m])]
            for place in sorted(inside, key=lambda m: (m.count("."), m)):
                return self._look_in(place, place.removesuffix(".pyi"), name, seen)
        return None, ""

    def _look_in(self, place: str, module: str, name: str, seen: frozenset) -> tuple[ast.AST | None, str]:
        instances: dict[str, str] = {}
        for node in top_level(self.tree(place)):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
                return node, place
            if isinstance(node, ast.ImportFrom):
                source = self._absolute(node, module, place)
                if "dummy" in source:  # transformers' stand-ins for what is not installed
                    continue
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        found = self.definition(source, alias.name, seen)
                        if found[0] is not None:
                            return found
                    elif alias.name == "*" and self.has(source):
                        found = self.definition(source, name, seen) if "." in source else (None, "")
                        if found[0] is not None:
                            return found
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                variable, value = node.targets[0].id, node.value
                if isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
                    instances[variable] = value.func.id
                if variable == name and isinstance(value, ast.Name) and value.id != name:
                    return self.definition(module, value.id, seen)
                if variable == name and isinstance(value, ast.Attribute) and isinstance(value.value, ast.Name):
                    kind, home = self.definition(module, instances.get(value.value.id, ""), seen)
                    if isinstance(kind, ast.ClassDef):  # model_info = api.model_info
                        return self._member(kind, home, value.attr)
        return None, ""

    def _absolute(self, node: ast.ImportFrom, module: str, place: str) -> str:
        if not node.level:
            return node.module or ""
        is_package = any(other.startswith(f"{module}.") and other != f"{module}.pyi" for other in self.texts)
        parts = module.split(".") if is_package else module.split(".")[:-1]
        parts = parts[: len(parts) - node.level + 1]
        return ".".join([*parts, *([node.module] if node.module else [])])

    def _lineage(self, node: ast.ClassDef, home: str) -> Iterator[tuple[ast.ClassDef, str]]:
        """The class and those that it inherits from, as far as their source is here; roughly in Python's order."""
        yield node, home
        module = home.removesuffix(".pyi")
        for base in node.bases:
            name = base.value if isinstance(base, ast.Subscript) else base
            simple = name.attr if isinstance(name, ast.Attribute) else getattr(name, "id", "")
            parent, place = self.definition(module, simple, frozenset())
            if isinstance(parent, ast.ClassDef) and parent is not node:
                yield from self._lineage(parent, place)

    def _has_strangers(self, node: ast.ClassDef, home: str) -> bool:
        """Whether it inherits from a class whose source is not here, such as torch's."""
        for kind, place in self._lineage(node, home):
            for base in kind.bases:
                simple = base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "object")
                known = simple in ("object", "ABC", "Generic") or isinstance(base, ast.Subscript)
                if not known and self.definition(place.removesuffix(".pyi"), simple)[0] is None:
                    return True
        return False

    def _member(self, node: ast.ClassDef, home: str, name: str) -> tuple[ast.AST | None, str]:
        for kind, place in self._lineage(node, home):
            for member in top_level(kind):
                if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef) and member.name == name:
                    return member, place
        return None, ""

    def _method(self, node: ast.ClassDef, home: str, name: str) -> Signature | None:
        member, _ = self._member(node, home, name)
        if member is not None:
            return of_function(member)
        return Signature(frozenset(), open=True) if self._has_strangers(node, home) else None

    def _constructor(self, node: ast.ClassDef, home: str) -> Signature:
        """Of __init__, or of the fields where the class has none: dataclasses, pydantic models."""
        fields: set[str] = set()
        for kind, _ in self._lineage(node, home):
            own = next((m for m in top_level(kind) if isinstance(m, ast.FunctionDef) and m.name == "__init__"), None)
            if own is not None:
                found = of_function(own)
                return Signature(found.names | fields, found.open)
            fields |= {
                m.target.id
                for m in kind.body
                if isinstance(m, ast.AnnAssign) and isinstance(m.target, ast.Name) and takes(m)
            }
        return Signature(frozenset(fields), open=not fields)


def takes(field: ast.AnnAssign) -> bool:
    """Whether a dataclass takes the field as an argument."""
    if "ClassVar" in ast.unparse(field.annotation):
        return False
    words = field.value.keywords if isinstance(field.value, ast.Call) else []
    return not any(word.arg == "init" and getattr(word.value, "value", True) is False for word in words)


def of_function(node: ast.FunctionDef) -> Signature:
    """Its named arguments, and the names that it takes out of its **kwargs by `pop`, `get` or an index."""
    arguments = node.args
    names = {a.arg for a in (*arguments.args, *arguments.kwonlyargs)} - {"self", "cls"}
    if arguments.kwarg is not None:
        names |= set(taken_from(node, arguments.kwarg.arg))
    return Signature(frozenset(names), arguments.kwarg is not None)


def taken_from(node: ast.FunctionDef, kwargs: str) -> Iterator[str]:
    for inner in ast.walk(node):
        key = None
        if isinstance(inner, ast.Call) and isinstance(inner.func, ast.Attribute) and inner.args:
            if inner.func.attr in ("pop", "get") and getattr(inner.func.value, "id", "") == kwargs:
                key = inner.args[0]
        elif isinstance(inner, ast.Subscript) and getattr(inner.value, "id", "") == kwargs:
            key = inner.slice
        if isinstance(key, ast.Constant) and isinstance(key.value, str):
            yield key.value


def top_level(node: ast.AST) -> Iterator[ast.stmt]:
    """Statements of a module or class, those below `if`, `try` and `with` included, those of functions not."""
    for child in getattr(node, "body", []):
        yield child
        if isinstance(child, ast.If | ast.Try | ast.With):
            yield from top_level(child)
    for part in ("orelse", "finalbody"):
        if below := getattr(node, part, None):
            yield from top_level(ast.Module(below, []))
    for handler in getattr(node, "handlers", []):
        yield from top_level(handler)


def module_of(path: str) -> str:
    """`a.b` for a/b.py and a/b/__init__.py, `a.b.pyi` for the stubs."""
    stub = path.endswith(".pyi")
    name = path.removesuffix("i" if stub else "").removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return f"{name}.pyi" if stub else name
