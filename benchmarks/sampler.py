"""Sampling alone: slots that refill against batches that wait for their longest response.

    python benchmarks/sampler.py --setting A
    python benchmarks/sampler.py --setting C --slots 8

The model is that of `step.py`. Responses end where one of so many stop tokens is drawn that their
mean is an eighth of the limit, as a model's lengths may be in training: near to exponential. Static
batches need as many passes of the decode loop as the longest of each batch has tokens.
"""

import statistics
from typing import Any

from settings import now, parse_flags, pin, setting_of, since

if __name__ == "__main__":
    pin(parse_flags(__doc__).threads)  # Before jax reads the environment and counts cores.

import jax
import numpy as np
from step import make_architecture

from sdpo_jax.config import MeshConfig
from sdpo_jax.devices import Devices, make_mesh
from sdpo_jax.rollouts.sampler import HostRollouts, Sampler
from sdpo_models.transformer import build_model


def static_passes(lengths: Any, slots: int) -> int:
    """Passes of the decode loop where each batch waits for its longest response."""
    return sum(int(max(lengths[i : i + slots])) for i in range(0, len(lengths), slots))


def main() -> None:
    """Prints passes and tokens per CPU second, all rollouts at once and in slots that refill."""
    options = parse_flags(__doc__)
    s = setting_of(options)
    few = options.slots or s.rows // 4
    model = build_model(make_architecture(s))
    params = model.init(jax.random.key(0))
    stop_ids = range(max(1, round(s.vocabulary * 8 / s.response_tokens)))
    random = np.random.default_rng(0)
    prompts = random.integers(0, s.vocabulary, size=(s.prompts, s.prompt_tokens)).tolist()
    settings: dict[str, Any] = {"max_tokens": s.response_tokens, "temperature": 1.0, "seed": 0}
    found: dict[str, HostRollouts] = {}
    print(f"setting {options.setting}: {s.rows} rollouts of at most {s.response_tokens} tokens")
    for name, slots in (("all at once", 0), (f"{few} slots", few)):
        devices = Devices(make_mesh(MeshConfig()))
        sampler = Sampler(model, devices, stop_ids, slots=slots)
        seconds: list[float] = []
        for step in range(options.steps + 1):  # the first one compiles
            began = now()
            found[name] = sampler(params, prompts, group=s.rollouts, step=step % 2, **settings)
            seconds.append(since(began).cpu)
        rollouts, cpu = found[name], statistics.median(seconds[1:])
        tokens, static = (
            int(rollouts.lengths.sum()),
            static_passes(rollouts.lengths, slots or s.rows),
        )
        print(
            f"  {name:<12} {tokens} tokens, mean {tokens / s.rows:.1f}; {rollouts.decoded} passes, "
            f"static batches {static} ({rollouts.decoded / static:.2f}); {cpu:.2f} CPU s"
        )


if __name__ == "__main__":
    main()
