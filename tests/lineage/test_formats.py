"""The table of formats that carry a lineage record."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

from llmkit.lineage.formats import FORMATS, Format, content_digest, digest_path, read_lineage


@pytest.mark.parametrize("row", FORMATS, ids=lambda row: row.name)
def test_every_row_names_functions(row: Format) -> None:
    """Property: "module:function" of each row exists, so that a format is one row and its own module."""
    for name in filter(None, (row.record, row.digest)):
        module, _, function = name.partition(":")
        assert callable(getattr(import_module(module), function))


def test_the_first_matching_row_counts(tmp_path: Path) -> None:
    """Behaviour: a plan beside shards is a plan; the final model stands for a run; files of other tools have no record."""
    plan = tmp_path / "plan"
    plan.mkdir()
    (plan / "plan.toml").write_text('llmkit = \'{"command": "mix"}\'\n')
    (plan / "part-00000.arrow").write_bytes(b"")
    assert read_lineage(plan) == {"command": "mix"}
    model = tmp_path / "run" / "checkpoints" / "step-00000001"
    model.mkdir(parents=True)
    (model / "tokenizer_config.json").write_text('{"llmkit": {"command": "vocab"}}')
    (tmp_path / "run" / "final").symlink_to(model)
    assert read_lineage(tmp_path / "run") == {"command": "vocab"}
    assert digest_path(tmp_path / "run") == digest_path(model)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer_config.json").write_text("[]")
    assert read_lineage(tmp_path / "other") is None and content_digest(tmp_path / "other") is None


def test_state_and_hidden_files_do_not_count(tmp_path: Path) -> None:
    """Property: the digest of a directory covers names and content of its files, but not state/, hidden files and links."""
    (tmp_path / "a" / "sub").mkdir(parents=True)
    (tmp_path / "a" / "sub" / "config.json").write_text("{}")
    digest = digest_path(tmp_path / "a")
    (tmp_path / "a" / "state").mkdir()
    (tmp_path / "a" / "state" / "trainer.json").write_text("{}")
    (tmp_path / "a" / ".cache").write_text("x")
    (tmp_path / "a" / "link").symlink_to("sub/config.json")
    assert digest_path(tmp_path / "a") == digest
    (tmp_path / "a" / "sub" / "config.json").rename(tmp_path / "a" / "sub" / "other.json")
    assert digest_path(tmp_path / "a") != digest
