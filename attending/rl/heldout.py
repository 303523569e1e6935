"""Held-out cases answered by the model as it is, and what that scores."""

import torch

from attending.mesh import World
from attending.rl.fragments import elicited_share, play
from attending.rl.recipe import RlConfig
from attending.rl.sampler import Asked
from attending.rl.setup import Setup
from attending.rl.verify import Verifier, collect
from attending.rl.watch import metric_name
from attending.train.parallel import total


async def answer_heldout(
    config: RlConfig, setup: Setup, verifier: Verifier, place: World
) -> dict[str, float]:
    """Mean scores, of all and by kind, lengths and what is unscored; the ranks share the work.

    One answer to a case is the likeliest; several are sampled, always by the same seeds. Of a
    patient the score is the share of its facts that a whole consultation elicits, and no length is
    told. Without any verdict there is no score.
    """
    count, every = config.watch.heldout_answers, setup.heldout.prompts[place.rank :: place.size]
    plain = [one for one in every if not one.case.patient]
    asked = [one for group in setup.heldout.asked(plain, count, 0) for one in group]
    if count == 1:
        asked = [Asked(one.case, one.prompt, one.seed, temperature=0.0) for one in asked]
    spoken = [one for one in every if one.case.patient]
    fragments = await play(
        spoken,
        setup.patients,
        setup.sampler,
        setup.room,
        [config.dialogue.turns] * len(spoken),
        seed=config.seed,
        version=setup.state.step,
        temperature=0.0,
    )
    found = await collect(setup.sampler, verifier, asked, setup.state.step)
    sums = torch.zeros(len(setup.kinds) + 1, 5, dtype=torch.float64)
    for rollout, _, verdict in found.judged:
        at = setup.kinds.index(setup.cases[rollout.case].kind)
        row = [verdict.score or 0.0, verdict.score is not None, 1.0, len(rollout.ids), 1.0]
        sums[[at, -1]] += torch.tensor(row, dtype=torch.float64)
    for one in fragments:
        at = setup.kinds.index(one.prompt.case.kind)
        row = [elicited_share(one), 1.0, 1.0, 0.0, 0.0]
        sums[[at, -1]] += torch.tensor(row, dtype=torch.float64)
    *by_kind, every_kind = total(sums.to(next(setup.state.decoder.parameters()).device)).tolist()
    scores = {
        f"heldout/score_{metric_name(kind)}": score / scored
        for kind, (score, scored, *_) in zip(setup.kinds, by_kind, strict=True)
        if scored
    }
    score, scored, answers, length, written = every_kind
    if scored:
        scores["heldout/score"] = score / scored
    if written:
        scores["heldout/length_tokens"] = length / written
    return scores | {"heldout/unscored_share": 1 - scored / answers}
