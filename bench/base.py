"""Another revision of the project, built to be measured next to this one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SOURCES = ("csrc", "sodfast", "CMakeLists.txt", "setup.py")


def revision_of(tree: Path) -> str:
    """The short git revision of a source tree, with -dirty when what is built from differs."""
    head = _git(tree, "rev-parse", "--short=10", "HEAD")
    if head.returncode:
        return "unknown"
    changed = _git(tree, "status", "--porcelain", "--", *SOURCES).stdout.strip()
    return head.stdout.strip() + ("-dirty" if changed else "")


def build_revision(root: Path, revision: str) -> Path:
    """Check a revision out under build/, build its extension there, and return its folder.

    A revision that was built before is taken as it is. Exits with a sentence when git does not
    know the revision, or its build fails.
    """
    found = _git(root, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    if found.returncode:
        sys.exit(f"bench: --base {revision}: git knows no such revision")
    commit = found.stdout.strip()
    tree = root / "build" / "base" / commit[:10]
    if not tree.exists():
        _git(root, "worktree", "prune")  # forget those that `make clean` has removed
        added = _git(root, "worktree", "add", "--detach", str(tree), commit)
        if added.returncode:
            sys.exit(f"bench: --base {revision}: {added.stderr.strip()}")
    if not list((tree / "sodfast").glob("_C*.so")):
        print(f"bench: building {revision} in {tree.relative_to(root)}", file=sys.stderr)
        # cmake and ninja lie beside the interpreter
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        built = subprocess.run(
            [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
            cwd=tree, env={**os.environ, "PATH": path}, capture_output=True, text=True,
        )  # fmt: skip
        if built.returncode:
            log = tree.with_suffix(".log")
            log.write_text(built.stdout + built.stderr)
            sys.exit(f"bench: --base {revision}: its build failed; see {log.relative_to(root)}")
    return tree


def _git(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            ["git", "-C", str(tree), *arguments], capture_output=True, text=True
        )  # fmt: skip
    except FileNotFoundError:
        return subprocess.CompletedProcess([], 127, "", "git is not installed")
