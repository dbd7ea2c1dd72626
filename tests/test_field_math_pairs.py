"""Further pairs of answers: spellings, units, sets and equations, and what only looks alike."""

from importlib import util

import pytest

from sdpo_jax.environments.math_equality import equal

pytestmark = pytest.mark.skipif(
    util.find_spec("math_verify") is None, reason="needs pip install math-verify"
)

EQUAL = r"""
$5$ | 5
5\text{ cm} | 5\,\mathrm{cm}
5\text{ cm} | 5~cm
60\text{ mph} | 60 mph
3\text{ m/s} | 3 m/s
3\,\text{m}^2 | 3\text{ m}^2
3\text{ m}^2 | 3 m^2
3\text{ square meters} | 3 square meters
\$5 | 5
5\% | 0.05
5\% | 5 \%
12{,}345.67 | 12345.67
-12,345 | -12345
(-1,2] | -1<x\le 2
x\in(-1,2] | -1<x\le2
2\pi | 2 \pi
6.02\times 10^{23} | 6.02 \cdot 10^{23}
6.02e23 | 602000000000000000000000
1.5e-3 | 0.0015
\frac{3}{2} | 1\,\frac{1}{2}
1\frac{1}{2} | 1.5
-1\frac{1}{2} | -\frac32
10:30\text{ a.m.} | 10:30 AM
9:00\text{ PM} | 9:00 p.m.
\text{Tuesday} | Tuesday.
\text{east} | East
f(x) = x^2 | x^2
a = 3, b = 4 | b=4, a=3
(a,b) = (3,4) | (3,4)
y = 2x+1 | 2x - y + 1 = 0
\sqrt{12} | 2\sqrt{3}
\frac{\sqrt{2}}{2} | \frac{1}{\sqrt{2}}
\frac{1}{\sqrt{2}} | \sqrt{\frac12}
\log_{10} 100 | 2
\ln(e^2) | 2
\sin\frac{\pi}{6} | \frac12
3! | 6
(n+2)! | (n+2)(n+1)n!
2^{10} | 1024
2^{n+1} | 2\cdot 2^n
x^2 - y^2 | (x-y)(x+y)
\{1, 2, 3\} | \{3,2,1\}
(1,2), (3,4) | (3,4), (1,2)
\mathbb{R} | \mathbb{R}
\emptyset | \varnothing
\text{no solution} | no solution
\frac{a}{b} | a/b
|x-1| | |1-x|
-\frac{1}{2} | \frac{-1}{2}
i | \mathrm{i}
2i\sqrt{3} | 2\sqrt{3}i
\sqrt{-3} | i\sqrt{3}
e^{i\pi} | -1
90^\circ | 90^{\circ}
20^\circ\text{C} | 20°C
\overline{AB} | \overline{AB}
0.\overline{12} | 4/33
0.\bar{3} | 1/3
0.\dot{3} | 1/3
3.\overline{6} | 11/3
\binom{5}{2} | 10
\dbinom{n}{2} | \frac{n(n-1)}{2}
{10 \choose 3} | {10 \choose 3}
1,000 | 1000
1\,000\,000 | 10^6
1 000 000 | 10^{6}
x=2\text{ or }x=-2 | x=\pm2
\pm\sqrt{2} | \sqrt2, -\sqrt2
A, B, C | C, B, A
\lfloor 2.5 \rfloor | 2
\left\{1,2\right\} | \{2,1\}
\left[0,1\right] | [0,1]
\text{(A)} | (A)
5.0 | 5
.5 | 1/2
007 | 7
x^{2} | x^2
x_{1}+x_2 | x_1+x_{2}
\alpha+\beta | \beta+\alpha
\theta = 30^\circ | 30^\circ
\angle ABC = 30^\circ | 30
AB = 5 | 5
S=\frac{1}{2}ab | \frac{ab}{2}
2 \text{ and } 3 | 3 \text{ and } 2
2, \text{ and } 3 | 2, 3
5. | 5
5\text{ cents} | 5 cents
30\text{ minutes} | 30 min
1/3 | \frac{1}{3}
\frac{x}{2}+\frac{y}{3} | \frac{3x+2y}{6}
\sqrt[3]{8} | 2
x>2 \text{ or } x<-1 | x>2 or x<-1
(-\infty,-1)\cup(2,\infty) | (2,\infty) \cup (-\infty,-1)
3:2 | 3 : 2
\begin{pmatrix}1\\2\end{pmatrix} | \begin{bmatrix} 1 \\ 2 \end{bmatrix}
1{,}234 | 1234
1\,234\,567 | 1234567
\$1,234.50 | 1234.5
(n+2)! | (n+2)(n+1)\cdot n!
\frac12 | 0.5
\dfrac{3}{4} | .75
6.02\times10^{23} | 6.02e23
7\text{ PM} | 7 pm
7\ \mathrm{p.m.} | 7 PM
5\text{ km} | 5 km
1\frac12 | 3/2
0.\overline{142857} | \frac17
90^{\circ} | 90°
\{\} | \emptyset
x=5 | 5
(1,2] | (1, 2]
x\in(1,2] | 1<x\le 2
\{1,2,3\} | \{3,1,2\}
\left(\frac{1}{2},3\right) | (0.5, 3)
\begin{pmatrix}1&2\\3&4\end{pmatrix} | \begin{bmatrix}1&2\\3&4\end{bmatrix}
\sqrt2/2 | \frac{1}{\sqrt2}
x^2+2x+1 | (x+1)^2
y=2x+1 | y = 1+2x
2x+y=3 | y=3-2x
\text{Friday} | friday
\textbf{(B)} | (B)
3\pm\sqrt2 | 3+\sqrt2, 3-\sqrt2
\sin 30^\circ | \sin 30^{\circ}
25\% | 0.25
\frac{\pi}{3} | \pi/3
10^{-3} | 0.001
-(-3) | 3
\tfrac{5}{6} | 5/6
12.50 | 12.5
\mathbf{7} | 7
x>3 | 3<x
(-\infty,3)\cup(5,\infty) | (5,\infty)\cup(-\infty,3)
a\cdot b | ba
5! | 120
\sqrt[3]{27} | 3
1e3 | 1000
\lfloor 3.7\rfloor | 3
3\text{ and }5 | 5, 3
north-east | North-East
(\sqrt{8}-2\sqrt{2})10^{5000} | 0
xy | yx
\ln(ab) | \ln a+\ln b
"""

