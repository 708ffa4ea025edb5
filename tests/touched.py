"""What a file of the kit touches of vLLM, read off its source: nothing is imported or run."""

from __future__ import annotations

import ast
import re

MODULE = re.compile(r"vllm(\.\w+)+")
CONFIG = "vllm.config.VllmConfig"
# vLLM's configs lie in fields of one name everywhere, and the kit's variables are called like them: name -> class, and the
# class that has the field.
CONFIGS = {
    "cache_config": ("vllm.config.CacheConfig", CONFIG),
    "draft_model_config": ("vllm.config.ModelConfig", "vllm.config.SpeculativeConfig"),
    "load_config": ("vllm.config.load.LoadConfig", CONFIG),
    "model_config": ("vllm.config.ModelConfig", CONFIG),
    "parallel_config": ("vllm.config.ParallelConfig", CONFIG),
    "scheduler_config": ("vllm.config.SchedulerConfig", CONFIG),
    "speculative_config": ("vllm.config.SpeculativeConfig", CONFIG),
}
# What a function of vLLM's returns, what kind of object a variable or a field is; None: no class of vLLM's.
GIVES = {
    "vllm.config.ModelConfig.hf_text_config": None,
    "vllm.config.get_current_vllm_config_or_none": CONFIG,
    "vllm.config.load.LoadConfig.model_loader_extra_config": None,
    "vllm.distributed.parallel_state.get_pp_group": "vllm.distributed.parallel_state.GroupCoordinator",
    "vllm.distributed.parallel_state.get_tp_group": "vllm.distributed.parallel_state.GroupCoordinator",
    "vllm.engine.arg_utils.EngineArgs.create_engine_config": CONFIG,
    "vllm.platforms.current_platform": "vllm.platforms.interface.Platform",
}


class Touched(ast.NodeVisitor):
    """Walks over a file.

    Attributes:
        names: what it touches: "vllm.config.ModelConfig.architectures".
        methods: of its classes that have a base of vLLM's, under the name of that base: some may be the kit's own.
        asked: attributes that it looks up by a string, of objects that it does not know.
        words: every identifier and string in it.
    """

    def __init__(self, source: str):
        self.names: set[str] = set()
        self.methods: set[str] = set()
        self.asked: set[str] = set()
        self.words: set[str] = set()
        self._variables: dict[str, str | None] = {}  # -> place in vLLM
        self._strings: dict[str, list[str]] = {}  # variable -> what it may be
        self.visit(ast.parse(source))

    def place(self, node: ast.AST) -> str | None:
        """What an expression is: "vllm.config.ModelConfig" for the class and for an object of it, None outside vLLM."""
        found = None
        if isinstance(node, ast.Name):
            known = CONFIGS.get(node.id, (None,))[0]
            found = self._variables.get(node.id, known)
        elif isinstance(node, ast.Attribute):
            owner = self.place(node.value)
            found = CONFIGS[node.attr][0] if node.attr in CONFIGS else owner and f"{owner}.{node.attr}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
            found = next((module for module in self.strings(node.args[0]) if MODULE.fullmatch(module)), None)
        elif isinstance(node, ast.Call):
            found = self.place(node.func)
            return found if found in GIVES.values() or is_class(found) else None
        return GIVES.get(found, found)

    def strings(self, node: ast.AST) -> list[str]:
        """The strings that an expression is, or that a loop over it gives first."""
        if isinstance(node, ast.Name):
            return self._strings.get(node.id, [])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "items":
            return self.strings(node.func.value)
        parts = node.keys if isinstance(node, ast.Dict) else getattr(node, "elts", [node])
        return [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]

    def touch(self, owner: str | None, name: str) -> None:
        if owner is not None and not name.startswith("__"):
            self.names.add(f"{owner}.{name}")

    def bind(self, target: ast.AST, value: ast.AST) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for pair in zip(target.elts, value.elts):
                self.bind(*pair)
        elif isinstance(target, ast.Name):
            self._variables[target.id], self._strings[target.id] = self.place(value), self.strings(value)

    def loop(self, node: ast.For | ast.comprehension) -> None:
        first = node.target.elts[0] if isinstance(node.target, ast.Tuple) else node.target
        if isinstance(first, ast.Name):
            self._strings[first.id] = self.strings(node.iter)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name.split(".")[0] == "vllm":
                self.names.add(alias.name)
                self._variables[alias.asname or "vllm"] = alias.name if alias.asname else "vllm"

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            is_vllms = node.level == 0 and node.module.split(".")[0] == "vllm"
            self._variables[alias.asname or alias.name] = f"{node.module}.{alias.name}" if is_vllms else None
            if is_vllms:
                self.touch(node.module, alias.name)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        before = self._variables
        self._variables = dict(before)
        self.words.add(node.name)
        for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
            parts = ast.walk(arg.annotation) if arg.annotation else ()
            places = (self.place(part) for part in parts if isinstance(part, ast.Name | ast.Attribute))
            if arg.arg not in CONFIGS:
                self._variables[arg.arg] = next(filter(None, places), None)
        self.generic_visit(node)
        self._variables = before

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        base = next(filter(None, map(self.place, node.bases)), None)
        self.generic_visit(node)
        if base is None:
            return
        inside = [*ast.walk(node)]
        functions = [one for one in inside if isinstance(one, ast.FunctionDef)]
        own = {one.name for one in functions} | {one.targets[0].id for one in node.body if isinstance(one, ast.Assign)}
        self.methods |= {f"{base}.{name}" for name in own if not name.startswith("__")}
        constructors = [one for one in functions if one.name == "__init__"]
        own |= {part.attr for one in constructors for part in ast.walk(one) if is_set(part)}
        for one in inside:
            owner = ast.unparse(one.value) if isinstance(one, ast.Attribute) else ""
            if owner == "super()" or (owner == "self" and one.attr not in own):
                self.touch(base, one.attr)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            self.bind(target, node.value)

    def visit_For(self, node: ast.For) -> None:
        self.loop(node)
        self.generic_visit(node)

    def visit_GeneratorExp(self, node: ast.GeneratorExp) -> None:
        for each in node.generators:
            self.loop(each)
        self.generic_visit(node)

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        self.words.add(node.attr)
        if node.attr in CONFIGS:
            self.touch(CONFIGS[node.attr][1], node.attr)
        else:
            self.touch(self.place(node.value), node.attr)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str):
            self.words.add(node.value)
            if MODULE.fullmatch(module := node.value.rstrip(".")):
                self.names.add(module)

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        called, owner = ast.unparse(node.func), self.place(node.func)
        if called == "replace":
            owner = self.place(node.args[0])
        for name in filter(None, (keyword.arg for keyword in node.keywords)):
            self.words.add(name)
            if is_class(owner):
                self.touch(owner, name)
        if called in ("getattr", "hasattr", "setattr", "_replace", "mock.patch.object"):
            of, names = self.place(node.args[0]), self.strings(node.args[1])
        elif re.fullmatch(r"vars\(\w+\)\.get", called):
            of, names = None, self.strings(node.args[0])
        else:
            return
        for name in names:
            if of is None:
                self.asked.add(name)
            else:
                self.touch(of, name)


def is_class(place: str | None) -> bool:
    return place is not None and place.rpartition(".")[2][0].isupper()


def is_set(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
