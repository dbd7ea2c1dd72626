"""Controls: contexts that say nothing about the question.

If a control gains what the method gains, the gain is style and not information: OP2SD (arXiv
2608.09228) reports that on mathematics another problem's solution does about as well.
"""

import hashlib
from collections.abc import Sequence

from sdpo_jax.teacher.context import TeacherContext


def shuffled(
    contexts: Sequence[TeacherContext | None], prompts: Sequence[str], *, seed: int
) -> list[TeacherContext | None]:
    """Each rollout's context replaced by that of the same-numbered rollout of another question.

    Args:
        contexts: [N], rollout `i` belongs to prompt `i // (N / P)`.
        prompts: [P], ids; two places with the same id are the same question.
        seed: of the choice, which is the same for all rollouts of a prompt.

    Returns:
        [N]; None where the other rollout has none, and where there is no other question.
    """
    group = len(contexts) // max(1, len(prompts))
    out: list[TeacherContext | None] = []
    for place, own in enumerate(prompts):
        others = [p for p, name in enumerate(prompts) if name != own]
        if not others:
            out += [None] * group
            continue
        digest = hashlib.blake2b(f"{seed}:{place}".encode(), digest_size=8).digest()
        start = others[int.from_bytes(digest, "big") % len(others)] * group
        out += contexts[start : start + group]
    return out
