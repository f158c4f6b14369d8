"""`peta-fast schema`: the JSON schema of recipes, for editors."""

from __future__ import annotations


def schema() -> int:
    """Print the JSON schema of recipes."""
    from peta_fast.cli._text import print_json
    from peta_fast.recipe import recipe_schema

    print_json(recipe_schema())
    return 0
