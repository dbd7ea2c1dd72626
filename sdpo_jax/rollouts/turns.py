"""The token ids between two turns of a model in a conversation, as the chat template writes them.

The ids of a conversation are those of its first prompt, followed by the sampled ids of each turn
and the ids between turns; sampled ids are never tokenized again. The ids between turns (end of
line, the user's header, the environment's text, the assistant's header) are derived from the
template: a conversation with a placeholder in place of the model's turns is rendered twice, with
and without the last observation. The ids that follow the placeholder's stop id are the new ones.

This equals rendering the whole conversation only if the template does not change earlier messages
when the conversation continues. This is checked for every conversation. For example, a template
that moves the system message to the last question is refused. Two things stay in the ids although
some templates drop them from earlier turns: the model's thoughts, and an empty thought that the
template writes before an answer (Qwen 3 with thinking off). The model was conditioned on them when
it sampled, so its log-probs must be, too.
"""

from collections.abc import Mapping, Sequence

from sdpo_jax.errors import UserError
from sdpo_jax.tokens import Tokenizer

PLACEHOLDER = "Yes"
"""Text that stands for a turn of the model; templates do not change it."""

Messages = Sequence[Mapping[str, str]]


def ids_between(tokenizer: Tokenizer, messages: Messages, observations: Sequence[str]) -> list[int]:
    """The ids after the stop id of a turn and before the model's next turn.

    Args:
      tokenizer: renders chats; control tokens that an observation spells stay text.
      messages: the messages of the first prompt.
      observations: the environment's text after each turn so far, at least one.

    Raises:
      UserError: the template changes earlier messages when a conversation continues, or does not
        end an assistant's turn with a stop id.
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
