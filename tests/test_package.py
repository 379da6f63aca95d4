"""The package as a whole: light to import, quick to ask for help."""

import subprocess
import sys

import pytest

import insitu


def test_importing_insitu_loads_no_torch_and_help_loads_no_transformers() -> None:
    code = "import sys, insitu, insitu.cli; print(sorted({'torch', 'transformers', 'numpy', 'fastapi'} & sys.modules.keys()))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_public_names_resolve_and_unknown_ones_name_them() -> None:
    for name in insitu.__all__:
        assert getattr(insitu, name) is not None
    with pytest.raises(AttributeError, match="APOLLO"):
        insitu.AdamW  # noqa: B018


def test_every_verb_explains_itself() -> None:
    from insitu.cli import app

    verbs = ["demo", "serve", "chat", "learn", "status", "versions", "rollback", "memory", "doctor"]
    told = subprocess.run(
        [sys.executable, "-m", "insitu.cli", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for verb in verbs:
        assert f" {verb} " in told
        assert app[verb].help
