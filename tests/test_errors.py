"""Hints for unknown names, and the registry."""

from __future__ import annotations

import subprocess
import sys

import pytest

from llmkit.errors import MAX_LISTED, UsageError, suggestion
from llmkit.registry import Registry


def test_suggestions() -> None:
    """Behaviour: near names first; if none is near, all names; never a very long list."""
    assert suggestion("gofer", ["gopher", "c4"]) == "did you mean 'gopher'?"
    assert suggestion("zzz", ["gopher", "c4"]) == "known: c4, gopher"
    many = suggestion("zzz", [f"task{i}" for i in range(10_000)])
    assert many.endswith(f"and {10_000 - MAX_LISTED:,} more") and len(many) < 500
    assert suggestion("x", []) == ""


def test_registry_names_and_unknown_ones() -> None:
    """Behaviour: registered entries are found; an unknown name is a usage error with a hint."""
    registry = Registry("thing")
    registry.register("one")(1)
    assert registry.get("one") == 1 and registry.names() == ["one"]
    with pytest.raises(UsageError, match="unknown thing 'oen'") as caught:
        registry.get("oen")
    assert "one" in caught.value.hint


def test_third_party_entry_is_loaded_only_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: an entry point's name is listed without importing it; a broken one is reported by name."""
    from importlib.metadata import EntryPoint

    points = [EntryPoint("good", "math:pi", "llmkit.things"), EntryPoint("bad", "no_such_module:x", "llmkit.things")]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: points if group == "llmkit.things" else [])
    registry = Registry("thing", "llmkit.things")
    assert registry.names() == ["bad", "good"]
    assert registry.get("good") == pytest.approx(3.14159, abs=1e-4)
    with pytest.raises(Exception, match="thing 'bad' from no_such_module:x does not load"):
        registry.get("bad")


def test_modules_of_a_package_are_entries() -> None:
    """Behaviour: a module of the package is listed without importing it, and registers itself when requested."""
    code = (
        "import sys; from llmkit.model.families import ARCHITECTURES\n"
        "assert {'llama', 'olmo2', 'qwen3'} <= set(ARCHITECTURES.names())\n"
        "assert 'llmkit.model.families.llama' not in sys.modules\n"
        "assert ARCHITECTURES.get('llama').hf_class == 'LlamaForCausalLM'\n"
        "assert 'llmkit.model.families.qwen3' not in sys.modules and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
