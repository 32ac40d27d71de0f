"The repository keeps its own rules: notebooks and modules agree, the README is the index, the package holds what it needs."
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

BIN = Path(sys.executable).parent
REPO = Path(__file__).parents[1]
CHAPTERS = sorted((REPO/"nbs").glob("*.ipynb"))


def run(*command, cwd, **env):
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, env=os.environ | env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copy_of(repo, folder):
    "The files that belong to the project, without environments, runs and leftovers."
    ignore = shutil.ignore_patterns(".venv*", ".git", "runs", "_proc", "_docs", "*.egg-info", "__pycache__", "build", "dist", "shared", ".pytest_cache")
    return shutil.copytree(repo, folder/"copy", symlinks=True, ignore=ignore)


def texts(folder, *patterns): return {str(p.relative_to(folder)): p.read_text() for pattern in patterns for p in sorted(folder.glob(pattern))}


def test_export_and_clean_leave_no_difference(repo, tmp_path):
    copy = copy_of(repo, tmp_path)
    before = texts(copy, "clip_nbdev/*.py", "nbs/*.ipynb")
    run(BIN/"nbdev_export", cwd=copy, PATH=f"{BIN}:{os.environ['PATH']}")
    run(BIN/"nbdev_clean", cwd=copy, PATH=f"{BIN}:{os.environ['PATH']}")
    after = texts(copy, "clip_nbdev/*.py", "nbs/*.ipynb")
    changed = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    assert not changed, f"run `make export` and commit: {changed}"
    assert not (copy/"pyproject.toml").exists()


def test_readme_is_the_index(repo, tmp_path):
    run(sys.executable, "-m", "nbconvert", "--no-input", "--to", "markdown", "--output-dir", tmp_path, "--output", "README", repo/"nbs"/"index.ipynb", cwd=repo)
    made = re.sub(r"\]\(([a-z0-9_]+\.ipynb|images/)", r"](nbs/\1", (tmp_path/"README.md").read_text()) # chapters lie in nbs/ as seen from the README
    assert made == (repo/"README.md").read_text(), "run `make readme` and commit"


def test_site_lists_every_chapter(repo):
    assert os.readlink(repo/"nbs"/"_quarto.yml") == "../_quarto.yml"
    sidebar = yaml.safe_load((repo/"nbs"/"sidebar.yml").read_text())["website"]["sidebar"]["contents"]
    listed = [page for entry in sidebar for page in (entry["contents"] if isinstance(entry, dict) else [entry])]
    assert sorted(listed) == sorted(p.name for p in CHAPTERS)
    numbered = [page for page in listed if page[0].isdigit()]
    assert numbered == sorted(numbered), "the path through the book follows the numbers"
    assert all(re.fullmatch(r"\d\d_[a-z_]+\.ipynb", page) for page in numbered)


def test_index_names_every_chapter_and_its_question(repo):
    readme = (repo/"README.md").read_text()
    for path in CHAPTERS:
        title,question = (re.search(p, source(cells_of(path)[0]), re.M)[1] for p in (r"^# (?:\d\d · )?(.+)$", r"^> (.+)$"))
        if path.name[0].isdigit(): assert f"| {path.name[:2]} | [{title}](nbs/{path.name}) | {question} |" in readme, path.name


def source(cell): return "".join(cell["source"])
def cells_of(path): return json.loads(path.read_text())["cells"]


def test_no_output_is_stale():
    import execute
    assert not [p.name for p in execute.stale()], "run `make execute` and commit"


def directives(cell): return "\n".join(line for line in source(cell).splitlines() if line.startswith("#|"))


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_lines_fit_the_page(path):
    "100 characters where the page shows the code, folded or not; 120 elsewhere."
    for i,cell in enumerate(cells_of(path)):
        if cell["cell_type"] != "code": continue
        limit = 120 if re.search(r"#\|\s*(hide|export)\s*( \w+)?$", directives(cell), re.M) else 100
        long = [line for line in source(cell).splitlines() if len(line) > limit and not line.startswith("#|")]
        assert not long, f"cell {i}: {len(long[0])} characters, at most {limit}: {long[0]}"


@pytest.mark.parametrize("path", sorted((REPO/"clip_nbdev").glob("[a-z]*.py")), ids=lambda p: p.stem)
def test_lines_of_the_package(path):
    long = [line for line in path.read_text().splitlines() if len(line) > 120 and not line.startswith("__all__")]
    assert not long, long[0]


