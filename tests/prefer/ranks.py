"""A rank of test_two_ranks_equal_one: `ranks.py RECIPE.json OUT`, under torchrun."""

import json
import sys
from pathlib import Path

from attending.prefer.loop import prefer
from attending.prefer.recipe import PreferConfig

if __name__ == "__main__":
    config = PreferConfig.build(json.loads(Path(sys.argv[1]).read_text("utf-8")))
    prefer(config, Path(sys.argv[2]))
