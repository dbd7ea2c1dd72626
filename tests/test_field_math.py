"""Answers from bug reports of graders of mathematics, each judged by its right value."""

import re
from importlib import util

import pytest

from sdpo_jax.environments.kinds.math import Math, Problem
from sdpo_jax.environments.math_equality import equal

pytestmark = pytest.mark.skipif(
    util.find_spec("math_verify") is None, reason="needs pip install math-verify"
)

REPORTS = [
    ("math-bang-gold", r"10,\!080", r"\boxed{10080}", True),
    ("math-bang-3", "3", r"\boxed{3\!}", True),
    ("math-bang-time", r"7\!:\!30", r"\boxed{7:30}", True),
    ("math-space-frac", "11/2", r"\boxed{1 1/2}", False),
    ("math-space-mixed-ok", "1.5", r"\boxed{1 1/2}", True),
    ("math-tiny-sci", r"1.38 \times 10^{-23}", r"\boxed{6.63 \times 10^{-34}}", False),
    ("math-tiny-fact", r"\frac{1}{20!}", r"\boxed{\frac{1}{19!}}", False),
    ("math-near-one", "1-2^{-60}", r"\boxed{1-2^{-61}}", False),
    ("math-round6", "0.0000012", r"\boxed{0.0000008}", False),
    ("math-text-pm", r"7\text{ PM}", r"\boxed{7\text{ AM}}", False),
    ("math-text-increase", r"20\%\text{ increase}", r"\boxed{20\%\text{ decrease}}", False),
    (
        "math-text-dir",
        r"30^\circ \text{ north of east}",
        r"\boxed{30^\circ \text{ south of west}}",
        False,
    ),
    ("math-unit-km", r"3\text{ km}", r"\boxed{3\text{ m}}", False),
    ("math-base-wrong", "413_5", r"\boxed{413_7}", False),
    ("math-no-on", "No", r"\boxed{On}", False),
    ("math-angle", r"\angle ABC", r"\boxed{\angle CAB}", False),
    ("math-ldots", r"1, 2, \ldots, n", r"\boxed{1, 3, \ldots, 2n-1}", False),
    ("math-thin", "12345", r"\boxed{12\,345}", True),
    ("math-varnothing", r"\emptyset", r"\boxed{\varnothing}", True),
    ("math-degree-sign", "45", r"\boxed{45°}", True),
    ("math-binom", r"\binom{10}{3}", r"\boxed{120}", True),
    ("math-boxed-nobrace", "2", r"so it is $\boxed 2$.", True),
    ("math-think-open", "5", r"<think> perhaps \boxed{5}, or 7, let me check", False),
    ("math-ok-letter", r"\text{(B)}", r"\boxed{B}", True),
    ("math-ok-paren", "(B)", r"\boxed{\text{(B)}}", True),
    ("math-ok-text13", r"\text{13}", r"\boxed{13}", True),
    ("math-ok-004", "4", r"\boxed{004}", True),
    ("math-ok-n=", "n=2, 3, 4", r"\boxed{n=1, 2, 3}", False),
    ("math-ok-tuple", "D = (0, 1)", r"\boxed{D = (0, 1.5)}", False),
    ("math-ok-e", r"1 - \frac{1}{\mathrm{e}}", r"\boxed{1 + \frac{1}{\mathrm{e}}}", False),
    ("math-ok-pm", r"\pm 2021", r"\boxed{2021}", False),
    ("math-ok-time", "12:00", r"\boxed{1:00}", False),
    ("math-ok-line", "2x+4y-3=0", r"\boxed{y = -1/2*x + 3/4}", True),
    ("math-ok-line2", "3x-y+13=0", r"\boxed{3x+4y+14=0}", False),
    ("math-ok-sqrt", "4", r"\boxed{4\sqrt(2)}", False),
    ("math-ok-2004", r"\frac{1}{2004!}", r"\boxed{\frac{1}{2006!}}", False),
    ("math-ok-unicode-minus", "-3", "\\boxed{\N{MINUS SIGN}3}", True),
    (
        "math-ok-matrix",
        r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
        r"\boxed{\begin{bmatrix}1&2\\3&4\end{bmatrix}}",
        True,
    ),
    (
        "math-ok-tower",
        "7",
        r"\boxed{\dfrac{5^{\left(5^{\left(5^{\left(5^5\right)}\right)} - 4\right)} - 5}{16}}",
        False,
    ),
    (
        "math-ok-log",
        "7",
        r"\boxed{\log_{2^5}(\log_{2^4}(\log_{2^3}(\log_{2^2}(\log_{2^1}x))))}",
        False,
    ),
    ("math-ok-many", "2", r"\boxed{\{2, 3, 4, 5\}}", False),
    ("math-ok-thousand", "12345", r"\boxed{12{,}345}", True),
    ("math-ok-percent", r"50\%", r"\boxed{0.5}", True),
    ("math-ok-empty-last", "5", r"\boxed{5} and so \boxed{}", False),
    ("math-ok-open-last", "5", r"\boxed{7} and so \boxed{5", False),
    ("math-gold-hang", r"(\sqrt{2}+\sqrt{3}+\sqrt{5})^{1000}", r"\boxed{5}", False),
]