def anchors_of(path):
    "What a link may lead to in a chapter: its headings, as pandoc names them, its figures and tables, and what it exports."
    found = set()
    for cell in cells_of(path):
        if cell["cell_type"] == "markdown":
            for title in re.findall(r"^#{2,} +(.+?)\s*(?:\{.*\})?$", source(cell), re.M):
                name = re.sub(r"[^\w\s.-]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).replace("`", "").lower())
                found.add(re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", name.strip())))
            found |= set(re.findall(r"\{#([\w-]+)", source(cell)))
        else:
            found |= set(re.findall(r"^#\|\s*label:\s*(\S+)", source(cell), re.M))
            if "#| export" in source(cell): found |= set(re.findall(r"^(?:def|class) (\w+)", source(cell), re.M))
    return found


ANCHORS = {p.name:anchors_of(p) for p in CHAPTERS}


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_links_resolve(path):
    prose = "\n".join(source(c) for c in cells_of(path) if c["cell_type"] == "markdown")
    prose = re.sub(r"```.*?```", "", prose, flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if target.startswith(("http://", "https://", "mailto:")): continue
        name,_,anchor = target.partition("#")
        assert not name or (path.parent/name).exists(), target
        if anchor: assert anchor in ANCHORS[name or path.name], f"{target}: there are {sorted(ANCHORS[name or path.name])}"
    for label in re.findall(r"(?<![\w`])@((?:fig|tbl|eq|sec)-[\w-]+)", prose): assert label in ANCHORS[path.name], label
    for name in re.findall(r'(?:load|save)_result\("(\w+)"', "\n".join(map(source, cells_of(path)))):
        number = name.split("_")[0]
        if number.isdigit() and (path.parent/"results"/f"{name}.json").exists(): continue
        assert path.stem == "80_core", f"no result {name}"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_title_stands_alone(path):
    "nbdev makes title and description of the first cell and drops whatever else it holds."
    left = [line for line in source(cells_of(path)[0]).splitlines() if line.strip() and line[0] not in "#>"]
    assert not left, left[0]
    assert re.search(r"^> .", source(cells_of(path)[0]), re.M), "no question"


@pytest.fixture(scope="module")
def pages(repo, tmp_path_factory):
    "What nbdev makes of the notebooks for Quarto."
    copy = copy_of(repo, tmp_path_factory.mktemp("pages"))
    # where there is no Quarto, nbdev sets about installing it, and this copy as the package: a stand-in keeps it from that
    stand_in = tmp_path_factory.mktemp("bin")/"quarto"
    stand_in.write_text("#!/bin/sh\nexit 1\n")
    stand_in.chmod(0o755)
    run(BIN/"nbdev_proc_nbs", "--n_workers", "2", cwd=copy, PATH=f"{BIN}:{os.environ['PATH']}:{stand_in.parent}", PYTHONPATH=str(copy))
    return copy/"_proc"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_page_keeps_every_word(path, pages):
    cells = cells_of(pages/path.name)
    plain = lambda text: re.sub(r"\s+", "", re.sub(r"\[(`[^`]*`)\]\([^)]*\)", r"\1", text).replace("()`", "`"))
    page = plain(" ".join(source(c) for c in cells if c["cell_type"] == "markdown"))
    for cell in cells_of(path)[1:]:
        if cell["cell_type"] == "markdown": assert plain(source(cell)) in page, source(cell)[:200]
    front = yaml.safe_load(source(cells[0]).strip().strip("-"))
    first = source(cells_of(path)[0])
    assert (front["title"], front["description"]) == tuple(re.search(p, first, re.M)[1] for p in (r"^# (.+)$", r"^> (.+)$"))


