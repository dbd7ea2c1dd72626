"""SDPO in one file: the whole algorithm on the embedded model, in plain JAX.

    python docs/examples/sdpo_minimal.py [STEPS]      # 20 steps take half a minute on two CPU cores

Self-Distillation Policy Optimization (arXiv 2601.20802) turns feedback in words into a training
signal for every token. The model answers questions; an environment grades each answer and explains
in words what is wrong with it. The same model then reads the question again together with that
feedback, or with a correct answer to the same question, and so becomes its own teacher: at each
token of the answer, the student's next-token distribution moves towards the teacher's.

The paper's symbols:  x question   y response   f feedback or demonstration   θ parameters
    π_θ(· | x, y_<t)     the student: the distribution of the next token after the question
    q(· | x, f, y_<t)    the teacher: the same network, with weights θ' that trail θ, after x and f
    sg                   stop_gradient
Shapes:  P questions   G responses to each   N = P·G   S padded length   T response tokens
    V vocabulary   D width

Only the weights, the tokenizer and the environment come from this project. The engine (`sdpo
train`) computes the same update faster: it packs rows, computes a shared prompt once, and never
holds logits for the whole vocabulary. A test compares the first update of both.
"""

import os
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sdpo_jax.environments.kinds.tool_calls import ToolCalls
from sdpo_models.hugging_face import load_architecture, load_params
from sdpo_models.nano import FOLDER
from sdpo_models.tokenizer import ChatTokenizer
from sdpo_models.transformer import build_model

P, G = 16, 8
MAX_PROMPT, MAX_RESPONSE = 48, 32  # tokens
ALPHA = 0.5  # α, which divergence: 0.5 is the Jensen-Shannon divergence
EMA_RATE = 0.05  # τ, how far the teacher's weights move towards the student's in a step
LEARNING_RATE, WARMUP_STEPS, WEIGHT_DECAY, MAX_GRADIENT_NORM = 3e-4, 5, 0.01, 1.0

model = build_model(load_architecture(FOLDER))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would note that PyTorch is missing
tokenizer = ChatTokenizer.from_pretrained(FOLDER)
rate = optax.linear_schedule(LEARNING_RATE / WARMUP_STEPS, LEARNING_RATE, WARMUP_STEPS - 1)
optimizer = optax.chain(
    optax.clip_by_global_norm(MAX_GRADIENT_NORM), optax.adamw(rate, weight_decay=WEIGHT_DECAY)
)


# 1. The student answers: y ~ π_θ(· | x), G responses to each question.


@jax.jit
def sample(params: Any, prompts: jax.Array, lengths: jax.Array, key: jax.Array) -> jax.Array:
    """Draws responses token by token, `[N, T]`; `prompts` is `[P, S]`, padded on the right."""
    prefix = model.prefill(params, prompts, lengths)  # once for all G responses to a question
    head = model.head(params)  # [D, V]

    def draw(carry: Any, t: jax.Array) -> tuple[Any, jax.Array]:
        hidden, cache = carry  # hidden: [N, D]
        tokens = jax.random.categorical(jax.random.fold_in(key, t), hidden @ head)  # [N]
        return model.decode(params, prefix, cache, tokens, jnp.full(P * G, t), t), tokens

    start = jnp.repeat(prefix.last_hidden, G, axis=0), model.suffix_cache(P * G, MAX_RESPONSE)
    return jax.lax.scan(draw, start, jnp.arange(MAX_RESPONSE))[1].T


def respond(params: Any, questions: list[Any], key: jax.Array) -> list[list[int]]:
    """Samples N responses, each up to and including the token that ends a turn."""
    prompts = [tokenizer.render(question.messages) for question in questions]
    lengths = np.array([len(ids) for ids in prompts], np.int32)
    drawn = np.asarray(sample(params, pad(prompts, MAX_PROMPT), lengths, key)).tolist()
    ends = [next((t for t, y in enumerate(r) if y in tokenizer.stop_ids), len(r)) for r in drawn]
    return [row[: end + 1] for row, end in zip(drawn, ends, strict=True)]


def pad(rows: list[list[int]], width: int) -> np.ndarray:
    """Makes one array of rows of different lengths by padding on the right."""
    return np.array([row + [0] * (width - len(row)) for row in rows], np.int32)


# 2. The environment grades each answer, and the teacher's prompt is written (section 2).


def contexts(responses: list[list[int]], outcomes: list[Any]) -> list[str | None]:
    """Chooses f for each response: a correct sibling if there is one, otherwise the feedback.

    A response is never its own demonstration, because a teacher that has read y would repeat it.
    A lone success has neither a sibling nor feedback: it has no teacher and adds nothing.
    """
    chosen: list[str | None] = []
    for i, outcome in enumerate(outcomes):
        group = range(i - i % G, i - i % G + G)
        siblings = [responses[j] for j in group if j != i and outcomes[j].passed]
        context = None
        if siblings:
            context = f"\nCorrect solution:\n\n{tokenizer.decode(siblings[0])}"
        elif outcome.feedback:
            context = f"\nFeedback on an earlier attempt:\n\n{outcome.feedback}"
        chosen.append(context)
    return chosen