EQUAL = r"""
10,\!080 | 10080
10{,}080 | 10,080
12\,345 | 12345
12~345 | 12345
12\ 345 | 12 345
1,234,567 | 1234567
(1,234) | (1, 234)
1,234 | 1, 234
7\!:\!30 | 7:30
3\! | 3
\$16,\!386.20 | 16386.20
(n+1)! | (n+1)\cdot n!
\frac{n!}{k!(n-k)!} | \binom{n}{k}
\binom{n}{2} | \frac{n(n-1)}{2}
\frac{1}{20!} | \frac{1}{2432902008176640000}
0.0000012 | 1.2\times10^{-6}
0.0000012 | 1.2e-6
1e-05 | 0.00001
1e+16 | 10000000000000000
3e8 | 3\times10^8
3e8 | 300000000
2e-1 | 2e - 1
1 1/2 | 1.5
1 2 / 3 | 5/3
1\frac12 | \frac32
-1 1/2 | -1.5
2\frac{3}{4} | 11/4
0.\overline{3} | \frac13
0.1\overline{6} | 1/6
0.\overline{142857} | \frac{1}{7}
0.9\overline{9} | 1
45^\circ | 45°
45^{\circ} | 45
90 degrees | 90
\varnothing | \emptyset
\{\} | ∅
1 \pm \sqrt{19} | 1+\sqrt{19}, 1-\sqrt{19}
\{1\pm\sqrt{5},-2\} | -2, 1-\sqrt5, 1+\sqrt5
x = \pm 2 | 2, -2
[-1, -\frac{1}{2}) \cup (0, 1) \cup (1, \infty) | [-1,-\tfrac12)\cup(0,1)\cup(1,\infty)
(1,2) \cup (3,4) | (3,4) \cup (1,2)
x \in [0,7) | [0,7)
-1<x<2 | (-1,2)
x \geq 5 | [5,\infty)
5 \leq x | x >= 5
x < 1 | -x > -1
x<3 | x \lt 3
x=3 | 3
(x,y) = (1,2) | (1,2)
2x+4y-3=0 | y=-\frac12x+\frac34
34x+45y-20z+100=0 | -34x-45y+20z-100=0
x^2/4+y^2/3=1 | x^2/16+y^2/12=1/4
f(x)=2x | 2x
f(x)=x^2+1 | f(x) = 1+x^2
\tan^2(y)+1 | \sec^2(y)
2 \sin b \cos a | \sin(a+b)-\sin(a-b)
\frac{\pi r}{h+r} | \frac{r\pi}{r+h}
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} | \begin{bmatrix}1&2\\3&4\end{bmatrix}
\begin{pmatrix}1/3\\ 1/5\end{pmatrix} | \begin{pmatrix}\frac13 \\ 0.2 \end{pmatrix}
50\% | 0.5
28\% | 28 percent
28\% | 28\text{ percent}
15\mbox{ cm}^2 | 15\text{ cm}^2
15\mbox{ cm}^2 | 15 cm^2
3\text{ km} | 3 km
3\text{ km} | 3 kilometers
3km | 3\text{ km}
3\text{ m} | 3 m
7\text{ PM} | 7 p.m.
7\text{ PM} | 7\text{ pm}
20\% \text{ increase} | 20\% increase
1,2,\ldots,n | 1, 2, \dots, n
\text{Yes} | yes
No | \text{no}
12\text{ and }13 | 12, 13
2 \text{ or } 3 | 3 or 2
xy+1 | yx+1
2xy | 2yx
x y | xy
e^{2} | \mathrm{e}^2
\log_2 8 | 3
\sqrt 2+\sqrt 5 | \sqrt{2}+\sqrt{5}
\frac94\pi | \frac{9}{4}\pi
2+2=4 | 4
413_5 | 413_{5}
(1+\sqrt2)^{100} | (3+2\sqrt{2})^{50}
(a+b+c+d+f)^{20} | (b+a+c+d+f)^{20}
|x| | \sqrt{x^2}
\infty | ∞
(-\infty, 3) | (-∞,3)
10^{10} | 10000000000
\left(\frac12, 3\right) | (0.5,3)
\text{(C)} | C
1/2 | 0.50
\frac{28}{100} | 0.28
C | \text{C}
180-x | 180-x^\circ
\sqrt{-4} | \sqrt{-4}
3+4i | 4i+3
\frac{1+i}{2} | \frac12+\frac{i}{2}
\cos(1)^{9999} | \cos(1)^{9999}+0
0.4 | .4
\pm 2021 | {-2021, 2021}
p = -1 \text{ and } p = \dfrac{15}{8} | p=-1,p=\frac{15}{8}
-2 \le x \le 7 | x \in [-2,7]
\\left(\\frac{1}{5},\\frac{1}{6}\\right) | \left( \frac{1}{5}, \frac{1}{6} \right)
x=1 \text{ or } x=2 | 1, 2
{5} | 5
"""

