"""The losses a second time: numpy, naive exponentials and logarithms, straight from the formulas.

Nothing is shared with `sdpo_jax`. Everything is analytic in the student and takes complex numbers,
so that `gradient` is exact: f(x + ih) = f(x) + ih f'(x) + O(h^2), and no difference is ever taken.
What is detached (teacher, weights, choices, comparisons) reads real parts alone.

Equations: S = log π, T = log q; numbers of arXiv 2601.20802 and the code released with it.
"""

import numpy as np

H = 1e-30
MAX_LOG_RATIO = 20.0
MAX_LOG_MASS = -1e-7


def gradient(function, x):
    """The gradient of a real scalar function by the complex step, one entry at a time."""
    out = np.empty(np.shape(x))
    for index in np.ndindex(out.shape):
        moved = np.array(x, complex)
        moved[index] += 1j * H
        out[index] = function(moved).imag / H
    return out


def log_softmax(logits):
    return logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))


def pick(x, targets):
    return np.take_along_axis(x, np.asarray(targets)[..., None], axis=-1)[..., 0]


# Divergences over [..., V] -> [...]


def kl(p, q):
    return np.sum(np.exp(p) * (p - q), axis=-1)


def divergence(student, teacher, alpha):
    teacher = teacher.real
    if alpha == 0.0:
        return kl(teacher, student)
    if alpha == 1.0:
        return kl(student, teacher)
    mixture = np.log((1 - alpha) * np.exp(student) + alpha * np.exp(teacher))
    return (1 - alpha) * kl(student, mixture) + alpha * kl(teacher, mixture)


def entropy(log_probs):
    return -np.sum(np.exp(log_probs) * log_probs, axis=-1)


# Supports


def top_ids(logits, k):
    """Ids of the k largest, of equal ones the smaller: a stable sort of the negatives."""
    return np.argsort(-logits.real, axis=-1, kind="stable")[..., :k]


def on_support(logits, ids, add_tail):
    """Log-probabilities with the normaliser of the whole vocabulary, on `ids` (and the rest)."""
    log_probs = np.take_along_axis(log_softmax(logits), ids, axis=-1)
    mass = np.log(np.sum(np.exp(log_probs), axis=-1, keepdims=True))
    if not add_tail:
        return log_probs - mass
    mass = np.where(mass.real <= MAX_LOG_MASS, mass, MAX_LOG_MASS)
    return np.concatenate([log_probs, np.log(1 - np.exp(mass))], axis=-1)


# Losses per token


def distillation(student, teacher, alpha, k=None, add_tail=True, ids=None):
    """D_α from logits: full vocabulary, the student's top k, or the support `ids`."""
    if k is None and ids is None:
        return divergence(log_softmax(student), log_softmax(teacher), alpha)
    ids = top_ids(student, k) if ids is None else ids
    return divergence(*(on_support(x, ids, add_tail) for x in (student, teacher)), alpha)


def sampled_token(student, teacher, targets):
    log_prob, other = (pick(log_softmax(x), targets) for x in (student, teacher))
    return np.real(log_prob - other) * log_prob


def cross_entropy(logits, targets, smoothing=0.0):
    log_probs = log_softmax(logits)
    return -(1 - smoothing) * pick(log_probs, targets) - smoothing * np.mean(log_probs, axis=-1)


def ratio(log_probs, old):
    gap = log_probs - old
    return np.exp(np.where(np.abs(gap.real) <= MAX_LOG_RATIO, gap, np.sign(gap.real) * 20.0))


def importance(log_probs, old, cap):
    return np.minimum(ratio(log_probs, old).real, cap)


def surrogate(log_probs, old, advantages, low=0.2, high=0.28, dual=3.0):
    """PPO's max of the plain and the clipped term; -A · dual bounds it where A < 0."""
    r = ratio(log_probs, old)
    clipped = np.where(r.real < 1 - low, 1 - low, np.where(r.real > 1 + high, 1 + high, r))
    plain, held = -advantages * r, -advantages * clipped
    loss = np.where(plain.real >= held.real, plain, held)
    bound = -advantages * dual
    return np.where((advantages < 0) & (loss.real > bound), bound, loss)


def k3(log_probs, reference):
    gap = reference - log_probs
    return np.exp(gap) - gap - 1


# Rewards


def group_advantages(rewards, size, scale=False):
    groups = rewards.reshape(-1, size)
    centred = groups - groups.mean(axis=1, keepdims=True)
    return (centred / groups.std(axis=1, ddof=1, keepdims=True) if scale else centred).ravel()


# Reductions of [B, T]


def token_mean(loss, mask):
    return np.sum(mask * loss) / np.sum(mask)


def sequence_mean(loss, mask):
    rows = [np.sum(m * x) / max(np.sum(m), 1) for m, x in zip(mask, loss, strict=True)]
    return np.sum(rows) / len(rows)


def fixed_length_mean(loss, mask, length):
    return np.sum(mask * loss) / (len(mask) * length)
