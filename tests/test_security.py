"""Rules that keep data from becoming code, and durable files durable: read from the source, so that no path escapes.

Each rule has the sentence that a developer needs when it fails. The rules are proved to bite by examples at the end.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("lmcore/**/*.py"), *ROOT.glob("tools/*.py")])
STORAGE = ROOT / "lmcore" / "storage.py"

UNSAFE_IMPORTS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__"}
DURABLE_WRITERS = {
    "np.save": "np.save",
    "np.savez": "np.savez",
    "numpy.save": "numpy.save",
    "torch.save": "torch.save",
    "save_file": "safetensors' save_file",
    "open_memmap": "np.lib.format.open_memmap",
    "shutil.move": "shutil.move",
    "shutil.copy": "shutil.copy",
    "shutil.copyfile": "shutil.copyfile",
    "shutil.copytree": "shutil.copytree",
    "os.rename": "os.rename",
    "os.replace": "os.replace",
    "os.fsync": "os.fsync",
}
SYNCED_ELSEWHERE = {"lmcore/training/rundir.py": {"os.fsync"}}
"""metrics.jsonl: appended at every step without a sync, made durable before each checkpoint."""


TEMPORARY_FILES = {"lmcore/training/rehearsal.py"}
"""Its files live in a temporary directory and die with the command."""


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return "?"


def constant(call: ast.Call, name: str) -> object:
    """The literal value of a keyword argument, None when it is absent, "?" when it is computed."""
    for keyword in call.keywords:
        if keyword.arg == name:
            return keyword.value.value if isinstance(keyword.value, ast.Constant) else "?"
    return None


def _names_only_errors(text: str) -> bool:
    """`except pickle.UnpicklingError` is how a refused file announces itself."""
    uses = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Attribute) and dotted(n.value) == "pickle"]
    return bool(uses) and all(use.attr in ("UnpicklingError", "PickleError") for use in uses)


def findings(text: str, name: str = "example.py") -> Iterator[str]:
    """One sentence for each broken rule."""
    for node in ast.walk(ast.parse(text)):
        where = f"{name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for module in modules:
                if module == "pickle" and isinstance(node, ast.Import) and _names_only_errors(text):
                    continue
                if module.split(".")[0] in UNSAFE_IMPORTS:
                    yield f"{where}: {module}: no pickle is ever written or read"
        if not isinstance(node, ast.Call):
            continue
        called = dotted(node.func)
        last = called.rpartition(".")[2]
        if called in UNSAFE_CALLS or (called.startswith("builtins.") and last in UNSAFE_CALLS):
            yield f"{where}: {called}: text from outside must not become code"
        if called in ("torch.load", "torch.serialization.load") and constant(node, "weights_only") is not True:
            yield f"{where}: torch.load without weights_only=True executes what the file says"
        if constant(node, "weights_only") not in (None, True):
            yield f"{where}: weights_only must be True"
        if constant(node, "allow_pickle") not in (None, False):
            yield f"{where}: allow_pickle must be False"
        if called in ("np.load", "numpy.load") and constant(node, "allow_pickle") is not False:
            yield f"{where}: say allow_pickle=False to np.load"
        if constant(node, "trust_remote_code") not in (None, False):
            yield f"{where}: trust_remote_code runs code of strangers"
        if last in ("load", "load_all", "compose") and called.startswith("yaml."):
            loaders = [dotted(k.value) for k in node.keywords if k.arg == "Loader"] + [dotted(a) for a in node.args[1:]]
            if loaders != ["_Loader"]:
                yield f"{where}: {called}: read YAML with lmcore.config (our own safe loader)"
        if called in ("yaml.unsafe_load", "yaml.full_load", "yaml.safe_load"):
            yield f"{where}: {called}: read YAML with lmcore.config (our own safe loader)"
        if constant(node, "shell") not in (None, False) or called in ("os.system", "os.popen"):
            yield f"{where}: {called}: no shell"
        if called in ("tempfile.mktemp",):
            yield f"{where}: {called}: a name that another process may take first"
        if last in ("extractall", "unpack_archive"):
            yield f"{where}: {called}: no archive is unpacked"
        for pattern, shown in DURABLE_WRITERS.items():
            if called == pattern or ("." not in pattern and last == pattern):
                if pattern not in SYNCED_ELSEWHERE.get(name, ()):
                    yield f"{where}: {shown}: durable files are written by lmcore.storage"
        if last in ("write_text", "write_bytes") and name not in TEMPORARY_FILES:
            yield f"{where}: {called}: durable files are written by lmcore.storage"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_source_keeps_the_rules(path: Path) -> None:
    if path == STORAGE:
        return
    broken = list(findings(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT))))
    assert not broken, "\n".join(broken)


def test_files_opened_for_writing_are_few_and_known() -> None:
    """open(..., "w") outside storage.py: each one is here with the reason why it need not be durable."""
    known = {
        "lmcore/training/rundir.py": "metrics.jsonl, synced before each checkpoint",
    }
    found = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and dotted(node.func).rpartition(".")[2] in ("open", "fdopen"):
                texts = [a.value for a in node.args[:2] if isinstance(a, ast.Constant)] + [constant(node, "mode")]
                modes = [t for t in texts if isinstance(t, str) and set(t) <= set("rwaxbt+") and set(t) & set("wax+")]
                if modes and path != STORAGE:
                    found.add(str(path.relative_to(ROOT)))
    assert found <= set(known), sorted(found - set(known))


EXAMPLES = [
    "import pickle",
    "import pickle\npickle.loads(data)",
    "from pickle import loads",
    "import joblib.numpy_pickle",
    "torch.load(path)",
    "torch.load(path, weights_only=False)",
    "torch.load(path, weights_only=flag)",
    "np.load(path)",
    "np.load(path, allow_pickle=True)",
    "numpy.load(path, allow_pickle=allowed)",
    "eval(text)",
    "exec(open(path).read())",
    "AutoModel.from_pretrained(name, trust_remote_code=True)",
    "load_dataset(name, trust_remote_code=flag)",
    "yaml.load(text)",
    "yaml.load(text, Loader=yaml.Loader)",
    "yaml.load(text, yaml.UnsafeLoader)",
    "yaml.safe_load(text)",
    "subprocess.run(text, shell=True)",
    "os.system(text)",
    "tar.extractall(path)",
    "np.save(path, array)",
    "torch.save(model, path)",
    "safetensors.torch.save_file(tensors, path)",
    "save_file(tensors, path)",
    "np.lib.format.open_memmap(path, 'w+')",
    "shutil.move(a, b)",
    "os.replace(a, b)",
    "Path(path).write_text(text)",
    "tempfile.mktemp()",
]


@pytest.mark.parametrize("text", EXAMPLES)
def test_each_rule_bites(text: str) -> None:
    assert list(findings(text))


@pytest.mark.parametrize(
    "text",
    [
        "import pickle\ntry: pass\nexcept pickle.UnpicklingError: pass",
        "torch.load(path, weights_only=True)",
        "np.load(path, allow_pickle=False)",
        "yaml.load(text, Loader=_Loader)",
        "model.eval()",
        "re.compile(text)",
        "torch.compile(model)",
        "storage.write_file(path, data)",
        "json.load(file)",
    ],
)
def test_what_is_allowed_passes(text: str) -> None:
    assert not list(findings(text))