DIFFERENT = r"""
11/2 | 1 1/2
12 | 1 2
1.38 \times 10^{-23} | 6.63 \times 10^{-34}
2^{-64} | 2^{-63}
1-2^{-60} | 1-2^{-61}
\sqrt2+2^{-300} | \sqrt2+2^{-301}
e^{-50} | e^{-60}
x+10^{-20} | x+10^{-21}
(1, 10^{-20}) | (1, 10^{-21})
0.0000012 | 0.0000008
0.333333 | \frac13
-3 | 3
7\text{ PM} | 7\text{ AM}
7 PM | 7 AM
20\% increase | 20\% decrease
30^\circ north-east | 30^\circ south-west
3\text{ km} | 3\text{ m}
3\text{ odd} | 3\text{ even}
413_5 | 413_7
413_5 | 413
413_{10} | 413_5
(413)_5 | (413)_7
No | On
\angle ABC | \angle CAB
\triangle ABC | \triangle ABD
1, 2, \ldots, n | 1, 3, \ldots, 2n-1
1,2,3,... | 1,2,4,...
3 | 4=3
3 | 3\%
3 | 5 \to 3
3 | 2x=3
9 | x^2=9
0 | x+y=0
x+y=0 | 0
18 | 18 million
18 | 18 dozen
18 | not 18
18 | less than 18
1 | 2x+z=1
7 | 18/7
x=3 | y=3
(1,2) | (2,1)
(1,2) | [1,2]
[0,1) | (0,1)
\{1,2\} | (1,2)
2,2 | 2
A_1 | a_1
f'(x) | f(x)
x' | x
\overline{AB} | \overline{ab}
x > 5 | x < 5
x \geq 5 | x > 5
\neq 3 | 3
x \neq 3 | x=3
x^2+1=0 | x^2+2=0
\sqrt{x^2} | x
1000 | 1,00,0
\sin 30^\circ | \sin 30
5 | \cos(1)^{9999}
5 | (a+b+c+d+f)^{20}
(\sqrt{2}+\sqrt{3}+\sqrt{5})^{1000} | 5
\frac{1}{0} | \frac{2}{0}
1000000 | 1 000 00
100 | 10^{2}0
3 | 3?
5 | 5 \pmod{7}
5 | -5
\frac{1}{2004!} | \frac{1}{2006!}
1.5 | 1,5
2:3 | 3:2
20!+1 | 20!
\pi | 3.14159265358979323846
(1,2,3) | (1,2)
3 hours 20 minutes | 20 hours 3 minutes
x \in (1,2) | x \in (1,3)
1<x<2 | 1<y<2
1<x<2 | 1 \leq x<2
\text{Monday} | \text{Tuesday}
2\sqrt2 | 2 \sqrt{3}
12 \text{ or } 13 | 12
2+2=4 | 1+1=2
x \in (1,2) | 1 \leq x < 2
x > 3 \text{ or } x < 1 | x > 3 \text{ and } x<1
1<2 | 3<4
"""