class Batch(NamedTuple):
    """One step's responses, each after the student's prompt and after the teacher's."""

    student: np.ndarray  # [N, S] tokens of x and y
    student_start: np.ndarray  # [N] where y begins
    teacher: np.ndarray  # [N, S'] tokens of x, f and the same y
    teacher_start: np.ndarray  # [N]
    mask: np.ndarray  # [N, T] 1 on the tokens of a y that has a teacher, otherwise 0


def make_batch(questions: list[Any], responses: list[list[int]], outcomes: list[Any]) -> Batch:
    """Writes both prompts. The sampled tokens are copied as they are, never tokenized again."""
    student, teacher, mask = [], [], []
    for i, context in enumerate(contexts(responses, outcomes)):
        question = questions[i // G].messages[-1]["content"]
        asked = f"{question}{context or ''}\n\nSolve the question above correctly."
        student.append(tokenizer.render([{"role": "user", "content": question}]))
        teacher.append(tokenizer.render([{"role": "user", "content": asked}]))
        mask.append([int(context is not None)] * len(responses[i]))
    width = -(-max(map(len, teacher)) // 64) * 64  # a multiple, so that few programs are compiled
    return Batch(
        pad([x + y for x, y in zip(student, responses, strict=True)], MAX_PROMPT + MAX_RESPONSE),
        np.array([len(x) for x in student], np.int32),
        pad([x + y for x, y in zip(teacher, responses, strict=True)], width + MAX_RESPONSE),
        np.array([len(x) for x in teacher], np.int32),
        pad(mask, MAX_RESPONSE).astype(np.float32),
    )


# 3. The loss (equation 1) and the update.


def log_probs(params: Any, tokens: jax.Array, start: jax.Array) -> jax.Array:
    """Log-probabilities of all next tokens at the T positions of each response, `[N, T, V]`."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    # Attention is causal and padding is on the right, so no token of a response sees padding.
    hidden = model.hidden(params, tokens, positions, jnp.ones_like(tokens))  # [N, S, D]
    before = start[:, None] - 1 + jnp.arange(MAX_RESPONSE)[None]  # the token before predicts y_t
    hidden = jnp.take_along_axis(hidden, before[:, :, None], axis=1)  # [N, T, D]
    return jax.nn.log_softmax(hidden @ model.head(params))


def sdpo_loss(params: Any, teacher_params: Any, batch: Batch) -> jax.Array:
    """The mean over tokens of D_α(π_θ(· | x, y_<t), sg q(· | x, f, y_<t)): equation 1.

    D_α = (1 - α) KL(π ‖ m) + α KL(q ‖ m) with the mixture m = (1 - α) π + α q, over the whole
    vocabulary: the generalised Jensen-Shannon divergence of section 3. Every response was sampled
    with these very weights, so no importance weight is needed.
    """
    student = log_probs(params, batch.student, batch.student_start)
    teacher = jax.lax.stop_gradient(log_probs(teacher_params, batch.teacher, batch.teacher_start))
    mixture = jnp.logaddexp(student + jnp.log(1 - ALPHA), teacher + jnp.log(ALPHA))
    divergence = (1 - ALPHA) * jnp.exp(student) * (student - mixture)
    divergence += ALPHA * jnp.exp(teacher) * (teacher - mixture)
    return jnp.sum(batch.mask * jnp.sum(divergence, axis=-1)) / jnp.maximum(batch.mask.sum(), 1)


class State(NamedTuple):
    """What a step changes; the teacher begins as a copy of the student."""

    params: Any  # θ
    teacher: Any  # θ'
    optimizer: Any


@jax.jit
def update(state: State, batch: Batch) -> tuple[State, jax.Array]:
    """Takes one AdamW step on the loss; then the teacher follows: θ' <- (1 - τ) θ' + τ θ."""
    loss, gradient = jax.value_and_grad(sdpo_loss)(state.params, state.teacher, batch)
    change, moments = optimizer.update(gradient, state.optimizer, state.params)
    params = optax.apply_updates(state.params, change)
    teacher = jax.tree.map(lambda t, s: (1 - EMA_RATE) * t + EMA_RATE * s, state.teacher, params)
    return State(params, teacher, moments), loss


def main(steps: int) -> None:
    """Trains, and prints how the share of correct answers to unseen questions rises."""
    params = jax.tree.map(jnp.asarray, load_params(FOLDER, load_architecture(FOLDER)))
    state = State(params, params, optimizer.init(params))
    environment = ToolCalls(train_prompts=steps * P, held_out_prompts=0)
    for step in range(steps):
        began, questions = time.perf_counter(), environment.train[step * P : (step + 1) * P]
        responses = respond(state.params, questions, jax.random.fold_in(jax.random.key(0), step))
        texts = [tokenizer.decode(response) for response in responses]
        outcomes = [environment.grade(questions[i // G], text) for i, text in enumerate(texts)]
        state, loss = update(state, make_batch(questions, responses, outcomes))
        correct = sum(outcome.passed for outcome in outcomes) / len(outcomes)
        took = f"{time.perf_counter() - began:.1f} s"
        print(f"step {step + 1:2}  correct {correct:4.0%}  loss {loss:.4f}  {took}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 20)
