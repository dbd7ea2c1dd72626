"""The SDPO loss in a training loop of your own: any model that gives logits, and optax.

    pip install sdpo-jax optax && python loss_in_optax_loop.py       # a few seconds

The toy model answers a question with one word. It reads feedback but knows no answer. For your own
model replace `logits` and `feedback_on`; responses of T tokens have logits of shape [B, T, V].
"""

import jax
import jax.numpy as jnp
import optax

from sdpo_jax import ema_update, sdpo_loss

QUESTIONS, WORDS, NO_FEEDBACK = 64, 16, 16
ANSWERS = jax.random.randint(jax.random.key(0), (QUESTIONS,), 0, WORDS)
optimizer = optax.adam(0.03)


def logits(params, question, feedback):
    """Next-token logits `[B, T, V]` after the prompt, here with T = 1."""
    return (params["question"][question] + params["feedback"][feedback])[:, None]


def feedback_on(question, word):
    """The environment: it names the right word unless the answer is right."""
    return jnp.where(word == ANSWERS[question], NO_FEEDBACK, ANSWERS[question])


@jax.jit
def train_step(params, teacher_params, moments, key):
    """Samples, asks for feedback, distills it, and moves the teacher."""
    question = jnp.arange(QUESTIONS)
    word = jax.random.categorical(key, logits(params, question, NO_FEEDBACK)[:, 0])
    feedback = feedback_on(question, word)
    mask = (feedback != NO_FEEDBACK)[:, None]  # [B, T]: response tokens that have a teacher

    def loss_of(params):
        student = logits(params, question, NO_FEEDBACK)
        # The same network after the prompt with feedback. `sdpo_loss` stops its gradient.
        teacher = logits(teacher_params, question, feedback)
        return sdpo_loss(student, teacher, mask, alpha=0.5).mean()

    loss, gradient = jax.value_and_grad(loss_of)(params)
    updates, moments = optimizer.update(gradient, moments, params)
    params = optax.apply_updates(params, updates)
    return params, ema_update(teacher_params, params, 0.05), moments, loss, 1.0 - mask.mean()


reads = 4.0 * jnp.eye(WORDS + 1, WORDS)  # feedback that names a word makes that word likely
params = {"question": jnp.zeros((QUESTIONS, WORDS)), "feedback": reads}
teacher, moments = params, optimizer.init(params)
for step in range(101):
    key = jax.random.fold_in(jax.random.key(1), step)
    params, teacher, moments, loss, correct = train_step(params, teacher, moments, key)
    if step % 20 == 0:
        print(f"step {step:3}  loss {loss:.4f}  correct {correct:.0%}")
