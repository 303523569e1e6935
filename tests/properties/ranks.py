"""A rank of test_training's runs: `ranks.py RECIPE.json OUT [resume]`, under torchrun.

With KILL_AFTER=N in the environment rank 1 kills itself once step N is saved.
"""

import json
import os
import signal
import sys
from pathlib import Path

from attending.pretrain.loop import pretrain
from attending.pretrain.recipe import PretrainConfig
from attending.train.state import TrainState

if __name__ == "__main__":
    config = PretrainConfig.build(json.loads(Path(sys.argv[1]).read_text("utf-8")))
    limit, save = int(os.environ.get("KILL_AFTER") or 0), TrainState.save

    def save_and_die(state: TrainState, out: Path, keep: int) -> None:
        save(state, out, keep)
        if limit and state.step >= limit and state.place.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    TrainState.save = save_and_die  # type: ignore[method-assign]
    pretrain(config, Path(sys.argv[2]), resume="resume" in sys.argv[3:])