DIFFERENT = r"""
5\text{ cm} | 5\text{ cm}^2
10:30\text{ a.m.} | 10:30 PM
12\text{ dozen} | 12
2 \text{ km} | 2000 \text{ km}
20^\circ\text{C} | 20^\circ\text{F}
20^\circ\text{C} | 20
30^\circ\text{ N} | 30^\circ\text{ S}
30^\circ N | 30^\circ S
N 30^\circ E | N 30^\circ W
101_2 | 101_3
101_{2} | 101
\text{101}_2 | 101
101_{\text{two}} | 101_{\text{three}}
1A_{16} | A1_{16}
(5)_{6} | 5
12_{7} | 9
ABC | ACB
AB | BA
at | ta
\triangle ABC \sim \triangle DEF | \triangle ABC \sim \triangle DFE
1,3,5,\ldots | 1,2,3,\ldots
1, 2, 4, \cdots, 2^n | 1,2,4,\cdots,2^{n-1}
2\text{ to }3 | 2, 3
2-3 | 2\text{ to }3
3:2 | 3/2
5 \to 3 | 3
5 \mapsto 3 | 3
5 \Rightarrow 3 | 3
3=4 | 4
4=3=3 | 3
x=4=3 | 3
3 \neq 4 | 3
3 > 2 | 2
3\approx 4 | 4
3\% | 300\%
0.3\% | 0.3
3 \permil | 3
3\pm0.1 | 3
3 \pm 1 | 3
7 \mod 3 | 1
1\pmod 3 | 1
1 \pmod 3 | 1 \pmod 5
2^{100} | 2^{100}+1
10^{30} | 10^{30}+1
\frac{1}{10^{30}} | \frac{1}{10^{31}}
0.1 | 0.10000000000000001
\pi | \frac{355}{113}
\sqrt{2} | 1.41421356237309504880
1/3 | 0.3333333333333333333
-\frac{1}{10^{20}} | \frac{1}{10^{20}}
10^{-20} | 0
10^{-500} | 0
\frac{1}{300!} | 0
e^{-1000} | 0
1+10^{-500} | 1
(0, 10^{-17}) | (0,0)
\{10^{-17}\} | \{0\}
x=10^{-17} | x=0
x<10^{-17} | x<0
\begin{pmatrix}10^{-17}\\2\end{pmatrix} | \begin{pmatrix}0\\2\end{pmatrix}
(x+10^{-17})^2 | x^2
1 2/3 | 12/3
1\,2 | 12
1\ 2 | 12
1 2 3 | 123
12 34 | 1234
1 1/2 | 1
12,34 | 1234
12.345 | 12345
1,2 | 1.2
\text{increase by }20\% | \text{decrease by }20\%
\text{odd} | \text{even}
5\text{ more} | 5\text{ less}
\text{not }5 | 5
\text{at least }5 | 5
\text{none of } 5 | 5
\text{half of } 6 | 6
6\text{ squared} | 6
\text{twice }6 | 6
5\text{ or more} | 5
5! | 5
5!! | 5!
f(1)=2 | f(2)=1
f^{-1}(x) | \frac{1}{f(x)}
f(x) | x f
y' | y
x' = 1 | x=1
\bar{x} | x
\vec{v} | v
\hat{x} | x
\mathbf{v} | w
\overline{AB} | AB
\overrightarrow{AB} | \overrightarrow{BA}
A \subset B | B \subset A
A \cup B | A \cap B
A\cap B | AB
A \setminus B | B \setminus A
p \land q | p \lor q
p \implies q | q \implies p
x \in A | x \notin A
\max(1,2) | \min(1,2)
\gcd(4,6) | \operatorname{lcm}(4,6)
\arcsin x | \sin x
\sin^{-1} x | \frac{1}{\sin x}
\sin 90^\circ | \sin 90
\log 10 | \ln 10
\Delta | \delta
\Omega | \omega
X | x
2X | 2x
\mathbb{R} | \mathbb{Q}
R | \mathbb{R}
\infty | -\infty
(0,\infty) | (0,\infty]
(1,2)\cup(3,4) | (1,2)\cap(3,4)
\{(1,2)\} | \{(2,1)\}
(1,2),(3,4) | (1,3),(2,4)
(1,(2,3)) | ((1,2),3)
[1,2],[3,4] | [1,2,3,4]
1,2,2 | 1,1,2
i | 1
3+4i | 3-4i
\sqrt{-1} | 1
\text{Yes, } 5 | \text{No, } 5
5\text{A} | 5\text{B}
B | \text{(A)}
\text{A and B} | \text{A}
x^2+y^2=1 | x^2+y^2=2
x^2 + y^2 \le 1 | x^2+y^2 \ge 1
y=x | y=-x
x \cdot y = 1 | x \cdot y = -1
5 ? | 5
5 # | 5
5\& | 5
\cancel{5} 6 | 56
5^{\text{th}} | 5
\frac{1}{2}\text{ of }3 | \frac12
1.38\times10^{-23} | 6.63\times10^{-34}
odd | even
north-east | north-west
5 km | 5 m
413_5 | 413_6
1,2,\ldots,9 | 1,2,\ldots,10
5\to3 | 3
0.33333333333333333 | \frac13
12 | 1,2
1,2,5 | 5
5, 5 | 5
\{5\}, \{6\} | 5
x=3, x=4 | 3
3 or 4 | 3
x<3 | x\le3
x>3 | x<3
\begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix}1&2\end{pmatrix}
x+1 | x-1
abc | cab
10^{100} | 10^{100}+1
100! | 100!+1
\frac{1}{0} | 7
\frac{0}{0} | 0
nan | 7
\text{yes} | no
7 | 7 odd
increase | 7
2x=6 | 3
3>2 | 3
3\neq 4 | 3
5 \pm 2 | 7
7\,m | 7\,s
\$5 | 5\%
A, B | A
\emptyset | 0
5 to 3 | 3
3:5 | 5:3
2:30 | 2.5
5 \equiv 3 | 3
3 \approx 4 | 4
1.0000000000000000001 | 1
(\sqrt{8}-2\sqrt{2})10^{5000} | 7
\exp(\exp(\exp(9))) | 7
7+\frac{1}{(\sqrt{8}-2\sqrt{2})10^{5000}} | 7
9^9^9^9 | 7
9!! | 7
5!! | 15
\{\emptyset\} | \emptyset
"""


def pairs(table):
    return [tuple(line.split(" | ")) for line in table.strip().splitlines()]


@pytest.mark.parametrize(("one", "other"), pairs(EQUAL))
def test_two_spellings_of_one_answer_are_equal(one, other):
    assert equal(one, other) and equal(other, one)


@pytest.mark.parametrize(("one", "other"), pairs(DIFFERENT))
def test_answers_that_only_look_alike_differ(one, other):
    assert not equal(one, other) and not equal(other, one)
