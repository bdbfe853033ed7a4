"""The families of decoders that the installed version of transformers has."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


class Family(NamedTuple):
    """A class of models that `AutoModelForCausalLM` makes.

    Attributes:
        model_type: whose config it is tried with; a text model's own, where the class has several.
        aliases: other types of configs that lead to the same class.
    """

    class_name: str
    model_type: str
    aliases: tuple[str, ...]


def all_families() -> list[Family]:
    """One for each class, in the order of their model types."""
    types = defaultdict(list)
    for model_type, class_name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        types[class_name].append(model_type)
    families = [_family(class_name, of_class) for class_name, of_class in types.items()]
    return sorted(families, key=lambda family: family.model_type)


def _family(class_name: str, model_types: list[str]) -> Family:
    chosen, *aliases = sorted(model_types, key=lambda model_type: _rank(class_name, model_type))
    return Family(class_name, chosen, tuple(sorted(aliases)))


def _rank(class_name: str, model_type: str) -> tuple[bool, bool, bool, str]:
    """The text model's own config comes before one of text and images, and before another model's that it reads."""
    config_class = CONFIG_MAPPING[model_type]
    named_after = config_class.__name__.removesuffix("Config").removesuffix("Text")
    is_alias = config_class.model_type != model_type
    return bool(config_class.sub_configs), not class_name.startswith(named_after), is_alias, model_type
