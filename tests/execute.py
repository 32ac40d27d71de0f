"""Execute chapters from a fresh kernel and note from which sources their outputs come.

    python tests/execute.py nbs/02_loss.ipynb ...    these
    python tests/execute.py --stale                  those whose outputs are older than their code
    python tests/execute.py --list                   name the stale ones and do nothing

`nbs/executed.json` holds a hash for each chapter: of its own cells, of all modules of the package that they import, directly
or not, of the result files that it reads, of the shipped weights where it
uses them, and of the verdicts of all chapters where it collects them. Comments, layout and docstrings do not count. Cells flagged slow, gpu, data or
`eval: false` are not run, and keep the outputs that they have."""
import argparse
import ast
import hashlib
import io
import json
import re
import sys
import tokenize
from functools import lru_cache
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
NBS,RECORD = REPO/"nbs",REPO/"nbs"/"executed.json"
LEFT_OUT = re.compile(r"^#\|\s*(slow|gpu|data|eval:\s*false)\s*$", re.M)


def bare(source):
    "The code without comments, layout and docstrings; the same for every version of Python."
    kept,alone = [],True # whether a statement begins here
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type not in (tokenize.COMMENT, tokenize.NL)]
    for token,after in zip(tokens, tokens[1:] + tokens[-1:]):
        docstring = alone and token.type == tokenize.STRING and after.type in (tokenize.NEWLINE, tokenize.ENDMARKER)
        alone = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
        if not docstring: kept.append(token.string)
    return re.sub(r",([)\]}])", r"\1", "".join("".join(kept).split())) # a comma before a bracket is layout too


def modules_in(tree):
    "Modules of the package that a tree imports."
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level: names = [f"clip_nbdev.{node.module}"]
        elif isinstance(node, ast.ImportFrom): names = [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
        else: continue
        found |= {n.split(".")[1] for n in names if n.startswith("clip_nbdev.")} | ({"__init__"} if "clip_nbdev" in names else set())
    return found


@lru_cache(None)
def module(name):
    "(its code, the modules it imports); nothing for what is no module."
    path = REPO/"clip_nbdev"/f"{name}.py"
    if not path.exists(): return "", ()
    source = path.read_text()
    code = re.sub(r"^__all__ = .*?\]$", "", source, flags=re.M | re.S)
    return bare(code), tuple(sorted(modules_in(ast.parse(source))))


def below(names):
    "All modules that these need."
    found,todo = set(),list(names)
    while todo:
        name = todo.pop()
        if name in found: continue
        found.add(name)
        todo += module(name)[1]
    return sorted(found)


def verdicts():
    "Tables with a verdict column of all chapters, in their text or their stored outputs."
    cells = [c for p in sorted(NBS.glob("[0-9]*.ipynb")) if p.stem != "59_claims" for c in json.loads(p.read_text())["cells"]]
    texts = ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]
    tables = ["".join(o.get("data", {}).get("text/html", ())) for c in cells for o in c.get("outputs", ())]
    return [t for t in texts if "| verdict" in t] + [t for t in tables if ">verdict<" in t]


def runs(cell): return cell["cell_type"] == "code" and not LEFT_OUT.search("".join(cell["source"])) and "nbdev_export()" not in "".join(cell["source"])


def fingerprint(path):
    "A hash of what a chapter's outputs come from."
    code = ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if runs(c)]
    code = [re.sub(r"^[%!].*$", "", c, flags=re.M) for c in code]
    parts = [bare(c) for c in code] + [module(m)[0] for m in below(set().union(*(modules_in(ast.parse(c)) for c in code)))]
    results = [NBS/"results"/f"{r}.json" for r in sorted(set(re.findall(r'load_result\("(\w+)"\)', "\n".join(code))))]
    parts += [p.read_text() for p in results if p.exists()]
    if re.search(r"\b(pocket|shipped)\b", "\n".join(code)): parts += [hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(REPO.glob("clip_nbdev/weights/*/*"))]
    if "claims.json" in "\n".join(code): parts += [(NBS/"claims.json").read_text(), *verdicts()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def stale():
    "Chapters whose outputs are older than their code."
    known = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    return [p for p in sorted(NBS.glob("*.ipynb")) if known.get(p.stem) != fingerprint(p)]


def note(path):
    "Record what a chapter's outputs come from."
    known = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    there = {p.stem for p in NBS.glob("*.ipynb")}
    known = {k:v for k,v in (known | {path.stem:fingerprint(path)}).items() if k in there}
    RECORD.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def execute(path):
    "Run a chapter from a fresh kernel and store what it shows."
    import nbformat
    from nbclient import NotebookClient
    nb = nbformat.read(path, 4)
    for cell in nb.cells:
        if cell.cell_type == "code" and runs(cell): cell.outputs,cell.execution_count = [],None
    client = NotebookClient(nb, timeout=1200, kernel_name="python3", resources={"metadata":{"path":str(NBS)}})
    with client.setup_kernel():
        for i,cell in enumerate(nb.cells):
            if cell.cell_type == "code" and runs(cell): client.execute_cell(cell, i)
    nbformat.write(nb, path)
    note(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chapters", nargs="*", type=Path)
    parser.add_argument("--stale", action="store_true", help="all whose outputs are older than their code")
    parser.add_argument("--list", action="store_true", help="name the stale ones and do nothing")
    args = parser.parse_args()
    if args.list: sys.exit("\n".join(p.name for p in stale()) or None)
    for path in stale() if args.stale else args.chapters:
        print(f"executing {path.name}", flush=True)
        execute(path.resolve())
