"""Renders prompts to token ids and refuses those that are too long."""

from sdpo_jax.environments.base import Prompt
from sdpo_jax.errors import UserError
from sdpo_jax.tokens import Tokenizer


def prompt_ids(tokenizer: Tokenizer, prompt: Prompt, max_tokens: int) -> list[int]:
    """Renders a prompt to token ids; prompts are never truncated.

    Raises:
      UserError: the prompt has more than `max_tokens` tokens (`rollout.max_prompt_tokens`).
    """
    ids = tokenizer.render(prompt.messages)
    if len(ids) > max_tokens:
        raise UserError(
            f"prompt {prompt.id!r} has {len(ids)} tokens; expected at most "
            f"rollout.max_prompt_tokens = {max_tokens}. Raise it to at least {len(ids)}."
        )
    return ids
