"""The ids between two turns of a model, as its chat template writes them.

A conversation is the ids of its first prompt, then turn after turn what was sampled and what stands
between; nothing that was sampled is ever tokenised again. What stands between (the end of line
after a turn, the user's header, the environment's text, the assistant's header) is read off the
template: a conversation with a placeholder in place of the model's turns is rendered whole, once
with its last question and once without, and all that follows the placeholder's stop id is new.

That is the whole conversation's rendering only if the template leaves the beginning of a
conversation alone when it goes on. This is checked for every conversation; a template that moves
the system message to the last question is refused, for one. Two things are kept that some templates
leave out of earlier turns: what the model thought, and an empty thought that the template itself
writes before an answer (Qwen 3 with thinking off). The model went on from them, and log-probs are
of what it saw.
"""

from collections.abc import Mapping, Sequence

from sdpo_jax.errors import UserError
from sdpo_jax.tokens import Tokenizer

PLACEHOLDER = "Yes"
"""A turn of the model, one word that no template changes."""

Messages = Sequence[Mapping[str, str]]


def ids_between(tokenizer: Tokenizer, messages: Messages, observations: Sequence[str]) -> list[int]:
    """What follows the stop id of a turn, up to the model's next turn.

    Args:
      tokenizer: control tokens that an observation spells stay text.
      messages: of the first prompt.
      observations: what the environment answered to each turn so far, at least one.

    Raises:
      UserError: the template changes the beginning of a conversation that goes on, or does not end
        an assistant's turn with a stop id.
    """
    before = tokenizer.render(_conversation(messages, observations[:-1]))
    whole = tokenizer.render(_conversation(messages, observations))
    pairs = zip(before, whole, strict=False)
    start = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(before), len(whole)))
    stops = set(tokenizer.stop_ids)
    end = next((i for i in range(start, len(whole)) if whole[i] in stops), None)
    if end is None or tokenizer.decode(whole[start:end]).strip() != PLACEHOLDER:
        raise UserError(
            "rollout.max_turns above 1 needs a chat template that leaves the beginning of a "
            "conversation as it is when it goes on, and ends an assistant's turn with a stop id; "
            f"after {len(messages)} messages and turn {len(observations)}, this one does not: "
            f"expected {PLACEHOLDER!r} and a stop id of {sorted(stops)}, got "
            f"{tokenizer.decode(whole[start:end])[:200]!r}. Set rollout.max_turns = 1, or change "
            "the template (chat_template.jinja or tokenizer_config.json in the model's folder)"
        )
    return whole[end + 1 :]


def _conversation(messages: Messages, observations: Sequence[str]) -> list[Mapping[str, str]]:
    chat = list(messages)
    for text in observations:
        chat.append({"role": "assistant", "content": PLACEHOLDER})
        chat.append({"role": "user", "content": text})
    return chat
