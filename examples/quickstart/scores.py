"""The table of scores at the end of the quickstart, with an explanation.

python examples/quickstart/scores.py data/summary.json base-scores.json averaged-scores.json chat-scores.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

NAMES = {
    "run": "base",
    "annealed": "annealed",
    "averaged": "average of 3",
    "sft": "fine-tuned",
    "chat": "aligned",
    "chat-int8": "aligned, int8",
    "chat-int4": "aligned, int4",
}
CHOICE, SUMS = "docstring_choice", "two_digit_sums"
COLUMNS = ("", "perplexity", "bits/byte", "choice: sum", "per character", "PMI", "sums right")


def rows(files: list[Path]) -> dict[str, dict[str, float]]:
    """Model -> scores, from the JSON of `llmkit eval`; without task scores for a model evaluated on documents only."""
    results: dict[str, dict[str, float]] = {}
    for file in files:
        for model, scores in json.loads(file.read_text())["models"].items():
            texts = next(iter(scores["perplexity"].values()))
            figures = {"perplexity": texts["perplexity"], "bits_per_byte": texts["bits_per_byte"]}
            if "tasks" in scores:
                choice, sums = scores["tasks"][CHOICE], scores["tasks"][SUMS]
                figures |= {
                    "acc": choice["acc"],
                    "acc_norm": choice["acc_norm"],
                    "pmi": choice["acc_mutual_info"],
                    "pmi_stderr": choice["acc_mutual_info_stderr"],
                    "items": choice["items"],
                    "sums": sums["exact_match,last_number"],
                    "sums_items": sums["items"],
                }
            results[NAMES.get(model.strip("/"), model)] = figures
    return results


def table(results: dict[str, dict[str, float]], rule: dict[str, float]) -> list[str]:
    """The lines of the table."""
    lines = [COLUMNS]
    for name, f in results.items():
        cells = [name, f"{f['perplexity']:.1f}", f"{f['bits_per_byte']:.3f}"]
        if "pmi" in f:
            cells += [f"{100 * f[key]:.1f} %" for key in ("acc", "acc_norm")]
            cells += [f"{100 * f['pmi']:.1f} ± {100 * f['pmi_stderr']:.1f} %", f"{100 * f['sums']:.1f} %"]
        lines.append((*cells, *[""] * (len(COLUMNS) - len(cells))))
    lines.append(("chance", "", "", "25.0 %", "25.0 %", "25.0 %", ""))
    lines.append(("rule, no model", "", "", f"{100 * rule['rule']:.1f} %", "", "", ""))
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    return ["  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))) for line in lines]  # fmt: skip


def verdicts(results: dict[str, dict[str, float]]) -> dict[str, bool]:
    """Claim that the quickstart is to demonstrate -> whether it holds."""
    base, annealed, aligned = results["base"], results["annealed"], results["aligned"]
    ratio = results["aligned, int8"]["perplexity"] / aligned["perplexity"] - 1
    above = (aligned["pmi"] - 0.25) / aligned["pmi_stderr"]
    return {
        f"held-out perplexity falls from base to annealed ({base['perplexity']:.1f} to {annealed['perplexity']:.1f})": annealed["perplexity"] < base["perplexity"],
        f"int8 is within 1 % of its source ({100 * ratio:+.2f} % perplexity)": abs(ratio) < 0.01,
        f"the aligned model chooses better than chance ({above:.1f} standard errors)": above > 2,
        f"sums are learnt ({100 * annealed['sums']:.0f} % before, {100 * aligned['sums']:.0f} % after)": aligned["sums"] > 0.8,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("summary", type=Path)
    parser.add_argument("scores", type=Path, nargs="+")
    parser.add_argument("--json", action="store_true", help="print the scores as JSON instead")
    options = parser.parse_args()
    results = rows(options.scores)
    rule = json.loads(options.summary.read_text())["tasks"][CHOICE]
    if options.json:
        print(json.dumps({"models": results, "rule": rule, "verdicts": verdicts(results)}, indent=1))
        return
    print("\n".join(table(results, rule)))
    items, sums = (int(results["aligned"][key]) for key in ("items", "sums_items"))
    print(f"""
perplexity and bits/byte  on documents of held-out modules. Fine-tuning and alignment teach another kind of text, so
                          compare base with annealed, and quantised models with their source.
choice                    which of four first sentences of docstrings belongs to this function? {items} questions on
                          held-out modules; the four have nearly the same length. By the sum of log-probabilities, per character,
                          and by PMI: how much more probable the question makes the sentence. Chance is 25 %.
rule, no model            takes the sentence with most words in common with the function's name. It beats every model
                          here: the score shows that something about names and sentences was learnt from a megabyte of text,
                          not that the model understands code.
sums right                share of {sums} held-out sums of two-digit numbers whose answer ends in the right number.
""")
    for claim, holds in verdicts(results).items():
        print(f"[{'yes' if holds else 'NO '}] {claim}")


if __name__ == "__main__":
    main()
