"""The SDPO loss in a flax NNX loop, from hidden states: the logits of all tokens never exist.

pip install sdpo-jax flax && python loss_in_flax_nnx_loop.py       # a few seconds
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from sdpo_jax import ema_update, sdpo_from_hidden

QUESTIONS, WORDS, WIDTH, NO_FEEDBACK = 64, 16, 32, 16
ANSWERS = jax.random.randint(jax.random.key(0), (QUESTIONS,), 0, WORDS)


class Model(nnx.Module):
    """Answers a question with one word. It reads feedback that names a word; it knows no answer."""

    def __init__(self, rngs: nnx.Rngs):
        orthogonal = nnx.initializers.orthogonal()
        self.head = nnx.Linear(WIDTH, WORDS, use_bias=False, kernel_init=orthogonal, rngs=rngs)
        self.question = nnx.Embed(QUESTIONS, WIDTH, rngs=rngs)
        named = 4.0 * self.head.kernel[...].T  # feedback that names a word makes that word likely
        self.feedback = nnx.Param(jnp.pad(named, ((0, 1), (0, 0))))

    def hidden(self, question, feedback):
        """Last hidden states `[B, T, D]` after the prompt, here with T = 1."""
        return (self.question(question) + self.feedback[...][feedback])[:, None]


@nnx.jit
def train_step(model, teacher, optimizer, key):
    """Samples, asks for feedback, distills it, and moves the teacher."""
    question, nothing = jnp.arange(QUESTIONS), jnp.full(QUESTIONS, NO_FEEDBACK)
    words = jax.random.categorical(key, model.head(model.hidden(question, nothing)))  # [B, T]
    mask = words != ANSWERS[:, None]  # [B, T]: response tokens that have a teacher
    feedback = jnp.where(mask[:, 0], ANSWERS, NO_FEEDBACK)

    def loss_of(model):
        student = model.hidden(question, nothing), model.head.kernel[...]
        # The same network after the prompt with feedback. The loss stops its gradient.
        again = teacher.hidden(question, feedback), teacher.head.kernel[...]
        loss, _metrics = sdpo_from_hidden(*student, *again, words, mask, alpha=0.5, chunk=16)
        return loss.mean()

    loss, gradient = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, gradient)
    nnx.update(teacher, ema_update(nnx.state(teacher), nnx.state(model), 0.05))
    return loss, 1.0 - mask.mean()


model, teacher = Model(nnx.Rngs(0)), Model(nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.adam(0.003), wrt=nnx.Param)
for step in range(101):
    loss, correct = train_step(model, teacher, optimizer, jax.random.key(step))
    if step % 20 == 0:
        print(f"step {step:3}  loss {loss:.4f}  correct {correct:.0%}")
