"""Adapters: the same model at the start, the merged model afterwards, nothing else trained."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sdpo_jax.config import LoraConfig, TeacherConfig
from sdpo_jax.errors import UserError
from sdpo_jax.run.recipes import default_config
from sdpo_jax.teacher.weights import ema_update
from sdpo_jax.training.lora import LowRank, full, lora
from sdpo_jax.training.state import (
    make_optimizer,
    make_parameters,
    make_teacher,
    state_maker,
    state_shardings,
)
from sdpo_jax.training.step import update_teacher

ALL = ("query", "key", "value", "output", "gate", "up", "down")
MODEL = tiny.make_model()
TOKENS = jnp.arange(12).reshape(2, 6)
ROWS = TOKENS, jnp.broadcast_to(jnp.arange(6)[None], (2, 6)), jnp.ones((2, 6), jnp.int32)


def moved(parts, params, seed=1):
    """Adapters away from their start."""
    adapters = parts.trainable(params, jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(seed), 64))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), adapters)


@pytest.mark.slow
def test_adapters_start_as_the_base():
    params, parts = tiny.make_params(), lora(4, 8.0, ALL)
    adapters = parts.trainable(params, jax.random.key(0))
    got = MODEL.hidden(parts.forward(params, adapters), *ROWS)
    # Another program, in which XLA fuses sums in another order: equal but for rounding.
    np.testing.assert_allclose(got, MODEL.hidden(params, *ROWS), atol=5e-6)
    jax.tree.map(np.testing.assert_array_equal, parts.merged(params, adapters), params)


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=[] if f == "llama" else pytest.mark.slow) for f in tiny.FAMILIES],
)
def test_the_model_with_adapters_is_the_merged_model(family):
    architecture = tiny.FAMILIES[family]
    model, params = tiny.make_model(architecture), tiny.make_params(architecture)
    parts = lora(4, 8.0, ALL)
    adapters = moved(parts, params)
    want = model.hidden(parts.merged(params, adapters), *ROWS)
    assert not np.allclose(want, model.hidden(params, *ROWS), atol=1e-2)
    np.testing.assert_allclose(
        model.hidden(parts.forward(params, adapters), *ROWS), want, atol=2e-5
    )


@pytest.mark.slow
def test_gradients_are_those_of_the_merged_matrices_by_the_chain_rule():
    params, parts = tiny.make_params(), lora(2, 6.0, ("query", "down"))
    adapters = moved(parts, params)

    def loss(weights):
        return jnp.sum(MODEL.hidden(weights, *ROWS) ** 2)

    got = jax.grad(lambda a: loss(parts.forward(params, a)))(adapters)
    whole = jax.grad(loss)(parts.merged(params, adapters))["layers"]
    for name, a in adapters.items():
        want = {
            "down": 3.0 * jnp.einsum("lio,lro->lir", whole[name], a["up"]),
            "up": 3.0 * jnp.einsum("lir,lio->lro", a["down"], whole[name]),
        }
        for part, value in want.items():
            np.testing.assert_allclose(got[name][part], value, rtol=1e-3, atol=1e-4)


def test_no_array_of_the_size_of_a_matrix_is_made_by_the_backward_pass():
    a, b, w = jnp.ones((64, 2)), jnp.ones((2, 96)), jnp.ones((64, 96))

    def loss(adapters, w, x):
        return jnp.sum(x @ LowRank(jax.lax.stop_gradient(w), *adapters, 1.0))

    text = jax.jit(jax.grad(loss)).lower((a, b), w, jnp.ones((3, 64))).compile().as_text()
    assert text is not None
    made = [line for line in text.splitlines() if "= f32[64,96]" in line]
    assert [line for line in made if "parameter(" not in line] == []


def test_the_base_receives_no_gradient():
    params, parts = tiny.make_params(), lora(2, 4.0, ALL)
    adapters = moved(parts, params)
    gradient = jax.grad(lambda p: jnp.sum(MODEL.hidden(parts.forward(p, adapters), *ROWS)))(params)
    assert all(not np.any(x) for x in jax.tree.leaves(gradient["layers"]))


def config_of(weights, rank=2):
    return default_config(
        lora=LoraConfig(rank=rank), teacher=TeacherConfig(weights=weights, ema_rate=0.25)
    )


def state_of(config, mesh=(1, 1, 1), architecture=tiny.ARCHITECTURE):
    model = tiny.make_model(architecture)
    devices, teacher = tiny.make_devices(*mesh), make_teacher(config)
    parameters, optimizer = make_parameters(config), make_optimizer(config.optimizer, 10)
    shardings = state_shardings(model, devices, optimizer, teacher, parameters)
    params = tiny.make_params(architecture)
    state = state_maker(optimizer, teacher, shardings, parameters)(params, 3)
    return state, teacher, parameters


@pytest.mark.slow
def test_an_averaged_teacher_follows_the_product_of_the_adapters():
    state, teacher, parameters = state_of(config_of("ema"))
    assert teacher is not None
    expected = tiny.make_params()
    for seed in (1, 2):
        state = state.replace(params=moved(parameters, tiny.make_params(), seed))
        expected = ema_update(expected, parameters.merged(state.base, state.params), 0.25)
        state = update_teacher(teacher, parameters, state, jnp.asarray(True))
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=1e-6), state.teacher, expected)


def test_a_frozen_teacher_beside_adapters_is_the_base_and_takes_no_memory():
    state, _, _ = state_of(config_of("frozen"))
    assert state.teacher is None
    assert jax.tree.leaves(state_of(config_of("frozen", rank=0))[0].teacher)


def test_optimizer_state_is_of_the_size_of_the_adapters():
    state, _, _ = state_of(config_of("ema"))
    trained = sum(x.size for x in jax.tree.leaves(state.params))
    moments = sum(x.size for x in jax.tree.leaves(state.optimizer) if x.ndim > 0)
    assert moments == 2 * trained


def test_adapters_lie_on_the_mesh_like_the_matrices_they_belong_to():
    even = replace(tiny.ARCHITECTURE, vocabulary=64)
    state, _, _ = state_of(config_of("ema"), mesh=(1, 4, 2), architecture=even)
    query = state.base["layers"]["query"].sharding.spec
    down, up = (state.params["query"][name].sharding.spec for name in ("down", "up"))
    assert down[1] == query[1] and up[2] == query[2]


@pytest.mark.parametrize("targets", [(), ("query", "nothing"), ("attention_norm",)])
def test_a_target_that_is_no_matrix_is_named(targets):
    with pytest.raises(UserError, match=r"lora\.targets = .*expected names of down, gate"):
        lora(2, 4.0, targets).trainable(tiny.make_params(), jax.random.key(0))


def test_full_training_changes_nothing():
    params = tiny.make_params()
    parts = full()
    assert parts.forward(None, params) is params and parts.base(params) is None
