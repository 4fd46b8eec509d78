"""This package simulates whole trainings with their engines, clock, disk and faults, and checks what has to hold.

    python -m fiberpo_megatron.simulation --seeds 1000 --first-seed 0

A seed draws a training (`scenario.py`) and what befalls it: an engine dies, hangs, answers late, loses its answer, or
is started again with the model's own weights; the trainer is killed at any event, with its machine or alone; SIGTERM
comes; the disk is full. The trainer is started again each time until it has trained to the end. `invariants.py` says
what has to hold, and a seed that breaks it replays exactly.

It is production's own code that runs: the loop, the supply of trajectories with its tickets, filter and handovers, the
producer, the generator, conversations, the sampler with its segments, the fleet, the publisher that writes to disk, the
HTTP client, and the files of a run. What is replaced stands behind interfaces:

- `engines.background.BackgroundLoop`, the network's thread and how the main thread waits for it: `clock.py` has one
  thread and virtual time;
- the HTTP transport of `engines.pool.EnginePool`, and `rollout.fleet.Places`: the servers of `engines.py` draw tokens
  by seed, position and weights;
- `durable.Disk`: that of `disk.py` is full at times, and forgets what was not synced when its machine is lost;
- the policy, its checkpoints and its layout: `policy.py` has a table of logits on one rank;
- the environments' workers: `training.py` makes a reward of tokens.

Not covered are several training ranks with what only they do (collectives, a rank that fails alone, the journals of
several leaders), a router, engines that share devices with the trainer, and the real servers. `tests/distributed` and
`tests/end_to_end` have those.
"""
