"""Recipes: strict, documented, overridable, with errors that say what to write instead."""

from pathlib import Path

import pytest
from pydantic import Field

from attending.config import Config, override, read_recipe, recipe_names
from attending.errors import ConfigError


class Optimizer(Config):
    learning_rate: float = Field(1e-3, gt=0)
    """Peak."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Of Adam."""


class Recipe(Config):
    steps: int
    """Required."""
    optimizer: Optimizer = Optimizer()
    """How to step."""


def test_values_are_checked_and_every_fault_is_listed() -> None:
    with pytest.raises(ConfigError) as caught:
        Recipe.build({"optimizer": {"learning_rat": 1.0, "learning_rate": -1}, "steps": "3"})
    text = str(caught.value)
    assert "steps: Input should be a valid integer (got '3')" in text
    assert "optimizer.learning_rate: Input should be greater than 0 (got -1)" in text
    assert "optimizer.learning_rat: unknown. Did you mean 'learning_rate'?" in text


def test_lists_become_tuples_and_records_do_not_change() -> None:
    recipe = Recipe.build({"steps": 3, "optimizer": {"betas": [0.8, 0.9]}})
    assert recipe.optimizer.betas == (0.8, 0.9)
    with pytest.raises(ValueError, match="frozen"):
        recipe.steps = 4  # type: ignore[misc]
    assert recipe.replace(steps=4).steps == 4
    with pytest.raises(ConfigError):
        recipe.replace(steps=0.5)


def test_set_pairs_reach_into_tables() -> None:
    values = override(
        {"steps": 1, "optimizer": {"betas": [0.1, 0.2]}},
        ["optimizer.learning_rate=0.5", "name=plain text", "flag=true", "steps=2"],
    )
    assert values == {
        "steps": 2,
        "optimizer": {"betas": [0.1, 0.2], "learning_rate": 0.5},
        "name": "plain text",
        "flag": True,
    }
    with pytest.raises(ConfigError, match="not of the form"):
        override({}, ["steps"])


def test_a_recipe_overrides_its_base(tmp_path: Path) -> None:
    base, top = tmp_path / "base.toml", tmp_path / "top.toml"
    base.write_text("steps = 1\n[optimizer]\nlearning_rate = 0.5\nbetas = [0.1, 0.2]\n")
    top.write_text(f'base = "{base}"\nsteps = 9\n[optimizer]\nlearning_rate = 0.25\n')
    recipe = Recipe.load(str(top), "none", ["optimizer.betas=[0.3, 0.4]"])
    assert (recipe.steps, recipe.optimizer.learning_rate) == (9, 0.25)
    assert recipe.optimizer.betas == (0.3, 0.4)
    base.write_text(f'base = "{top}"\n')
    with pytest.raises(ConfigError, match="based on itself"):
        read_recipe(str(top), "none")


def test_a_recipe_that_is_not_there_or_not_toml_is_a_clear_error(tmp_path: Path) -> None:
    assert recipe_names("none") == []
    with pytest.raises(ConfigError, match="no none recipe 'tiny'"):
        read_recipe("tiny", "none")
    with pytest.raises(ConfigError, match="does not exist"):
        read_recipe(str(tmp_path / "x.toml"), "none")
    (tmp_path / "x.toml").write_text("a = ")
    with pytest.raises(ConfigError, match="not valid TOML"):
        read_recipe(str(tmp_path / "x.toml"), "none")
