"""A folder that `sdpo convert` made, in transformers and in ours: the same greedy tokens.

    pip install -e '.[train]' torch
    pip install --no-deps bfcl-eval
    python tests/live_export.py FOLDER

Answers held-out requests of the tool-use environment greedily, in float32 on the CPU. Fails if a
token differs, unless both models find the two tokens equally likely (within rounding).
"""

import argparse
from pathlib import Path

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdpo_jax.config import MeshConfig
from sdpo_jax.devices import Devices, make_mesh
from sdpo_jax.environments.kinds.bfcl import Bfcl, load_rows
from sdpo_jax.rollouts.sampler import Sampler
from sdpo_models.hugging_face import load_architecture, load_params
from sdpo_models.tokenizer import ChatTokenizer
from sdpo_models.transformer import build_model

TIE = 1e-3  # of logits; rounding is below 2e-4 of their range


def ours(folder, prompts, max_tokens):
    """Prompts as ids, and the answers of our sampler at temperature 0."""
    tokenizer = ChatTokenizer.from_pretrained(folder)
    ids = [tokenizer.render(prompt.messages) for prompt in prompts]
    architecture = load_architecture(folder)
    sampler = Sampler(
        build_model(architecture), Devices(make_mesh(MeshConfig())), tokenizer.stop_ids
    )
    params = load_params(folder, architecture)
    rollouts = sampler(params, ids, group=1, max_tokens=max_tokens, temperature=0.0, seed=0, step=0)
    return ids, rollouts.responses()


def theirs(model, tokenizer, prompt, max_tokens):
    """Ids of the chat as transformers renders it, its greedy answer, the logits of each step."""
    ids = tokenizer.apply_chat_template(
        list(prompt.messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(
        **ids,
        do_sample=False,
        max_new_tokens=max_tokens,
        output_logits=True,
        return_dict_in_generate=True,
    )
    size = ids["input_ids"].shape[1]
    logits = torch.stack(out.logits)[:, 0].numpy()
    return ids["input_ids"][0].tolist(), out.sequences[0, size:].tolist(), logits


def main():
    parser = argparse.ArgumentParser(description="An exported run in transformers and in ours.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=64)
    options = parser.parse_args()
    environment = Bfcl(load_rows(), train_prompts=1, held_out_prompts=options.prompts)
    prompts = environment.held_out
    rendered, answers = ours(options.folder, prompts, options.max_tokens)
    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    tokens, passed, ties = 0, 0, 0
    for prompt, ids, answer in zip(prompts, rendered, answers, strict=True):
        want_ids, want, logits = theirs(model, tokenizer, prompt, options.max_tokens)
        assert ids == want_ids, f"{prompt.id}: the chat template gives other ids"
        if answer != want:
            t = next(i for i in range(len(want)) if answer[i : i + 1] != want[i : i + 1])
            assert np.isfinite(logits).all()
            gap = abs(logits[t, answer[t]] - logits[t, want[t]])
            assert gap < TIE, f"{prompt.id}: token {t} is {answer[t]} in ours, {want[t]} in theirs"
            ties += 1
        tokens += len(answer)
        text = tokenizer.decode(answer, skip_special_tokens=True)
        passed += environment.grade(prompt, text).passed
    assert tokens > len(prompts), "the answers are empty"
    print(
        f"{len(prompts)} answers of {tokens} tokens in all: the same greedy tokens in transformers "
        f"and in ours ({ties} ended in a tie); the environment accepts {passed}"
    )


if __name__ == "__main__":
    main()