def test_signatures_link_to_their_source(pages):
    loss = "".join(json.dumps(c) for c in cells_of(pages/"02_loss.ipynb"))
    assert re.search(r"clip_nbdev/loss\.py#L\d+\)\{\.source-link\}", loss) and "[]{#clip_loss}" in loss


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_chapter_reads_without_running(path):
    cells = json.loads(path.read_text())["cells"]
    code = [c for c in cells if c["cell_type"] == "code"]
    outputs = json.dumps([c["outputs"] for c in code])
    assert cells[0]["cell_type"] == "markdown" and "".join(cells[0]["source"]).startswith("# ")
    assert not code or any(c["outputs"] for c in code), "no stored outputs"
    assert '"output_type": "error"' not in outputs
    assert not any(p in outputs for p in (str(Path.home())+"/", "/tmp/", "site-packages")), "a machine's path in the outputs"
    assert path.stat().st_size < 1_000_000


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_imports_stand_alone(path):
    "The docs build runs every cell that holds an import: such a cell must not need what other cells define."
    for cell in cells_of(path):
        if cell["cell_type"] != "code" or re.search(r"^[%!]", source(cell), re.M): continue
        tree = ast.parse(source(cell))
        if not any(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.walk(tree)): continue
        others = [ast.unparse(n) for n in tree.body if not isinstance(n, (ast.Import, ast.ImportFrom))]
        others = [code for code in others if not code.startswith(("warnings.", "logging.", "nbdev.nbdev_export"))]
        assert not others, f"an import and other code in one cell: {others[0]}"
        assert not any(a.name == "*" for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names)


def closure(requirements):
    "Names of the distributions that these requirements install, extras left out."
    found, todo = set(), list(requirements)
    while todo:
        req = Requirement(todo.pop())
        if req.marker and not req.marker.evaluate({"extra": ""}): continue
        name = req.name.lower().replace("_", "-")
        if name in found: continue
        try: dist = distribution(name)
        except PackageNotFoundError: continue
        found.add(name)
        todo += dist.requires or []
    return found


def runtime_environment(repo, folder):
    "A folder with links to the runtime requirements alone, as site-packages would look after `pip install .`."
    cfg = ConfigParser(delimiters=["="])
    cfg.read(repo/"settings.ini")
    names = closure(cfg["DEFAULT"]["requirements"].split())
    folder.mkdir()
    for name in names:
        for file in distribution(name).files or ():
            top = file.parts[0]
            source = Path(distribution(name).locate_file(top))
            if top not in ("..", "__pycache__") and source.exists() and not (folder/top).exists(): (folder/top).symlink_to(source)
    (folder/"clip_nbdev").symlink_to(repo/"clip_nbdev")
    return names


def test_imports_with_runtime_requirements_alone(repo, tmp_path):
    names = runtime_environment(repo, tmp_path/"site")
    assert not names & {"nbdev", "fastcore", "execnb", "ghapi", "open-clip-torch", "transformers", "pytest"}
    modules = [p.stem for p in sorted((repo/"clip_nbdev").glob("*.py")) if not p.stem.startswith("_")]
    code = (f"import sys; sys.path = [p for p in sys.path if 'site-packages' not in p] + [{str(tmp_path/'site')!r}]\n"
            f"import importlib\nfor m in {modules!r}: importlib.import_module('clip_nbdev.'+m)\n"
            "for gone in ('nbdev', 'fastcore', 'execnb', 'open_clip', 'transformers'):\n"
            "    assert gone not in sys.modules, gone\n"
            "    try: __import__(gone)\n    except ModuleNotFoundError: continue\n    raise SystemExit(f'{gone} can be imported: this environment proves nothing')\n")
    run(sys.executable, "-I", "-S", "-c", code, cwd=tmp_path)


def test_init_is_light(repo):
    code = "import sys, clip_nbdev; clip_nbdev.load, clip_nbdev.create_model, clip_nbdev.available_models; assert 'clip_nbdev.train' not in sys.modules"
    run(sys.executable, "-c", code, cwd=repo)


def test_wheel_builds_and_holds_weights(repo, tmp_path):
    copy = copy_of(repo, tmp_path)
    (copy/"clip_nbdev"/"weights").mkdir(exist_ok=True)
    (copy/"clip_nbdev"/"weights"/"probe.safetensors").write_bytes(b"x")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path/"dist", copy, cwd=tmp_path)
    wheel = zipfile.ZipFile(next((tmp_path/"dist").glob("*.whl")))
    names = wheel.namelist()
    assert "clip_nbdev/weights/probe.safetensors" in names and "clip_nbdev/train.py" in names
    assert not any(n.startswith(("nbs/", "tests/")) for n in names)
    metadata = wheel.read(next(n for n in names if n.endswith("METADATA"))).decode()
    assert "Requires-Dist: torch" in metadata and "Requires-Python: >=3.11" in metadata
