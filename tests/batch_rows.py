"""Rows of a batch as `sdpo heatmap` writes them, made up: for tests of the page."""

import math

import numpy as np

STOP = 0


def token(text, p, q, others=(), number=5):
    """A sampled token with probabilities of student and teacher; `others` are (text, p, q)."""
    log_q = None if q is None else math.log(q)
    return {
        "id": number,
        "text": text,
        "log_p": math.log(p),
        "log_q": log_q,
        "advantage": None if log_q is None else log_q - math.log(p),
        "alternatives": [
            {
                "id": 100 + i,
                "text": other,
                "log_p": math.log(a),
                "log_q": None if b is None else math.log(b),
            }
            for i, (other, a, b) in enumerate(others)
        ],
    }


def response(number, tokens, *, shown=None, **changes):
    """A row; `shown` is (demonstration, feedback), None without a context."""
    row = {
        "kind": "response",
        "row": number,
        "prompt_id": f"prompt-{number // 2}",
        "prompt": [{"role": "user", "content": f"question {number // 2}?"}],
        "response": "".join(t["text"] for t in tokens),
        "reward": float(number % 2),
        "passed": number % 2 == 1,
        "graded": True,
        "feedback": "" if number % 2 else "what is wrong",
        "shown": shown and {"demonstration": shown[0], "feedback": shown[1]},
        "teacher_prompt": None if shown is None else f"question {number // 2}? {shown}",
        "grpo_advantage": 0.5 if number % 2 else -0.5,
        "tokens": tokens,
    }
    return row | changes


def batch(*responses):
    """All rows, the batch's own first."""
    head = {
        "kind": "batch",
        "run": "runs/example",
        "step": 7,
        "objective": "sdpo",
        "teacher": "ema",
        "temperature": 1.0,
        "stop_ids": [STOP],
    }
    return [head, *responses]


def example():
    """Two prompts, two responses each; the third has no context."""
    shown = ("12:30", None)
    red = token("1230", 0.9, 0.002, [("1230", 0.9, 0.002), ("12:30", 0.05, 0.99)])
    blue = token("noon", 0.1, 0.95, [("noon", 0.1, 0.95), ("night", 0.8, 0.01)])
    plain = token(" at", 0.7, 0.7, [(" at", 0.7, 0.7), ("\n", 0.2, 0.2)])
    alone = token("x", 0.5, None, [("x", 0.5, None), ("y", 0.25, None)])
    end = token("", 0.99, 0.99, number=STOP)
    last = token("", 0.99, None, number=STOP)
    return batch(
        response(0, [plain, red, end], shown=(None, "time: expected HH:MM")),
        response(1, [plain, blue, end], shown=shown),
        response(2, [alone, last]),
        response(3, [plain, plain, end], shown=shown),
    )


def realistic(responses=64, tokens=64, candidates=10, seed=0):
    """A batch with the entropy of real text: no two rows alike, candidates with long tails."""
    random = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(random.choice(letters, size=random.integers(1, 9))) for _ in range(20_000)]
    rows = []
    for number in range(responses):
        out = []
        for _ in range(tokens):
            texts = [f" {words[i]}" for i in random.integers(0, len(words), size=candidates)]
            p, q = random.dirichlet(np.full(candidates, 0.3), size=2) + 1e-6
            out.append(token(texts[0], p[0], q[0], list(zip(texts, p, q, strict=True))))
        sentence = " ".join(words[i] for i in random.integers(0, len(words), size=60))
        rows.append(
            response(
                number, out, shown=(sentence, None), feedback=sentence, teacher_prompt=sentence
            )
        )
    return batch(*rows)
