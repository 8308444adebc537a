"""The docs that are made from the code are up to date, and the README's claims have commands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_generated_docs_are_up_to_date():
    done = subprocess.run(
        [sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_ci_runs_the_test_command_of_the_readme():
    readme = (ROOT / "README.md").read_text()
    block = readme.split("<!-- the tests -->")[1].split("```")[1]
    assert "pytest" in block
    assert "the tests" in (ROOT / ".ci" / "run").read_text()


def test_links_and_commands_of_the_readme_exist():
    readme = (ROOT / "README.md").read_text()
    for path in re.findall(r"\]\(([\w./-]+)\)", readme):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"python ([\w/]+\.py)", readme):
        assert (ROOT / path).exists(), path


def test_no_path_of_a_machine_in_the_docs():
    for path in (ROOT / "docs").glob("*.md"):
        assert "File:" not in path.read_text(), path
