import pytest

from jaxqat import Recipe, RecipeError, Rule


@pytest.mark.parametrize("bits", [1, 9, 0, -8, 8.0, "8", True])
def test_bits_outside_2_to_8_are_refused_by_name_and_value(bits):
    with pytest.raises(RecipeError, match=rf"quant.weight_bits must be .* 2..8 .*{bits!r}"):
        Recipe(weight_bits=bits)
    with pytest.raises(RecipeError, match=rf"quant.rules.act_bits must be .* 2..8 .*{bits!r}"):
        Rule(act_bits=bits)


def test_an_integer_product_needs_bits_on_both_sides():
    with pytest.raises(RecipeError, match="both be set or both be null"):
        Rule(weight_bits=None)


@pytest.mark.parametrize(
    ("field", "value"),
    [("activations", "signed"), ("weight_granularity", "per_layer"), ("range_decay", 1.0)],
)
def test_a_wrong_choice_is_refused_by_its_dotted_key(field, value):
    with pytest.raises(RecipeError, match=rf"quant.{field} must be .*{value}"):
        Recipe(**{field: value})


def test_a_path_that_is_no_regular_expression_is_refused():
    with pytest.raises(RecipeError, match=r"quant.rules.path .*'stage\['"):
        Rule(path="stage[")


@pytest.mark.parametrize(
    ("name", "weight_bits", "act_bits", "activations"),
    [
        ("int8", 8, 8, "affine"),
        ("int8_symmetric", 8, 8, "symmetric"),
        ("onnxruntime_x86", 8, 8, "affine"),
        ("tensorrt", 8, 8, "symmetric"),
        ("w4a8", 4, 8, "affine"),
        ("w4a4", 4, 4, "affine"),
    ],
)
def test_presets_are_what_their_names_say(name, weight_bits, act_bits, activations):
    recipe = Recipe.preset(name)
    assert (recipe.weight_bits, recipe.act_bits) == (weight_bits, act_bits)
    assert (recipe.activations, recipe.weight_granularity) == (activations, "per_channel")


def test_the_nearest_preset_is_named():
    with pytest.raises(RecipeError, match="Did you mean 'int8_symmetric'"):
        Recipe.preset("int8_symetric")


def test_the_first_matching_rule_wins_and_paths_match_in_full():
    recipe = Recipe(
        rules=(
            Rule(path="stem.*", weight_bits=None, act_bits=None),
            Rule(path=".*conv", kind="conv", weight_bits=4, act_bits=6),
        )
    )
    assert recipe.settings("stem_conv", "conv") is None
    assert _bits(recipe.settings("block/conv", "conv")) == (4, 6)
    assert _bits(recipe.settings("block/conv", "dense")) == (8, 8)
    assert _bits(recipe.settings("block/conv1", "conv")) == (8, 8)


def _bits(settings):
    return settings.weight_bits, settings.act_bits


def test_a_rule_that_matches_no_layer_is_an_error_with_the_nearest_paths():
    recipe = Recipe(rules=(Rule(path="stage9/conv1"),))
    with pytest.raises(RecipeError, match=r"'stage9/conv1'.*none of the 2 layers.*stage1/conv1"):
        recipe.check_rules([("stage1/conv1", "conv"), ("head", "dense")])