def pairs(table):
    return [tuple(line.split(" | ")) for line in table.strip().splitlines()]


def grade(answer, response, **settings):
    made = Math([Problem("p", "How many?", answer)], [], **settings)
    return made.grade(made.train[0], response)


@pytest.mark.parametrize(("answer", "response", "right"), [row[1:] for row in REPORTS])
def test_reported_answers_get_the_right_verdict(answer, response, right):
    outcome = grade(answer, response)
    assert (outcome.passed, outcome.graded) == (right, True)


@pytest.mark.parametrize(("one", "other"), pairs(EQUAL))
def test_equal_answers_are_equal_in_both_orders(one, other):
    assert equal(one, other) and equal(other, one)


@pytest.mark.parametrize(("one", "other"), pairs(DIFFERENT))
def test_different_answers_differ_in_both_orders(one, other):
    assert not equal(one, other) and not equal(other, one)


@pytest.mark.parametrize(("one", "other"), pairs(EQUAL) + pairs(DIFFERENT))
def test_spacing_commands_between_the_parts_change_no_verdict(one, other):
    wide = re.sub(r"(?<!e)\+", r"\\, + \\;", one).replace(", ", r",\ \quad ").replace("=", "~=\\! ")
    assert equal(wide, other) == equal(one, other) == equal(f" {one}\t", other)


@pytest.mark.parametrize(
    ("answer", "given", "strict", "lenient"),
    [
        ("3", r"3\text{ km}", True, True),  # The answer says more than the truth.
        (r"3\text{ km}", "3", False, True),
        (r"3\text{ km}", "3 m", False, False),
        (r"7\text{ PM}", "7", False, False),
        ("7", r"7\text{ million}", False, False),
    ],
)
def test_a_missing_unit_is_forgiven_only_if_the_recipe_says_so(answer, given, strict, lenient):
    assert equal(given, answer) == strict
    assert equal(given, answer, missing_units=True) == lenient


def test_a_tolerance_is_relative_and_only_as_the_recipe_says():
    assert not grade("3.14159", r"\boxed{3.14}").passed
    assert grade("3.14159", r"\boxed{3.14}", relative_tolerance=1e-3).passed
    assert not grade("3.14159e-9", r"\boxed{3.2e-9}", relative_tolerance=1e-3).passed
    assert not grade("x", r"\boxed{y}", relative_tolerance=1e-3).passed
