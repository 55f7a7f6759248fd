"""Mathematics: keep documents that contain formulas in LaTeX, MathML or Unicode.

    llmkit filter docs.jsonl --filter maths --rule maths.min_per_1000_words=5

Counts mathematical LaTeX commands (\\frac, \\alpha, \\begin{align}, ...), formulas between delimiters ($...$
with something mathematical in it, $$, \\(, \\[), traces of MathML, MathJax, KaTeX and the like, and Unicode's
mathematical symbols and letters (∑, ≤, 𝑥; not +, <, = and arrows). Reasons, in order: `too_few_formulas` (the
sum of these) and `too_few_per_1000_words` (words of --words, not counting marks).

The signs are those of OpenWebMath's prefilter (Paster et al. 2023, arXiv:2310.06786, section 3.1), which looks
at HTML and keeps a page with any of them. Its second step, MathScore (a fastText model of how mathematical a
text is), is not included, so texts about mathematics without formulas are dropped; such a model can be applied
afterwards with the filter `quality`. The thresholds are ours: two signs are unlikely to be an accident, and ten
per thousand words mark a text with formulas.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llmkit.corpus.filters import FILTERS, Check, below
from llmkit.corpus.kernels.characters import MARK
from llmkit.corpus.page import Page

COMMANDS = """
frac dfrac tfrac sqrt sum prod int oint iint lim infty partial nabla forall exists neg in notin subset subseteq
supset cup cap emptyset setminus alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa
lambda mu nu xi pi rho sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi
Omega leq le geq ge neq ne approx equiv sim simeq cong propto ll gg times cdot cdots ldots dots div pm mp ast
circ oplus otimes wedge vee to mapsto rightarrow Rightarrow leftarrow leftrightarrow iff implies hat bar tilde
vec dot ddot overline underline overbrace underbrace mathbb mathbf mathcal mathrm mathfrak mathit boldsymbol
operatorname text left right big langle rangle lfloor rfloor lceil rceil mid nmid binom tbinom dbinom sin cos
tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp det dim ker deg gcd max min sup inf arg mod bmod
pmod prime dagger ell hbar Re Im quad qquad eqref tag nonumber displaystyle limits ce
""".split()
ENVIRONMENTS = """
equation align alignat gather multline eqnarray matrix pmatrix bmatrix vmatrix cases array split aligned gathered math
displaymath
"""
LATEX = re.compile(
    rf"\\(?:(?:{'|'.join(COMMANDS)})(?![a-zA-Z])|begin\{{(?:{'|'.join(ENVIRONMENTS.split())})\*?\}}|[(\[])"
)
# $...$ on one line: no space inside the dollars, a mathematical sign between them, no digit after: "$5 and $10"
# is money.
DOLLARS = re.compile(r"\$\$|(?<![\\\w$])\$(?=[^\s$])(?=[^$\n]*[\\^_=])[^$\n]{0,500}(?<=\S)\$(?![\w$])")
TRACES = ("<math", "mathjax", "katex", "math-container", "latex.php", "codecogs", "tex.cgi", "mathml")
SYMBOLS = re.compile("[±×÷ϑϕϵ′″⁰-₎ℂℍℕℙℚℝℤ℘ℓℏℑℜℵ∀-⋿⟀-⟯⦀-⫿\U0001d400-\U0001d7ff]")


@FILTERS.register("maths")
@dataclass(frozen=True, slots=True)
class Maths:
    """A document exactly at a limit is kept."""

    min_formulas: int | None = 2
    min_per_1000_words: float | None = 10.0

    def __call__(self, page: Page) -> Iterator[Check]:
        text = page.text
        latex = _count(LATEX, text) if "\\" in text else 0
        dollars = _count(DOLLARS, text) if "$" in text else 0
        symbols = 0 if text.isascii() else _count(SYMBOLS, text)
        lowered = text.lower()
        total = latex + dollars + symbols + sum(map(lowered.count, TRACES))
        yield Check("too_few_formulas", total, below(total, self.min_formulas), "formulas")
        words = int(np.count_nonzero(page.tokens.flags & MARK == 0))
        share = 1000 * total / max(1, words)
        yield Check("too_few_per_1000_words", share, below(share, self.min_per_1000_words), "formulas_per_1000_words")


def _count(pattern: re.Pattern[str], text: str) -> int:
    return len(pattern.findall(text))
